"""SparseGPT: pruning that also changes the weights that it keeps, so that a layer's outputs stay what they were.

What a method of this kind minimizes for each row `w` of a weight is the squared error of its outputs on calibration
samples, `‖(w − ŵ) X‖²`, which depends on the inputs `X` through their Hessian `H = X Xᵀ` alone.
"""

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn
from transformers.utils.logging import tqdm

from ..calibration.activations import Product
from ..calibration.batches import Batch, size_of
from ..calibration.contexts import eager_experts, undisturbed
from ..calibration.samples import DELAY, read_samples, require_samples
from ..calibration.statistics import require_finite, unpadded_inputs, warn_of_unreached
from ..distributed.processes import sum_over_processes_
from ..scopes import divide
from ..selection.cuts import Quota
from ..selection.lowest import drop_lowest, drop_lowest_of_each
from ..weights.masks import MaskSet, masked_in
from ..weights.targets import Target
from .stages import Stages

logger = logging.getLogger(__name__)

DAMPING = (0.01, 0.1, 1.0)  # What is added to the diagonal, in units of its mean: more where less will not do.
BLOCKSIZE = 128  # Columns that are chosen from, and changed, at a time.
_BAND = 512  # Rows of a Hessian that are computed at a time, from their first diagonal element to the right.


class _Factor(NamedTuple):
    """What is needed of a Hessian.

    Attributes:
        upper: Upper Cholesky factor of its inverse, `[columns, columns]`: row `i` is the first one of the inverse of
            the Hessian of the columns from `i` on, divided by the root of that row's first element.
        alive: `[columns]`, bool: inputs that are nonzero in at least one sample.
    """

    upper: torch.Tensor
    alive: torch.Tensor


def reconstruct_(
    model: nn.Module,
    targets: Mapping[str, Target],
    masks: MaskSet,
    quotas: Mapping[str, Quota],
    batches: Iterable[Batch],
    samples: int,
    *,
    show_progress: bool = False,
) -> MaskSet:
    """Prunes a model with SparseGPT, layer by layer in the order of its forward pass.

    A layer sees the inputs that the pruned layers before it give. In memory are one Hessian (fused experts have one
    each), and the outputs of finished blocks, and of finished parts of others, that later passes still read.

    Args:
        model: The model, unwrapped; called as a calibration calls it. Changed in place.
        targets: The weights.
        masks: The masks so far; what they prune stays pruned.
        quotas: What to prune of each target.
        batches: What the model is called with, as `read_samples` takes them.
        samples: Number of samples to read, of all processes together.
        show_progress: Whether a bar shows how far it is, if it takes more than a few seconds.

    Returns:
        A mask for each target. The weights that it prunes are zero.

    Raises:
        ValueError: if there are no samples, or activations are not finite (the message names the module).

    Source: Frantar & Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", arXiv
    2301.00774.
    """
    new: dict[str, torch.Tensor] = {}

    def prune_(name: str, factors: Sequence[_Factor | None]) -> None:
        new[name] = _prune_target_(targets[name], factors, masks.get(name), quotas[name])

    with undisturbed(model), eager_experts(model), _in_full_precision():
        data = list(read_samples(model, batches, samples))
        require_samples(model, sum(map(size_of, data)), samples)
        with Stages(model, targets, data) as stages:
            for name in stages.unused:
                logger.warning("No product of %r was seen in the forward passes; it is pruned by magnitude.", name)
                prune_(name, [None] * targets[name].parts)
            for stage in tqdm(stages.order, desc="Pruning", unit="layer", delay=DELAY, disable=not show_progress):
                hessian = _Hessian(model, targets[stage.names[0]])
                stages.run(stage, hessian.add_)
                factors = hessian.factors()
                for name in stage.names:
                    prune_(name, factors)
                stages.finish(stage)
    return MaskSet({name: new[name] for name in targets})


class _Hessian:
    """`X Xᵀ` of a target's inputs, for each of its parts: `[parts, fan_in, fan_in]`, in float32 or better."""

    def __init__(self, model: nn.Module, target: Target) -> None:
        self._model, self._target = model, target
        size = torch.Size([target.parts, target.fan_in, target.fan_in])
        self._sum = torch.zeros(size, device=target.weight.device, dtype=_compute_dtype(target))
        self._bands = [slice(start, start + _BAND) for start in range(0, target.fan_in, _BAND)]

    def add_(self, product: Product, batch: Batch) -> None:
        x = unpadded_inputs(product, batch, self._model).to(self._sum.dtype)
        for here in self._bands:  # It is symmetric, and what is to their left need not be computed.
            on = slice(here.start, None)
            self._sum[product.part_slice, here, on].baddbmm_(x[..., here].mT, x[..., on])

    def factors(self) -> list[_Factor | None]:
        """For each part what SparseGPT needs of it; None where it cannot be had."""
        total, name = sum_over_processes_(self._sum), self._target.module
        for here in self._bands:
            behind = slice(here.stop, None)
            total[:, behind, here] = total[:, here, behind].mT
        require_finite(total, f"what {name!r} is multiplied with")
        reached = total.diagonal(dim1=1, dim2=2).any(1)
        warn_of_unreached(self._target, reached, "they are pruned by magnitude")
        order = _column_order(self._target)
        factors = [
            _factor_(part[order][:, order]) if used else None for part, used in zip(total, reached, strict=True)
        ]
        if failed := int(reached.sum()) - sum(factor is not None for factor in factors):
            logger.warning(
                "%d of the %d Hessians of %r cannot be factorized, even with %g times the mean diagonal added; what "
                "goes with them is pruned by magnitude, and the weights that it keeps stay as they are.",
                failed, len(factors), name, DAMPING[-1],
            )  # fmt: skip
        return factors


def _factor_(hessian: torch.Tensor) -> _Factor | None:
    """Factorizes a Hessian, which is changed in place, with as little damping as will do; None if none will."""
    diagonal = hessian.diagonal()
    alive = diagonal > 0
    mean = diagonal[alive].mean()
    before = 0.0
    for damping in DAMPING:
        diagonal += (damping - before) * mean
        before = damping
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and upper.isfinite().all():
                return _Factor(upper, alive)
    return None


@torch.no_grad()
def _prune_target_(
    target: Target, factors: Sequence[_Factor | None], kept: torch.Tensor | None, quota: Quota
) -> torch.Tensor:
    """Prunes a target in place; returns its mask."""
    order = _column_order(target)
    rows = target.to_rows(target.weight.detach())[..., order].to(_compute_dtype(target))
    masks = torch.ones_like(rows, dtype=torch.bool) if kept is None else target.to_rows(kept)[..., order].clone()
    for part, factor, mask, share in zip(rows, factors, masks, _shares(quota, masks), strict=True):
        if factor is None:
            mask.copy_(_select(target.name, part.abs(), mask, share))
            part *= mask
        else:
            _sparsegpt_(target.name, part, factor, mask, share)
    back = order.argsort()
    target.weight.copy_(target.from_rows(rows[..., back]))
    return target.from_rows(masks[..., back]).contiguous()


def _sparsegpt_(name: str, rows: torch.Tensor, factor: _Factor, mask: torch.Tensor, quota: Quota) -> None:
    """Prunes columns from left to right, and moves the error of each onto those that come after it.

    Rows, in float32 or better, and their mask, True = kept so far, are `[rows, columns]`, and changed in place.
    """
    # `group` columns are chosen among at once. A pattern is chosen when its first column is reached, and those before
    # it have passed on their errors; so several share a block.
    group = quota.m if not isinstance(quota, int) else BLOCKSIZE
    shares = _shares(quota, mask.split(group, 1))
    width = max(BLOCKSIZE // group, 1) * group
    for start in range(0, rows.shape[1], width):
        here, behind = slice(start, start + width), slice(start + width, None)
        # Transposed, [columns, rows]: what is worked on, a column, is then contiguous in memory.
        block, kept = rows[:, here].t().contiguous(), mask[:, here].t().contiguous()
        upper, alive, errors = factor.upper[here, here], factor.alive[here], torch.empty_like(block)
        pivots = upper.diagonal()
        for i in range(len(block)):
            if i % group == 0:
                columns = slice(i, i + group)
                # Weights of dead inputs change no output.
                scores = (block[columns].t() / pivots[columns]).square() * alive[columns]
                kept[columns] = _select(name, scores, kept[columns].t(), shares[(start + i) // group]).t()
            pruned = block[i] * kept[i]
            errors[i] = (block[i] - pruned) / pivots[i]
            block[i:].addr_(upper[i, i:], errors[i], alpha=-1)
            block[i] = pruned
        rows[:, here], mask[:, here] = block.t(), kept.t()
        rows[:, behind].addmm_(errors.t(), factor.upper[here, behind], alpha=-1)


def _select(name: str, scores: torch.Tensor, kept: torch.Tensor, quota: Quota) -> torch.Tensor:
    """The mask of a matrix of scores."""
    if not isinstance(quota, int):
        groups = kept.reshape(-1, quota.m)
        return drop_lowest_of_each(name, scores.reshape(-1, quota.m), quota.m - quota.n, groups).view(kept.shape)
    return drop_lowest({name: lambda: scores}, quota, {name: kept})[name]


def _shares(quota: Quota, masks: Iterable[torch.Tensor]) -> Sequence[Quota]:
    """Divides a number of weights to prune among masks by their sizes, none with fewer than it prunes already."""
    if not isinstance(quota, int):
        return [quota for _ in masks]
    named = {str(i): mask for i, mask in enumerate(masks)}
    sizes = {name: mask.numel() for name, mask in named.items()}
    dropped = {name: masked_in(mask) for name, mask in named.items()}
    return list(divide(quota, lambda level: dict.fromkeys(sizes, level), sizes, dropped).values())


def _compute_dtype(target: Target) -> torch.dtype:
    """The dtype in which a target is pruned: float32 or better."""
    return torch.promote_types(target.weight.dtype, torch.float32)


def _column_order(target: Target) -> torch.Tensor:
    """The order of a row's inputs in which the channels at one position of a kernel are side by side."""
    return torch.arange(target.fan_in, device=target.weight.device).view(target.in_features, -1).t().flatten()


@contextlib.contextmanager
def _in_full_precision() -> Iterator[None]:
    """Matrix products of float32 in float32, whatever is set for the training."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
