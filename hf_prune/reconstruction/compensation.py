"""Compensation: what reads pruned structures is solved anew on those that stay, so that it gives what it gave.

A projection with weights `W` reads inputs `x`, of which some come from structures that go. Ridge regression makes of
the rest, `x_S`, as much as it can: its `Ŵ` has the least `E‖W x − Ŵ x_S‖² + λ‖Ŵ − W_S‖²`. With `H = E x xᵀ` this is
`Ŵ = W_S + W_P H_PS (H_SS + λ)⁻¹`, where `P` is what goes. Where the projection has a bias, `x` is without its mean, of
which the bias takes over what is lost.

Where its output is added to a residual stream, `W x + Δ` is wanted instead of `W x`: what changed before has moved the
stream by `−Δ` from that of the dense model, which is the model as the cut finds it, without the layers that go. This
adds `E Δ x_Sᵀ` to `W_P H_PS`.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from ..calibration.batches import Batch
from ..calibration.statistics import warn_of_unreached
from ..structures.contributions import readers_of
from ..structures.groups import COMPENSATED, Structures, kept_in, masks_of
from ..weights.masks import MaskSet
from ..weights.targets import Target, bias_of
from .moments import SecondMoments, change_in_stages_, compute_dtype

logger = logging.getLogger(__name__)

RIDGE = 0.01
"""`λ`, in units of the mean of the diagonal of `H_SS`."""


def compensate_(
    model: nn.Module,
    targets: Mapping[str, Target],
    structures: Structures,
    masks: MaskSet,
    batches: Iterable[Batch],
    samples: int,
    *,
    show_progress: bool = False,
) -> list[torch.Tensor]:
    """Solves the projections that read what masks of structures prune anew on what they keep, ahead of the masks.

    Layer by layer in the order of the forward pass, each with the inputs that the changed layers before it give, and
    without the structures of other kinds than `COMPENSATED` that go, which are zeroed at once. Single weights that
    were zero are filled.

    Args:
        model: The model, unwrapped; called as a calibration calls it. Changed in place.
        targets: The weights.
        structures: The structures.
        masks: What is pruned. Passes need what heads, queries and neurons that go hand on: the masks of these are
            applied afterwards.
        batches: What the model is called with, as `read_samples` takes them. Padding of an encoder-decoder counts.
        samples: Number of samples to read, of all processes together.
        show_progress: Whether a bar shows how far it is, if it takes more than a few seconds.

    Returns:
        The weights that were solved anew, and their biases.

    Raises:
        ValueError: if there are no samples, or activations are not finite (the message names the module).

    Source: the regression is that of Kurtic et al. 2023, "ZipLM: Inference-Aware Structured Pruning of Language
    Models", arXiv 2302.04089, for all that goes at once.
    """
    others = {name: group for name, group in structures.items() if group.kind not in COMPENSATED}
    masks_of(others, kept_in(others, masks)).apply_(model)
    changed: list[torch.Tensor] = []
    unseen: list[str] = []
    scarce: list[tuple[int, int]] = []

    def solve_(names: Sequence[str], moments: SecondMoments | None) -> None:
        for name in names:
            if masks[name].all():
                continue
            target, bias = targets[name], bias_of(model, targets[name])
            if moments is None:
                unseen.append(name)
                continue
            warn_of_unreached(target, moments.positions > 0, "they only lose what is pruned")
            if few := _solve_(target, bias, masks[name], moments):
                scarce.append(max(few, key=_shortage))
            changed.extend([target.weight] if bias is None else [target.weight, bias])

    readers = _readers_in(targets, structures)
    change_in_stages_(model, readers, batches, samples, solve_, with_dense=True, show_progress=show_progress)
    if unseen:
        logger.warning(
            "No product of %r was seen in the forward passes (%d projections in all), which only lose what is pruned.",
            unseen[0], len(unseen),
        )  # fmt: skip
    if scarce:
        seen, needed = max(scarce, key=_shortage)
        logger.warning(
            "%d projections were solved anew from fewer tokens than they have inputs (%d for %d). Give at least as "
            "many (calibration_samples), or they fit these samples alone.",
            len(scarce), seen, needed,
        )  # fmt: skip
    return changed


def solved_by_compensation(
    model: nn.Module, targets: Mapping[str, Target], structures: Structures
) -> list[torch.Tensor]:
    """The weights that `compensate_` may solve anew, and their biases."""
    readers = _readers_in(targets, structures).values()
    biases = (bias_of(model, target) for target in readers)
    return [*(target.weight for target in readers), *(bias for bias in biases if bias is not None)]


def _readers_in(targets: Mapping[str, Target], structures: Structures) -> dict[str, Target]:
    """The projections that read structures which can be made up for."""
    groups = [group for group in structures.values() if group.kind in COMPENSATED]
    return {member.name: target for group in groups for member, target in readers_of(group, targets)}


def _shortage(tokens: tuple[int, int]) -> int:
    seen, needed = tokens
    return needed - seen


@torch.no_grad()
def _solve_(
    target: Target, bias: nn.Parameter | None, mask: torch.Tensor, moments: SecondMoments
) -> list[tuple[int, int]]:
    """Solves a projection anew; returns for each part with fewer tokens than inputs that stay both numbers."""
    before = target.to_rows(target.weight.detach()).to(compute_dtype(target))
    rows, scarce = before.clone(), []
    for i, kept in enumerate(target.to_rows(mask)):
        stays, seen = kept.any(0), int(moments.positions[i])
        if stays.all() or not stays.any() or not moments.sums[i].any():
            continue
        if seen < (needed := int(stays.sum())):
            scarce.append((seen, needed))
        mean, around = moments.totals[i] / seen, moments.sums[i]
        difference = moments.differences[i] / seen
        cross = None if moments.cross is None else moments.cross[i]
        if bias is not None:
            around = around.addr(mean, mean, alpha=-seen)
            cross = None if cross is None else cross.addr(mean, difference, alpha=-seen)
        rows[i] = solved(rows[i], around, stays, target.weight.dtype, cross)
        if bias is not None:
            bias.copy_(bias + (before[i] - rows[i]) @ mean + (0 if cross is None else difference))
    target.weight.copy_(target.from_rows(rows))
    return scarce


def solved(
    rows: torch.Tensor,
    moments: torch.Tensor,
    stays: torch.Tensor,
    dtype: torch.dtype,
    cross: torch.Tensor | None = None,
) -> torch.Tensor:
    """The rows of a weight, solved anew on the inputs that stay.

    Rows for which that is no better, as rounding may have it, only lose the others.

    Args:
        rows: `[out, in]`, in float32 or better.
        moments: `[in, in]` second moments `X Xᵀ` of the inputs, or those around their mean, in the same dtype.
        stays: `[in]` bools.
        dtype: What the weight is rounded to.
        cross: `[in, out]`: `X Δᵀ`, where the rows should give `Δ` more than they do; or both around their means.

    Returns:
        `[out, in]`, zero where inputs go.
    """
    without = rows * stays
    inner, between = moments[stays][:, stays], moments[~stays][:, stays]
    diagonal = inner.diagonal()
    diagonal += RIDGE * diagonal.mean()
    lower, failed = torch.linalg.cholesky_ex(inner)
    if failed:
        return without
    found = without.clone()
    lost = rows[:, ~stays] @ between if cross is None else rows[:, ~stays] @ between + cross[stays].mT
    found[:, stays] += torch.cholesky_solve(lost.mT, lower).mT
    found = found.to(dtype).to(rows.dtype)
    is_better = _errors(rows - found, moments, cross) < _errors(rows - without, moments, cross)
    return torch.where(is_better[:, None], found, without)


def _errors(rows: torch.Tensor, moments: torch.Tensor, cross: torch.Tensor | None) -> torch.Tensor:
    """`[out]`: `‖w X + Δ‖² − ‖Δ‖²` of each row."""
    errors = ((rows @ moments) * rows).sum(1)
    return errors if cross is None else errors + 2 * (rows * cross.mT).sum(1)
