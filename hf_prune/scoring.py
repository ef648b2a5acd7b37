"""Scoring: what a criterion says of weights and of whole structures, and what it must not do."""

import math
from collections.abc import Callable, Iterable

import torch

from .calibration import Statistics
from .criteria import Criterion, ScoreInputs
from .structures.members import Place
from .targets import Target


def score_inputs(target: Target, statistics: Statistics | None, seed: int = 0) -> ScoreInputs:
    """What a criterion is told of a target."""
    own = {name: values[target.name] for name, values in (statistics or {}).items()}
    return ScoreInputs(target.name, target.weight.detach(), seed, own)


def weight_scores(target: Target, criterion: Criterion, statistics: Statistics | None, seed: int) -> torch.Tensor:
    """Scores of a target's weights, of the weight's shape.

    Raises:
        ValueError: if they have another shape, or if the criterion changed the weight.
        TypeError: if the criterion gives something that is not a tensor.
    """
    version = target.weight._version
    scores = criterion(score_inputs(target, statistics, seed))
    if target.weight._version != version:
        raise ValueError(f"the criterion changed {target.name!r} in place. It has to leave the weight as it is.")
    if not torch.is_tensor(scores):
        raise TypeError(f"the criterion gave {type(scores).__name__} for {target.name!r}; it has to give a tensor.")
    if scores.shape != target.weight.shape:
        raise ValueError(
            f"the criterion gave scores of shape {tuple(scores.shape)} for {target.name!r}, "
            f"which has shape {tuple(target.weight.shape)}."
        )
    return scores


def structure_scores(place: Place, scores_of: Callable[[str], torch.Tensor | None], pooling: str) -> torch.Tensor:
    """Scores of the structures in a place.

    Args:
        place: The place.
        scores_of: Name of a parameter → scores of its weights; None if they do not count.
        pooling: "sum" of the scores of a structure's weights, or their "norm", the root of their mean square.

    Returns:
        `[count]`, float64.
    """
    total, sizes = torch.zeros(2, place.count, dtype=torch.float64)
    for member in place.members:
        if (scores := scores_of(member.name)) is not None:
            total += member.pool(scores.double().square() if pooling == "norm" else scores, place.count)
            sizes += member.sizes(place.count)
    return (total / sizes).sqrt() if pooling == "norm" else total


@torch.no_grad()
def require_finite_weights(targets: Iterable[Target]) -> None:
    """Requires that every weight is a number.

    Raises:
        ValueError: if one is not; the message names the first tensor.
    """
    for target in targets:
        # One pass that makes no temporary: a NaN is both extremes, an infinity one of them.
        low, high = target.weight.aminmax() if target.weight.numel() else (0.0, 0.0)
        if not (math.isfinite(low) and math.isfinite(high)):
            count = target.weight.numel() - int(target.weight.isfinite().sum())
            raise ValueError(
                f"{count} of the {target.weight.numel()} weights of {target.name!r} are NaN or infinite. "
                "Has training diverged?"
            )
