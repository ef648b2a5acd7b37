"""Criteria: what a weight is worth. A criterion maps `ScoreInputs` to scores; higher = keep.

One more criterion is one more function here and one more line in `CRITERIA`; a user's own is any callable, handed to
`PruningTrainerCallback(config, criterion=…)` or `prune(…, criterion=…)`.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ScoreInputs:
    """What a criterion sees of one targeted weight.

    Attributes:
        name: The parameter's name in the model.
        weight: The parameter's values, of the parameter's own shape; not to be changed.
        seed: The run's seed, for criteria that draw random numbers.
    """

    name: str
    weight: torch.Tensor
    seed: int = 0


Criterion = Callable[[ScoreInputs], torch.Tensor]
"""`ScoreInputs` → scores of the weight's shape in float16, bfloat16, float32 or float64. It is called several times a
cut with the same inputs and must give the same scores."""


def magnitude(inputs: ScoreInputs) -> torch.Tensor:
    """Large weights matter: `|w|`.

    Args:
        inputs: `weight` is used.

    Returns:
        Scores of the weight's shape and dtype, `≥ 0`.

    Example:
        >>> magnitude(ScoreInputs("layer.weight", torch.tensor([-2.0, 0.5])))
        tensor([2.0000, 0.5000])

    Source: Han et al. 2015, "Learning both Weights and Connections", arXiv 1506.02626.
    """
    return inputs.weight.abs()


def random(inputs: ScoreInputs) -> torch.Tensor:
    """No weight matters more than another: uniform on `[0, 1)`, the baseline that a criterion has to beat.

    The numbers depend on the seed and the parameter's name alone, so that every process, a resumed run and each pass
    of a selection see the same ones. They touch no global random state.

    Args:
        inputs: `name`, `seed` and the shape of `weight` are used.

    Returns:
        Scores of the weight's shape, float32, on the weight's device.

    Example:
        >>> weight = torch.zeros(3)
        >>> torch.equal(random(ScoreInputs("a", weight)), random(ScoreInputs("a", weight)))
        True
        >>> torch.equal(random(ScoreInputs("a", weight)), random(ScoreInputs("b", weight)))
        False
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{inputs.seed}:{inputs.name}".encode()))
    return torch.rand(inputs.weight.shape, generator=generator).to(inputs.weight.device)


CRITERIA: dict[str, Criterion] = {"magnitude": magnitude, "random": random}
