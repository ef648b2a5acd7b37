"""Tracing: which positions of a layer's parameters decide what each input of a projection is, by autograd."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .groups import NOBODY
from .layer import PROJECTIONS

_RELATIVE = 1e-13
"""Gradients below this, relative to the largest one of the same input or of the first two, are rounding errors."""

_WIDEST = 384
"""The widest input of a projection that is traced. In small models only what has no known name is wider."""

_LARGEST = 2**26
"""The most elements of gradients that are computed at once."""


@dataclass(frozen=True, eq=False)
class Owned:
    """What the inputs of one projection are computed from and nothing else needs.

    Attributes:
        columns: The projection, as its path from the layer.
        count: How many structures there are: sets of inputs that share nothing with each other but what all share.
        width: How many inputs each has; they lie one behind the other.
        owners: `(parameter's path from the layer, axis)` → `[length of the axis]`, the structure that owns each
            position, or `NOBODY`.
    """

    columns: str
    count: int
    width: int
    owners: Mapping[tuple[str, int], torch.Tensor]


def trace(layer: nn.Module, inputs: Mapping[str, torch.Tensor]) -> Iterator[Owned]:
    """What belongs to the inputs of each projection of a layer that has structures in front of it.

    Args:
        layer: The layer, whose parameters need gradients.
        inputs: Projection, as its path from the layer → what went into it, `[…, width]`, with its graph.
    """
    parameters = {name: parameter for name, parameter in layer.named_parameters() if parameter.requires_grad}
    size = sum(parameter.numel() for parameter in parameters.values())
    by_input: dict[int, dict[tuple[str, int], torch.Tensor]] = {}  # Queries, keys and values are projected from one.
    for path, value in inputs.items():
        width = value.shape[-1]
        if id(value) not in by_input:
            is_traced = 1 < width <= _WIDEST and width * size < _LARGEST
            by_input[id(value)] = _reached(value, parameters) if is_traced else {}
        reached = by_input[id(value)]
        if reached and (found := _divide(path, width, reached, layer)) is not None:
            yield found


def _reached(value: torch.Tensor, parameters: Mapping[str, nn.Parameter]) -> dict[tuple[str, int], torch.Tensor]:
    """`(parameter, axis)` → `[inputs, length of the axis]` bools: which input depends on which position."""
    width = value.shape[-1]
    first = _gradients(value, list(parameters.values()), torch.arange(min(2, width)))
    seen = {name: gradient for name, gradient in zip(parameters, first, strict=True) if gradient is not None}
    if not any(_differ(gradient) for gradient in seen.values() if gradient.ndim > 2):
        return {}  # Both depend on the same matrices: nothing can be divided.
    # What both depend on wholly, as neurons on the attention before them, is divided by nothing.
    divided = {name: parameters[name] for name, gradient in seen.items() if not gradient.all()}
    gradients = _gradients(value, list(divided.values()), torch.arange(width))
    sizes = {name: each.abs() for name, each in zip(divided, gradients, strict=True) if each is not None}
    largest = torch.stack([gradient.abs().amax() for gradient in seen.values()]).amax()
    # What cancels, as a bias of keys does in a softmax, leaves rounding errors.
    least = _RELATIVE * torch.stack([each.flatten(1).amax(1) for each in sizes.values()]).amax(0).clamp(min=largest)
    found = {}
    for name, size in sizes.items():
        is_reached = size > least.view(-1, *(1 for _ in size.shape[1:]))
        for axis in range(min(size.ndim - 1, 2)):
            others = [1 + each for each in range(size.ndim - 1) if each != axis]
            found[name, axis] = _any(is_reached, others)
    return {key: rows for key, rows in found.items() if rows.any()}


def _gradients(
    value: torch.Tensor, parameters: list[nn.Parameter], inputs: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    """For each parameter `[inputs, *shape]`: gradients of a random mean of some inputs, over everything else."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(value.shape[:-1], generator=generator, dtype=value.dtype)
    units = nn.functional.one_hot(inputs, value.shape[-1]).to(value.dtype)
    along = units.view(len(inputs), *(1 for _ in weights.shape), -1) * weights[None, ..., None]
    if not value.requires_grad:
        return (None,) * len(parameters)
    return torch.autograd.grad(value, parameters, along, retain_graph=True, allow_unused=True, is_grads_batched=True)


def _any(values: torch.Tensor, axes: list[int]) -> torch.Tensor:
    """`Tensor.any` over several axes, or over none."""
    for axis in sorted(axes, reverse=True):
        values = values.any(axis)
    return values


def _differ(gradient: torch.Tensor) -> bool:
    """Whether the first two inputs depend on different positions."""
    return not torch.equal(gradient[0] != 0, gradient[1] != 0)


def _divide(path: str, width: int, reached: Mapping[tuple[str, int], torch.Tensor], layer: nn.Module) -> Owned | None:
    """Divides inputs into structures; None if they are not equal runs."""
    shares = torch.eye(width, dtype=torch.float64)
    for (name, _), rows in reached.items():
        if isinstance(layer.get_submodule(name.rpartition(".")[0]), PROJECTIONS) and name.endswith("weight"):
            own = (rows & ~rows.all(0)).double()
            shares += own @ own.T
    connected = shares.bool()
    for _ in range(width.bit_length()):
        connected = (connected.double() @ connected.double()).bool()
    structure = connected.double().argmax(1)  # The first input of each.
    count = len(structure.unique())
    each = width // count
    if count < 2 or width % count or not torch.equal(structure, torch.arange(width) // each * each):
        return None
    owners = {}
    for key, rows in reached.items():
        by_structure = rows.view(count, each, -1).any(1)
        owner = torch.where(by_structure.sum(0) == 1, by_structure.double().argmax(0), NOBODY)
        if (owner != NOBODY).any():
            owners[key] = owner
    return Owned(path, count, each, owners)


class NoDeadNeurons(TorchFunctionMode):
    """A context in which ReLU is softplus: a neuron that no token excites has no gradients, and would not be found."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.relu, torch.relu_, torch.Tensor.relu, nn.functional.relu):
            return nn.functional.softplus(args[0])
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def inputs_of_projections(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, dict[str, torch.Tensor]]]:
    """Records what goes into each projection of some layers at its first call: layer → projection → input."""
    found: dict[str, dict[str, torch.Tensor]] = {name: {} for name in layers}
    with contextlib.ExitStack() as undo:
        for name, layer in layers.items():
            for path, module in layer.named_modules():
                if isinstance(module, PROJECTIONS):

                    def note(_: nn.Module, args: tuple[torch.Tensor, ...], name: str = name, path: str = path) -> None:
                        found[name].setdefault(path, args[0])

                    undo.callback(module.register_forward_pre_hook(note).remove)
        yield found
