"""Shrinking: what is pruned as a whole is removed, and the model gets smaller."""

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..calibration.contexts import whole_on_error
from ..weights.targets import find_targets
from .channels import find_channels, is_convolutional
from .groups import StructureGroup, Structures, count_gone, fields_of, kept_in, kinds_of, nonzeros
from .heads_and_neurons import find_in_family
from .loading import WIDTHS, build_empty, can_say, record_shapes_

logger = logging.getLogger(__name__)

_LAYER_LISTS = ("layer_types", "attention_layers")  # Fields of a config with an entry for each layer.
_LAYER_NUMBERS = ("layer_idx", "layer_id")


def shrink(model: PreTrainedModel, masks: Mapping[str, torch.Tensor] | None = None) -> PreTrainedModel:
    """Removes the structures that are pruned as a whole: heads, neurons, channels and layers.

    The outputs stay what they are, up to rounding. The weights that remain are new tensors; an optimizer that was made
    before holds the old ones. The model's config says what the model is now, as far as a config of its family can.
    Everything else is recorded in it, and `from_pretrained` reads it where hf_prune has been imported. A model that is
    a part of another one no longer shares its config with it: save it, and load it, by itself.

    Args:
        model: The model, unwrapped; changed in place.
        masks: Parameter → bool mask, True = kept, such as `PruningTrainerCallback.masks`; if None, what is not zero
            is kept.

    Returns:
        The model.

    Raises:
        ValueError: if no structure is pruned as a whole, if all in one group are, or if the family is unknown. The
            model is then as it was.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from hf_prune import PruningConfig, prune
        >>> config = LlamaConfig(
        ...     vocab_size=8, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> model = LlamaForCausalLM(config)
        >>> prune(model, PruningConfig(sparsity=0.5, granularity="head+neuron")).units
        'heads and neurons'
        >>> shrink(model).model.layers[0].mlp.down_proj.in_features
        8
    """
    structures = find_removable(model)
    kept = kept_in(structures, nonzeros(structures) if masks is None else masks)
    if count_gone(structures, kept)[0] == 0:
        raise ValueError(
            "there is nothing to remove: no head, neuron, channel or layer is pruned as a whole. Prune with "
            "granularity head, neuron, head+neuron, channel or layer first."
        )
    remove_(model, structures, kept)
    return model


def find_removable(model: nn.Module) -> dict[str, StructureGroup]:
    """Finds all structures that `shrink` can remove from a model, of all kinds that can be removed from it.

    If there is no such kind, it raises what `find_in_family` and `find_channels` do.
    """
    if is_convolutional(model):
        return find_channels(model, find_targets(model, ".*"), multiple_of=1)
    targets, errors = find_targets(model), []
    structures: dict[str, StructureGroup] = {}
    for kind in ("head", "neuron", "layer"):
        try:
            structures |= find_in_family(model, (kind,), targets, multiple_of=1)
        except ValueError as error:  # What cannot be removed cannot have been pruned, and the other kinds can.
            logger.debug("No %s is removed: %s", kind, error)
            errors.append(error)
    if not structures:
        raise errors[0]
    return structures


@torch.no_grad()
def remove_(model: PreTrainedModel, structures: Structures, kept: Mapping[str, torch.Tensor]) -> None:
    """Removes structures from a model, in place; if nothing would be left of a group, the model stays as it was.

    Args:
        model: The model, unwrapped.
        structures: Every group of each kind of which something goes: the fields of a config count them all.
        kept: Group → `[count]` bools, False for what goes.

    Raises:
        ValueError: if nothing is left of a group.
    """
    layers = {name: group for name, group in structures.items() if group.kind == "layer"}
    gone = tuple(f"{stack}.{int(i)}." for stack in layers for i in (~kept[stack]).nonzero())
    parts = {
        name: group for name, group in structures.items() if name not in layers and not f"{name}.".startswith(gone)
    }
    for name, group in {**parts, **layers}.items():
        if not kept[name].any():
            raise ValueError(
                f"all {group.count} {group.kind}s of {name!r} are pruned; at least one has to stay. (A layer goes if "
                "all its weights are zero.)"
            )
        if not kept[name][list(group.stay)].all():
            raise ValueError(f"{group.kind} {group.stay[0]} of {name!r} is pruned, and makes what the others read.")
    build_empty(type(model), model.config)  # Else nothing could be recorded.
    with whole_on_error(model):
        _own_configs_(model)
        _remove_parts_(model, {name: group for name, group in parts.items() if not kept[name].all()}, kept)
        _say_widths_(model, parts, kept)
        for name, group in layers.items():
            if not kept[name].all():
                _remove_layers_(model, group, kept[name])
        record_shapes_(model)
        _forget_alignment_(model, {**parts, **layers}, kept)


def _own_configs_(model: PreTrainedModel) -> None:
    """Gives a model configs of its own: others may have been built from the same ones, and stay as they are."""
    copies: dict[int, Any] = {}  # What one config holds of another, as of its text part, it goes on holding.
    for module in model.modules():
        if isinstance(config := getattr(module, "config", None), PretrainedConfig):
            setattr(module, "config", copy.deepcopy(config, copies))  # noqa: B010


def _forget_alignment_(model: PreTrainedModel, structures: Structures, kept: Mapping[str, torch.Tensor]) -> None:
    """Whisper's timestamps of words come from some heads of its decoder, by their numbers."""
    settings: Any = getattr(model, "generation_config", None)
    changed = any(
        "decoder" in name and group.kind != "neuron" and not kept[name].all() for name, group in structures.items()
    )
    if changed and getattr(settings, "alignment_heads", None):
        settings.alignment_heads = None
        logger.warning("alignment_heads of the generation config is dropped: the decoder's heads have other numbers.")


def _remove_parts_(model: nn.Module, parts: Structures, kept: Mapping[str, torch.Tensor]) -> None:
    # Several groups may own positions of one axis, as of a layer that reads what others have put side by side.
    positions: dict[tuple[str, int], torch.Tensor] = {}
    for name, group in parts.items():
        for member in group.members:
            own = member.kept_positions(kept[name])
            positions[member.name, member.axis] = positions.get((member.name, member.axis), own) & own
    for (parameter_name, axis), stays in positions.items():
        path, _, attribute = parameter_name.rpartition(".")
        module, stay = model.get_submodule(path), stays.nonzero().flatten()
        parameter = getattr(module, attribute)  # Not the member's any more if it has lost another axis.
        values = parameter.detach().index_select(axis, stay.to(parameter.device))
        setattr(module, attribute, nn.Parameter(values, requires_grad=parameter.requires_grad))
        if attribute == "weight":
            _set_widths_(module, axis, stay)
    for name, group in parts.items():
        for path, attribute, each in group.attributes:
            setattr(model.get_submodule(path), attribute, each * int(kept[name].sum()))


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


def _say_widths_(model: PreTrainedModel, parts: Structures, kept: Mapping[str, torch.Tensor]) -> None:
    """Writes into the config how many heads and neurons there are, as far as it can say it."""
    for kind in kinds_of(parts):
        structures = {name: group for name, group in parts.items() if group.kind == kind}
        fields = fields_of(structures, {name: int(kept[name].sum()) for name in structures})
        if any(not kept[name].all() for name in structures) and can_say(model.config, fields):
            for config in _configs(model, model):
                _set_fields_(config, fields)


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
    for config in _configs(model, holder):
        _say_layers_(config, group, stay)
        if config is not model.config and hasattr(config, "num_layers"):  # So does a decoder of T5 call its own.
            config.num_layers = len(stay)


def _say_layers_(model_config: PretrainedConfig, group: StructureGroup, stay: Sequence[int]) -> None:
    """Writes into a config which layers there are."""
    for field in _LAYER_LISTS:
        entries = getattr(model_config, field, None)
        if isinstance(entries, list) and len(entries) == group.count:
            setattr(model_config, field, [entries[i] for i in stay])
            if field == "attention_layers":  # Of GPT-Neo, which derives them.
                model_config.attention_types = [[[entries[i]], 1] for i in stay]
    if hasattr(model_config, "stage_names"):  # Of a backbone, which gives the outputs of its last layer by default.
        model_config.stage_names = model_config.stage_names[: len(stay) + 1]
        model_config.set_output_features_output_indices(out_features=None, out_indices=None)
    _set_fields_(model_config, {field: len(stay) for field, _ in group.fields})


def _set_fields_(model_config: PretrainedConfig, fields: Mapping[str, int]) -> None:
    """Sets fields that belong together in a config that has some of them: of several parts, each has its own."""
    if any(hasattr(model_config, field) for field in fields):
        for field, value in fields.items():
            setattr(model_config, field, value)


def _configs(model: PreTrainedModel, module: nn.Module) -> list[PretrainedConfig]:
    """The config of a model, and the copies of it that modules below another one have."""
    configs = [model.config, *(getattr(each, "config", None) for each in module.modules())]
    return list({id(config): config for config in configs if isinstance(config, PretrainedConfig)}.values())
