"""Criteria: what a weight is worth. A criterion maps `ScoreInputs` to scores; higher = keep.

One more criterion is one more function here and one more line in `CRITERIA`; a user's own is any callable, handed to
`PruningTrainerCallback(config, criterion=…)` or `prune(…, criterion=…)`. What it needs beyond the weight, it declares
with `needs`.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

import torch

Pooling = Literal["sum", "norm"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)

Statistics = Mapping[str, Mapping[str, torch.Tensor]]
"""Name of a statistic → parameter → its values, in float32, of a shape that broadcasts with the weight's."""


@dataclass(frozen=True)
class ScoreInputs:
    """What a criterion sees of one targeted weight.

    Attributes:
        name: The parameter's name in the model.
        weight: The parameter's values, of the parameter's own shape, with what LoRA adapters add to them; not to be
            changed.
        seed: The run's seed, for criteria that draw random numbers.
        statistics: What the criterion has declared to need, by the names of
            `hf_prune.calibration.statistics.STATISTICS`, and "movement": float32, of a shape that broadcasts with the
            weight's.
    """

    name: str
    weight: torch.Tensor
    seed: int = 0
    statistics: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __getitem__(self, statistic: str) -> torch.Tensor:
        """A statistic of the weight.

        Raises:
            ValueError: if it was not gathered.
        """
        if statistic not in self.statistics:
            raise ValueError(
                f"the criterion reads the {statistic!r} of {self.name!r}, which nobody has gathered. "
                f"Declare it: put @needs({statistic!r}) of hf_prune.criteria above the function."
            )
        return self.statistics[statistic]


Criterion = Callable[[ScoreInputs], torch.Tensor]
"""`ScoreInputs` → scores of the weight's shape in float16, bfloat16, float32 or float64. It is called several times a
cut with the same inputs and must give the same scores."""


_Declared = TypeVar("_Declared", bound=Callable[..., torch.Tensor])


def needs(
    *statistics: str,
    scope: str = "global",
    pooling: Pooling = "sum",
    elementwise: bool = False,
    kinds: tuple[str, ...] = (),
) -> Callable[[_Declared], _Declared]:
    """Declares which statistics a criterion reads, and what its scores are.

    Args:
        statistics: Keys of `hf_prune.calibration.statistics.STATISTICS`; or "movement", which only training gathers.
        scope: What `scope="auto"` means for it.
        pooling: What the score of a head, neuron, channel or layer is: the "sum" of those of its weights, as for
            what the loss changes by, or their "norm", `√(mean of squares)`, which does not grow with their number.
        elementwise: Whether the score of a weight is computed from this weight and what broadcasts to it alone. Each
            process then scores its own rows of a sharded weight; else the weight is gathered on all of them.
        kinds: Kinds of structures, where it is not weights that it scores, but these as a whole: it then maps
            `StructureInputs` to one score for each, and statistics are those of
            `hf_prune.structures.statistics.STRUCTURE_STATISTICS`.

    Returns:
        A decorator that notes them at the function.

    Raises:
        ValueError: if there is no such pooling.

    Example:
        >>> @needs("gradient")
        ... def sensitivity(inputs):
        ...     return inputs["gradient"].abs()
        >>> needs_of(sensitivity)
        ('gradient',)
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}; got {pooling!r}.")

    def declare(criterion: Any) -> Any:
        criterion.needs, criterion.scope, criterion.pooling = statistics, scope, pooling
        criterion.elementwise, criterion.kinds = elementwise, kinds
        return criterion

    return declare


def needs_of(criterion: Callable[..., torch.Tensor]) -> tuple[str, ...]:
    """The statistics that a criterion has declared to read."""
    return getattr(criterion, "needs", ())


def scope_of(criterion: Callable[..., torch.Tensor]) -> str:
    """What `scope="auto"` means for a criterion."""
    return getattr(criterion, "scope", "global")


def pooling_of(criterion: Callable[..., torch.Tensor]) -> Pooling:
    """What the score of a structure is by a criterion, as `needs` says."""
    return getattr(criterion, "pooling", "sum")


def scored_kinds(criterion: Callable[..., torch.Tensor]) -> tuple[str, ...]:
    """The kinds of structures that a criterion scores as a whole, as `needs` says; none where it scores weights."""
    return getattr(criterion, "kinds", ())


def is_elementwise(criterion: Callable[..., torch.Tensor]) -> bool:
    """Whether a criterion scores each weight by itself, as `needs` says."""
    return getattr(criterion, "elementwise", False)


@needs(pooling="norm", elementwise=True)
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


@needs("gradient", elementwise=True)
def taylor(inputs: ScoreInputs) -> torch.Tensor:
    """What the loss changes by, to first order, when the weight is zeroed: `|w · ∂L/∂w|`.

    Args:
        inputs: `weight` and `gradient` are used.

    Returns:
        Scores of the weight's shape, float32 (float64 for a float64 weight), `≥ 0`.

    Example:
        >>> gradient = torch.tensor([0.1, -2.0])
        >>> taylor(ScoreInputs("a", torch.tensor([-2.0, 0.5]), statistics={"gradient": gradient}))
        tensor([0.2000, 1.0000])

    Source: Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", arXiv 1906.10771, eq. 8.
    """
    return (inputs.weight * inputs["gradient"]).abs()


@needs("squared_gradient", elementwise=True)
def fisher(inputs: ScoreInputs) -> torch.Tensor:
    """What the loss changes by, to second order, by the diagonal empirical Fisher information: `w² · E[g²] / 2`.

    `g` is the gradient of a single sample's loss, and the expectation goes over samples: the square of a batch's mean
    gradient is another number, and smaller.

    Args:
        inputs: `weight` and `squared_gradient` are used.

    Returns:
        Scores of the weight's shape, float32 (float64 for a float64 weight), `≥ 0`.

    Example:
        >>> squares = torch.tensor([0.5, 4.0])
        >>> fisher(ScoreInputs("a", torch.tensor([-2.0, 0.5]), statistics={"squared_gradient": squares}))
        tensor([1.0000, 0.5000])

    Source: LeCun et al. 1989, "Optimal Brain Damage", with the Fisher information for the Hessian as in Theis et al.
    2018, "Faster gaze prediction with dense networks and Fisher pruning", arXiv 1801.05787.
    """
    weight = inputs.weight.to(torch.promote_types(inputs.weight.dtype, torch.float32))
    return weight.square() * inputs["squared_gradient"] / 2


@needs("movement", elementwise=True)
def movement(inputs: ScoreInputs) -> torch.Tensor:
    """Weights that training moves away from zero matter, however small they are: `−Σ w · ∂L/∂w` over its steps.

    Only `PruningTrainerCallback` gathers it, over all optimizer steps of the run up to the cut, with gradients as they
    are after clipping; so `begin` has to leave some steps before the first cut. In float16 without clipping
    (`max_grad_norm=0`) they would carry the loss scale, which changes in the run: leave clipping on.

    Args:
        inputs: `movement` is used.

    Returns:
        Scores of the weight's shape, float32, of any sign.

    Source: Sanh et al. 2020, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", arXiv 2005.07683.
    """
    return inputs["movement"]


@needs("input_norm", scope="row", elementwise=True)
def wanda(inputs: ScoreInputs) -> torch.Tensor:
    """A weight matters as much as what it is multiplied with: `|w_ij| · ‖x_j‖₂`, compared within a row.

    Args:
        inputs: `weight` and `input_norm` are used.

    Returns:
        Scores of the weight's shape, float32 (float64 for a float64 weight), `≥ 0`.

    Example:
        >>> norm = torch.tensor([[1.0, 10.0]])
        >>> wanda(ScoreInputs("a", torch.tensor([[-2.0, 0.5]]), statistics={"input_norm": norm}))
        tensor([[2., 5.]])

    Source: Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695.
    """
    return inputs.weight.abs() * inputs["input_norm"]


@needs("gradient", elementwise=True)
def snip(inputs: ScoreInputs) -> torch.Tensor:
    """Connection sensitivity: `|∂L/∂c|` of a gate `c = 1` on each weight, which is `|w · ∂L/∂w|`.

    The paper divides by the sum over all weights, which changes no order. It ranks as `taylor` does; the idea was to
    prune once, before any training.

    Args:
        inputs: `weight` and `gradient` are used.

    Returns:
        Scores of the weight's shape, float32 (float64 for a float64 weight), `≥ 0`.

    Source: Lee et al. 2018, "SNIP: Single-shot Network Pruning based on Connection Sensitivity", arXiv 1810.02340.
    """
    return taylor(inputs)


def lamp(inputs: ScoreInputs) -> torch.Tensor:
    """Magnitude that layers can be compared by: `w² / Σ w'²` over the weights `w'` of the layer from `w` up.

    Of weights that are equally large the later one counts as larger.

    The largest weight of each layer has the score 1, so that no layer is emptied.

    Args:
        inputs: `weight` is used.

    Returns:
        Scores of the weight's shape, float64, in `[0, 1]`.

    Example:
        >>> lamp(ScoreInputs("a", torch.tensor([1.0, -2.0, 0.0])))
        tensor([0.2000, 1.0000, 0.0000], dtype=torch.float64)

    Source: Lee et al. 2020, "Layer-adaptive sparsity for the Magnitude-based Pruning", arXiv 2010.07611.
    """
    squares, order = inputs.weight.double().square().flatten().sort(stable=True)
    # On the CPU: CUDA adds up in an order that changes from call to call.
    rest = squares.flip(0).cpu().cumsum(0).flip(0).to(squares.device)
    scores = torch.zeros_like(squares).scatter_(0, order, squares / rest.clamp_min(torch.finfo(rest.dtype).tiny))
    return scores.view(inputs.weight.shape)


CRITERIA: dict[str, Criterion] = {
    "magnitude": magnitude,
    "random": random,
    "taylor": taylor,
    "fisher": fisher,
    "movement": movement,
    "wanda": wanda,
    "snip": snip,
    "lamp": lamp,
}

RECONSTRUCTIONS = {"sparsegpt": fisher}
"""Methods in place of a criterion that also change the weights that they keep (see `hf_prune.reconstruction`) → the
criterion by which they divide a sparsity among the layers, if all of them compete."""
