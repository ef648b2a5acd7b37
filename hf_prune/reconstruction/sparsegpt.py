"""SparseGPT: pruning that also changes the weights that it keeps, so that a layer's outputs stay what they were.

What a method of this kind minimizes for each row `w` of a weight is the squared error of its outputs on calibration
samples, `‖(w − ŵ) X‖²`, which depends on the inputs `X` through their Hessian `H = X Xᵀ` alone.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from ..calibration.batches import Batch
from ..calibration.statistics import warn_of_unreached
from ..scopes import divide
from ..selection.cuts import Quota
from ..selection.lowest import drop_lowest, drop_lowest_of_each
from ..weights.masks import MaskSet, masked_in
from ..weights.targets import Target
from .moments import SecondMoments, change_in_stages_, compute_dtype

logger = logging.getLogger(__name__)

DAMPING = (0.01, 0.1, 1.0)  # What is added to the diagonal, in units of its mean: more where less will not do.
BLOCKSIZE = 128  # Columns that are chosen from, and changed, at a time.


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

    A layer sees the inputs that the pruned layers before it give; see `change_in_stages_`.

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

    def prune_(names: Sequence[str], moments: SecondMoments | None) -> None:
        if moments is None:
            logger.warning("No product of %r was seen in the forward passes; it is pruned by magnitude.", names[0])
        target = targets[names[0]]
        factors = [None] * target.parts if moments is None else _factors_(target, moments)
        for name in names:
            new[name] = _prune_target_(targets[name], factors, masks.get(name), quotas[name])

    change_in_stages_(model, targets, batches, samples, prune_, show_progress=show_progress)
    return MaskSet({name: new[name] for name in targets})


def _factors_(target: Target, moments: SecondMoments) -> list[_Factor | None]:
    """For each part what SparseGPT needs of its Hessian; None where it cannot be had."""
    reached = moments.sums.diagonal(dim1=1, dim2=2).any(1)
    warn_of_unreached(target, reached, "they are pruned by magnitude")
    order = _column_order(target)
    factors = [
        _factor_(part[order][:, order]) if used else None for part, used in zip(moments.sums, reached, strict=True)
    ]
    if failed := int(reached.sum()) - sum(factor is not None for factor in factors):
        logger.warning(
            "%d of the %d Hessians of %r cannot be factorized, even with %g times the mean diagonal added; what goes "
            "with them is pruned by magnitude, and the weights that it keeps stay as they are.",
            failed, len(factors), target.module, DAMPING[-1],
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
    rows = target.to_rows(target.weight.detach())[..., order].to(compute_dtype(target))
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


def _column_order(target: Target) -> torch.Tensor:
    """The order of a row's inputs in which the channels at one position of a kernel are side by side."""
    return torch.arange(target.fan_in, device=target.weight.device).view(target.in_features, -1).t().flatten()
