"""RMS norms over the residual stream: what they compute, and how they go on computing it when the stream narrows.

Of `w · x / √(mean(x²) + ε)` the mean is over `d` channels, of which those that go are zero. Over the `d′` that stay it
is larger by `d / d′`, so that `w · √(d / d′)` and `ε · d / d′` give the same outputs, exactly.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..calibration.contexts import eager_experts, undisturbed
from ..calibration.passes import call
from .example_inputs import example_batch

_TOLERANCE = 1e-4  # Relative. Norms compute in float32, whatever their weights are.
_SMALL = 1e-6  # A mean of squares that is small enough for ε to count.


@dataclass(frozen=True)
class Norm:
    """An RMS norm over structures.

    Attributes:
        module: Its path.
        shift: 1 where it multiplies with `1 + w`, else 0.
    """

    module: str
    shift: int


@dataclass(frozen=True)
class Norms:
    """All that has to be scaled when channels of the residual stream go.

    Attributes:
        norms: The norms over them.
        eps: `(module, attribute)` of what follows `field`, of other norms too.
        field: The field of the config that holds `ε`.
        scales: `(module, attribute)` of factors of embeddings that follow the width.
    """

    norms: tuple[Norm, ...]
    eps: tuple[tuple[str, str], ...]
    field: str
    scales: tuple[tuple[str, str], ...] = ()


def norm_of(path: str, module: nn.Module, width: int) -> tuple[Norm, str] | None:
    """An RMS norm and its attribute that holds `ε`, by what a module computes; None if it is no norm at all.

    Raises:
        ValueError: if it is another norm, or its `ε` is not known.
    """
    probe: Any = copy.deepcopy(module).to_empty(device="cpu").double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        inputs = torch.randn(4, width, generator=generator, dtype=torch.float64)
        try:
            given, moved, scaled = probe(inputs), probe(inputs + 3), probe(inputs * 2)
        except Exception:  # It takes something else, and is no norm.
            return None
        if not torch.is_tensor(given) or given.shape != inputs.shape or not _close(given, scaled):
            return None
        if _close(given, moved) or not hasattr(probe, "weight"):
            raise ValueError(
                f"{path!r} subtracts the mean over all channels, so that without some of them it computes something "
                "else. Only models with RMS norms can lose widths. Choose granularity head, neuron or layer."
            )
        small = inputs * math.sqrt(_SMALL)
        for name, value in vars(module).items():
            for shift in (0, 1) if isinstance(value, float) and 0 < value < 1 else ():
                found = [
                    (probe.weight + shift) * x / (x.square().mean(1, keepdim=True) + value).sqrt()
                    for x in (inputs, small)
                ]
                if _close(found[0], given) and _close(found[1], probe(small)):
                    return Norm(path, shift), name
    raise ValueError(f"{path!r} is a norm over all channels, and not x / √(mean(x²) + ε) by an ε that is known.")


def _close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found.double() - expected.double()).norm() <= _TOLERANCE * expected.double().norm())


@dataclass(frozen=True)
class Rescaling:
    """What keeps a model's outputs when channels of its residual stream go; made while the model can be called.

    Attributes:
        model: The model.
        norms: What has to be scaled.
        sources: The projections that feed other norms which follow the same field. These compute the same by a larger
            `ε` if what they are fed is larger too.
        last: The norm that comes last.
    """

    model: PreTrainedModel
    norms: Norms
    sources: tuple[nn.Linear, ...]
    last: str

    @classmethod
    def of(cls, model: PreTrainedModel, norms: Norms) -> "Rescaling":
        """Calls a model to see what feeds what.

        Raises:
            ValueError: if it cannot be called, or something else than one projection feeds a norm.
        """
        over_width = {norm.module for norm in norms.norms}
        others = [path for path, _ in norms.eps if path not in over_width]
        last = norms.norms[-1].module
        if not others and not norms.scales:
            return cls(model, norms, (), last)
        outputs: dict[nn.Linear, torch.Tensor] = {}
        inputs: dict[str, torch.Tensor] = {}
        order: list[str] = []
        hooks = [
            module.register_forward_hook(lambda module, _, output: outputs.update({module: output}))
            for module in model.modules()
            if isinstance(module, nn.Linear)
        ]
        for path in {*others, *over_width}:

            def note(_: nn.Module, args: Any, path: str = path) -> None:
                inputs[path] = args[0]
                order.append(path)

            hooks.append(model.get_submodule(path).register_forward_pre_hook(note))
        try:
            with undisturbed(model), eager_experts(model), torch.no_grad():
                call(model, example_batch(model) or {})
        finally:
            for hook in hooks:
                hook.remove()
        sources = []
        for path in others:
            if (fed := inputs.get(path)) is None:
                continue  # It is never called.
            of_tensors = {module: output for module, output in outputs.items() if torch.is_tensor(output)}
            by = [module for module, output in of_tensors.items() if output.data_ptr() == fed.data_ptr()]
            if len(by) != 1:
                raise ValueError(
                    f"{path!r} has its ε from {norms.field!r} of the config, as norms over the residual stream have, "
                    "and is fed by no projection that could be scaled in its place."
                )
            sources.append(by[0])
        return cls(model, norms, tuple(sources), next(p for p in reversed(order) if p in over_width))

    @torch.no_grad()
    def apply_(self, before: int, after: int, configs: list[Any], built: Mapping[str, nn.Module]) -> None:
        """Scales what has to be, after channels have gone.

        Args:
            before: How many there were.
            after: How many are left.
            configs: The model's configs.
            built: The modules that its config builds now, by path.
        """
        growth, model = before / after, self.model
        for norm in self.norms.norms:
            self._scale_norm_(norm, math.sqrt(growth))
        for module, attribute in self.norms.eps:
            found = model.get_submodule(module)
            setattr(found, attribute, getattr(found, attribute) * growth)
        for config in configs:
            if hasattr(config, self.norms.field):
                setattr(config, self.norms.field, getattr(config, self.norms.field) * growth)
        for source in dict.fromkeys(self.sources):
            for parameter in (source.weight, source.bias):
                if parameter is not None:
                    _multiply_(parameter, math.sqrt(growth))
        for path, attribute in self.norms.scales:
            self._unscale_(path, attribute, getattr(built[path], attribute))

    def _scale_norm_(self, norm: Norm, factor: float) -> None:
        weight: Any = self.model.get_submodule(norm.module).weight
        weight.copy_((weight.double() + norm.shift) * factor - norm.shift)

    def _unscale_(self, path: str, attribute: str, scale: float) -> None:
        """Gives embeddings the factor of their new width, and values that make up for it."""
        module: Any = self.model.get_submodule(path)
        held = [name for name, buffer in module._buffers.items() if name in attribute and buffer.numel() == 1]
        was = float(module._buffers[held[0]]) if held else getattr(module, attribute)
        setattr(module, attribute, scale)
        for name in held:
            module._buffers[name] = module._buffers[name].new_tensor(scale)
        now = float(module._buffers[held[0]]) if held else scale
        _multiply_(module.weight, was / now)
        output = self.model.get_output_embeddings()
        if output is not None and output.weight is module.weight:  # The last norm makes up for it once more.
            last = next(norm for norm in self.norms.norms if norm.module == self.last)
            self._scale_norm_(last, now / was)


def _multiply_(parameter: torch.Tensor, factor: float) -> None:
    parameter.copy_(parameter.double() * factor)
