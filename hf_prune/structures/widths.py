"""Widths: the channels of the residual stream, which go through the whole model.

Where they are, a class tells by itself: built twice without weights, by configs of two widths, the axes that differ
are theirs. No description of the family is needed.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..weights.targets import Target, find_targets
from .expert_neurons import least_multiple
from .groups import Member, StructureGroup, advice_for_wrappers
from .loading import WIDTHS, build_empty
from .norms import Norm, Norms, norm_of

_WIDTHS_OF_MODULES = {width for widths in WIDTHS.values() for width in widths}
_EMBEDDING_SCALES = ("scalar_embed_scale", "embed_scale")
_OTHERS = "Choose granularity head, query, neuron or layer."


def find_width(model: nn.Module, targets: Mapping[str, Target], multiple_of: int) -> dict[str, StructureGroup]:
    """Finds the channels of a model's residual stream, by the name of the embeddings.

    Args:
        model: The model, unwrapped.
        targets: The weights that may be pruned; the default ones have to be among them, since all are cut.
        multiple_of: The number of channels that remain is a multiple of this.

    Raises:
        ValueError: if no config says how wide the stream is; if a norm over it is none that can do without some
            channels; or if something in the model depends on its width in a way that is not known.
    """
    twins = _Twins.of(model)
    norms = dict(twins.norms())
    if left_out := [name for name in find_targets(model) if name not in targets]:
        raise ValueError(
            f"widths go through the whole model, and {left_out[0]!r} is no target. Leave target_modules and "
            "exclude_modules out."
        )
    embeddings, (attributes, scales) = twins.embeddings(), twins.attributes()
    fused = {target.weight.dtype for target in targets.values() if target.weight.ndim == 3}
    if scales and twins.model.get_output_embeddings() is None and getattr(model.config, "tie_word_embeddings", False):
        raise ValueError(
            f"{type(model).__name__} scales its embeddings by its width, and lacks the head that is tied to them and "
            "would be scaled too. Prune the model with its head."
        )
    group = StructureGroup(
        embeddings,
        "width",
        twins.width,
        tuple(twins.members()),
        multiple=math.lcm(multiple_of, *(least_multiple(twins.model, dtype) for dtype in fused)),
        attributes=attributes,
        fields=((twins.field, 1),),
        fixed=twins.fixed,
        norms=twins.scaled(norms, scales),
    )
    return {embeddings: group}


@dataclass(frozen=True)
class _Twins:
    """A model, and what its config builds: as it is, and twice as wide.

    Attributes:
        model: The model.
        field: The field of the config that says how wide it is.
        width: How wide it is.
        fixed: The field that says how wide heads are, if the config does not, and its value.
        same: What its config builds, without weights.
        wider: The same, twice as wide.
    """

    model: PreTrainedModel
    field: str
    width: int
    fixed: tuple[tuple[str, int], ...]
    same: PreTrainedModel
    wider: PreTrainedModel

    @classmethod
    def of(cls, model: nn.Module) -> "_Twins":
        if not isinstance(model, PreTrainedModel):
            raise ValueError(
                f"widths are those of a Transformers model, got {type(model).__name__}. {advice_for_wrappers(model)}"
            )
        config = model.config
        field = dict(getattr(config, "attribute_map", {})).get("hidden_size", "hidden_size")
        width = getattr(config, field, None)
        if not isinstance(width, int):
            raise ValueError(f"the config of {type(model).__name__} does not say in {field} how wide it is. {_OTHERS}")
        fixed: tuple[tuple[str, int], ...] = ()
        heads = getattr(config, "num_attention_heads", None)
        try:
            size = getattr(config, "head_dim", None)
        except RuntimeError as error:  # There is one for each layer.
            raise ValueError(
                f"the layers of {type(model).__name__} are of different widths: {error} {_OTHERS}"
            ) from error
        if isinstance(heads, int) and not size:
            fixed = (("head_dim", width // heads),)
        same, wider = (_build(model, config, {**dict(fixed), field: n}) for n in (width, 2 * width))
        return cls(model, field, width, fixed, same, wider)

    def embeddings(self) -> str:
        """The name of the embeddings, which begin the stream."""
        try:
            found = self.model.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            found = None
        if not isinstance(found, nn.Embedding) or found.embedding_dim != self.width:
            raise ValueError(
                f"{type(self.model).__name__} has no embeddings as wide as its config says in {self.field}. {_OTHERS}"
            )
        return next(name for name, module in self.model.named_modules() if module is found)

    def members(self) -> Iterator[Member]:
        """The axes that are as long as the stream is wide, of all parameters."""
        same, wider = (dict(each.named_parameters(remove_duplicate=False)) for each in (self.same, self.wider))
        for name, parameter in self.model.named_parameters():
            if name not in same:
                raise ValueError(
                    f"{type(self.model).__name__} has {name!r}, which its config does not build, so that it is not "
                    f"known whether it is as wide as the residual stream. {_OTHERS}"
                )
            for axis, lengths in enumerate(zip(same[name].shape, wider[name].shape, strict=True)):
                if lengths == (self.width, 2 * self.width):
                    yield Member(name, parameter, (axis,), torch.arange(self.width))
                elif lengths[0] != lengths[1]:
                    raise self._depends(name, *lengths)

    def attributes(self) -> tuple[tuple[tuple[str, str, int], ...], tuple[tuple[str, str], ...]]:
        """What modules count by the width, and the factors of embeddings that follow it.

        Raises:
            ValueError: if something else of a module depends on it.
        """
        counted, scales = [], []
        wider = dict(self.wider.named_modules(remove_duplicate=False))
        for path, module in self.same.named_modules(remove_duplicate=False):
            for name, value in vars(module).items():
                other = vars(wider[path]).get(name)
                if not isinstance(value, (int, float)) or value == other or name in _WIDTHS_OF_MODULES:
                    continue
                if (value, other) == (self.width, 2 * self.width):
                    counted.append((path, name, 1))
                elif name in _EMBEDDING_SCALES and isinstance(module, nn.Embedding):
                    scales.append((path, name))
                else:
                    raise self._depends(f"{path}.{name}", value, other)
            for name, buffer in module._buffers.items():
                other = wider[path]._buffers.get(name)
                if buffer is not None and (other is None or other.shape != buffer.shape):
                    raise self._depends(f"{path}.{name}", tuple(buffer.shape), other if other is None else other.shape)
        return tuple(counted), tuple(scales)

    def norms(self) -> Iterator[tuple[str, tuple[Norm, str]]]:
        """The norms over the stream, and their attributes that hold `ε`, by path."""
        wider = dict(self.wider.named_modules(remove_duplicate=False))
        for path, module in self.same.named_modules():
            weights = [getattr(each, "weight", None) for each in (module, wider[path])]
            lengths = [len(weight) for weight in weights if isinstance(weight, torch.Tensor) and weight.ndim == 1]
            is_over_width = lengths == [self.width, 2 * self.width]
            if is_over_width and (norm := norm_of(path, module, self.width)) is not None:
                yield path, norm

    def scaled(self, found: Mapping[str, tuple[Norm, str]], scales: tuple[tuple[str, str], ...]) -> Norms:
        """What is scaled when the stream narrows."""
        if not found:
            raise ValueError(f"{type(self.model).__name__} has no RMS norms over its residual stream. {_OTHERS}")
        held = {path: getattr(self.model.get_submodule(path), attribute) for path, (_, attribute) in found.items()}
        values = set(held.values())
        for field, value in vars(self.model.config).items():
            if isinstance(value, float) and values == {value}:
                eps = tuple(self._follows(field, value))
                if {(path, attribute) for path, (_, attribute) in found.items()} <= set(eps):
                    return Norms(tuple(norm for norm, _ in found.values()), eps, field, scales)
        path = next(iter(found))
        raise ValueError(
            f"no field of the config alone says the ε of {path!r} ({held[path]:g}), which has to be another one when "
            f"the residual stream narrows. {_OTHERS}"
        )

    def _follows(self, field: str, value: float) -> Iterator[tuple[str, str]]:
        """The attributes of modules that a field of the config sets."""
        other = _build(self.model, self.model.config, {field: 2 * value})
        modules = dict(other.named_modules(remove_duplicate=False))
        for path, module in self.same.named_modules():
            for name, own in vars(module).items():
                if isinstance(own, float) and own != vars(modules[path]).get(name):
                    yield path, name

    def _depends(self, what: str, value: object, other: object) -> ValueError:
        return ValueError(
            f"{what!r} of {type(self.model).__name__} depends on {self.field} ({value} at {self.width}, {other} at "
            f"{2 * self.width}) in a way that cannot be kept when the residual stream narrows. {_OTHERS}"
        )


def _build(model: PreTrainedModel, model_config: PretrainedConfig, changes: Mapping[str, Any]) -> PreTrainedModel:
    changed = copy.deepcopy(model_config)
    try:
        for name, value in changes.items():
            setattr(changed, name, value)
        return build_empty(type(model), changed)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        said = ", ".join(f"{name}={value}" for name, value in changes.items())
        raise ValueError(
            f"{type(model).__name__} cannot be built with {said} ({type(error).__name__}: {error}). {_OTHERS}"
        ) from error
