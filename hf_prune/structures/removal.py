"""Removal: structures taken out of a model's tensors, its modules' numbers and its configs."""

import contextlib
import gc
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .configs import (
    configs_of,
    forget_each_layer_,
    own_configs_,
    write_each_layer_,
    write_layers_,
    write_widths_,
)
from .entries import keep_entries_
from .groups import KINDS, LEAST, StructureGroup, Structures, in_layers_that_stay, masks_of
from .loading import WIDTHS, build_empty, record_shapes_
from .norms import Rescaling

logger = logging.getLogger(__name__)

_LAYER_NUMBERS = ("layer_idx", "layer_id")


@dataclass(frozen=True, eq=False)
class Removal:
    """What goes of a model.

    Attributes:
        model: The model, unwrapped.
        whole: What is saved: the model, or the one that it is a part of.
        structures: Every group of each kind of which something goes: the fields of a config count them all.
        kept: Group → `[count]` bools, False for what goes.
    """

    model: PreTrainedModel
    whole: PreTrainedModel
    structures: Structures
    kept: Mapping[str, torch.Tensor]

    @property
    def gone(self) -> list[str]:
        """The groups of which something goes, but for those in layers that go themselves."""
        return [name for name in in_layers_that_stay(self.structures, self.kept) if not self.kept[name].all()]

    @property
    def masks(self) -> Mapping[str, torch.Tensor]:
        """Parameter → bool mask, False for what goes."""
        return masks_of(self.structures, self.kept)

    @property
    def channels(self) -> torch.Tensor | None:
        """Which channels of the residual stream stay, if some go."""
        return next((self.kept[name] for name in self.gone if self.structures[name].kind == "width"), None)

    def of(self, name: str) -> "Removal":
        """What goes of one group alone."""
        kept = {other: self.kept[name] if other == name else torch.ones_like(self.kept[other]) for other in self.kept}
        return Removal(self.model, self.whole, self.structures, kept)

    def require_some_left(self) -> None:
        """Requires that something stays of each group in layers that stay, and all that has to.

        Raises:
            ValueError: if not.
        """
        for name, group in in_layers_that_stay(self.structures, self.kept).items():
            left = int(self.kept[name].sum())
            if left == 0:
                raise ValueError(
                    f"all {group.count} {KINDS[group.kind]} of {name!r} are pruned; at least one has to stay. "
                    "(A layer goes if all its weights are zero.)"
                )
            if left < group.least:
                raise ValueError(
                    f"{left} of the {group.count} {KINDS[group.kind]} of {name!r} are left, and at least "
                    f"{group.least} have to stay: {LEAST}."
                )
            if not self.kept[name][list(group.stay)].all():
                raise ValueError(
                    f"{group.kind} {group.stay[0]} of {name!r} is pruned, and makes what the others read."
                )

    def apply_(self) -> PreTrainedModel:
        """Takes the structures out, and has the configs of the model and of the whole say or record what is left.

        Returns:
            What can be loaded then: the whole, or the model where no config builds the whole.
        """
        own_configs_(self.whole)
        forget_each_layer_(self.model.config)
        rescalings = {
            name: Rescaling.of(self.model, norms)
            for name in self.gone
            if (norms := self.structures[name].norms) is not None
        }
        groups, gone = in_layers_that_stay(self.structures, self.kept), self.gone
        widths = {name: group for name, group in groups.items() if group.kind != "layer"}
        _remove_parts_(self.model, {name: group for name, group in widths.items() if name in gone}, self.kept)
        write_widths_(self.model, widths, self.kept)
        for name, rescaling in rescalings.items():
            built = dict(build_empty(type(self.model), self.model.config).named_modules(remove_duplicate=False))
            left = int(self.kept[name].sum())
            rescaling.apply_(groups[name].count, left, configs_of(self.model, self.model), built)
        for name, group in groups.items():
            if group.kind == "layer" and name in gone:
                _remove_layers_(self.model, group, self.kept[name])
        write_each_layer_(self.model, groups, self.kept)
        record_shapes_(self.model)
        if self.whole is not self.model:
            with contextlib.suppress(ValueError):  # No config builds its class; its parts are saved one by one.
                record_shapes_(self.whole)
                return self.whole
        return self.model

    def forget_alignment_(self) -> None:
        """Whisper's timestamps of words come from some heads of its decoder, by their numbers."""
        settings: Any = getattr(self.model, "generation_config", None)
        changed = any("decoder" in name and self.structures[name].kind != "neuron" for name in self.gone)
        if changed and getattr(settings, "alignment_heads", None):
            settings.alignment_heads = None
            logger.warning(
                "alignment_heads of the generation config is dropped: the decoder's heads have other numbers."
            )


def whole_of(model: PreTrainedModel) -> PreTrainedModel:
    """The outermost model of Transformers that a model is a part of, as of a LLaVA; itself if it is a part of none.

    What is saved is the whole, by its own config.
    """
    # No module knows what it is a part of, but what refers to it, or to its config, tells whether it may be one.
    own = {id(vars(module)) for module in model.modules()} | {id(module) for module in model.modules()}
    referrers = [each for each in gc.get_referrers(model, model.config) if id(each) not in own]
    if not any(_holds_config(each, model.config) or _are_modules(each) for each in referrers):
        return model
    models = [each for each in gc.get_objects() if issubclass(type(each), PreTrainedModel)]
    holders = [each for each in models if any(module is model for module in each.modules())]
    # What was frozen (gc.freeze) is not listed, and may be the model itself.
    return max([model, *holders], key=lambda each: len(list(each.modules())))


def _are_modules(referrer: object) -> bool:
    """Whether an object may be what a module holds its submodules in."""
    return type(referrer) is dict and all(each is None or isinstance(each, nn.Module) for each in referrer.values())


def _holds_config(referrer: object, model_config: PretrainedConfig) -> bool:
    """Whether an object, or what has this as its attributes, is a model or a config with a config in it."""
    if issubclass(type(referrer), (PreTrainedModel, PretrainedConfig)):
        return True
    return type(referrer) is dict and (
        "_modules" in referrer or any(value is model_config for name, value in referrer.items() if name != "config")
    )


def _remove_parts_(model: nn.Module, parts: Structures, kept: Mapping[str, torch.Tensor]) -> None:
    # Several groups may own positions of one axis, as of a layer that reads what others have put side by side.
    positions: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
    for name, group in parts.items():
        for member in (*group.members, *group.buffers):
            if group.entries is not None and member.name.startswith(f"{group.entries}."):
                continue  # It goes, or stays, with its module.
            own = member.kept_positions(kept[name])
            positions[member.name, member.axes] = positions.get((member.name, member.axes), own) & own
    places: dict[torch.Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(parameter, []).append(name)
    # What goes of each expert is counted in all of them, and so goes before whole experts.
    for (name, axes), stays in sorted(positions.items(), key=lambda item: -len(item[0][1])):
        holder, _, attribute = name.rpartition(".")
        parameter = getattr(
            model.get_submodule(holder), attribute
        )  # Not the member's any more if it has lost another axis.
        values = _without(parameter.detach(), axes, stays.to(parameter.device))
        is_parameter = isinstance(parameter, nn.Parameter)
        smaller = nn.Parameter(values, parameter.requires_grad) if is_parameter else values
        places[smaller] = places.pop(parameter, [name])  # Several if tied, as embeddings and the projection to logits.
        for place in places[smaller]:
            path, _, attribute = place.rpartition(".")
            module = model.get_submodule(path)
            setattr(module, attribute, smaller)
            if attribute == "weight" and len(axes) == 1:
                _set_widths_(module, axes[0], stays.nonzero().flatten())
    for name, group in parts.items():
        left = int(kept[name].sum())
        if group.entries is not None:
            keep_entries_(model.get_submodule(group.entries), kept[name].nonzero().flatten().tolist())
        for path, attribute, each in group.attributes:
            setattr(model.get_submodule(path), attribute, each * left)
        runs = int(kept[name].view(group.runs, -1).any(1).sum())
        for path, attribute in group.run_attributes:
            setattr(model.get_submodule(path), attribute, left // runs)


def _without(values: torch.Tensor, axes: tuple[int, ...], stays: torch.Tensor) -> torch.Tensor:
    """Values without the positions along an axis that do not stay; of two axes, along the second, as many of each."""
    if len(axes) == 1:
        return values.index_select(axes[0], stays.nonzero().flatten())
    index = stays.nonzero()[:, 1].view(len(stays), -1)
    shape = [index.shape[axes.index(axis)] if axis in axes else 1 for axis in range(values.ndim)]
    return torch.take_along_dim(values, index.view(shape), axes[1])


def _set_widths_(module: nn.Module, axis: int, stay: torch.Tensor) -> None:
    """What a module knows of the length of an axis of its weight."""
    for kind, widths in WIDTHS.items():
        if isinstance(module, kind):
            setattr(module, widths[axis], len(stay))
    if isinstance(module, nn.Conv2d) and module.groups > 1:  # depthwise
        module.groups = module.in_channels = len(stay)
    if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
        for name in ("running_mean", "running_var"):
            setattr(module, name, getattr(module, name).index_select(0, stay.to(module.weight.device)))


def _remove_layers_(model: PreTrainedModel, group: StructureGroup, kept: torch.Tensor) -> None:
    path, _, attribute = group.name.rpartition(".")
    holder, stay = model.get_submodule(path), kept.nonzero().flatten().tolist()
    layers = getattr(holder, attribute)
    setattr(holder, attribute, nn.ModuleList(layers[i] for i in stay))
    for i, layer in enumerate(getattr(holder, attribute)):
        for module in layer.modules():
            for number in _LAYER_NUMBERS:
                if isinstance(getattr(module, number, None), int):
                    setattr(module, number, i)
    for config in configs_of(model, holder):
        write_layers_(config, group, stay)
        if config is not model.config and hasattr(config, "num_layers"):  # So does a decoder of T5 call its own.
            config.num_layers = len(stay)
