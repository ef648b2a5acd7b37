"""Shrinking: what is pruned as a whole is removed, and the model gets smaller."""

import contextlib
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..calibration.contexts import whole_on_error
from ..weights.targets import find_targets
from .channels import find_channels, is_convolutional
from .comparing import Differs, Reference, why_not_generated
from .configs import configs_of, own_configs_, say_layers_, say_widths_, whole_of
from .groups import StructureGroup, Structures, count_gone, kept_in, masks_of, nonzeros
from .heads_and_neurons import find_in_family
from .loading import WIDTHS, build_empty, record_shapes_

logger = logging.getLogger(__name__)

_LAYER_NUMBERS = ("layer_idx", "layer_id")


def shrink(
    model: PreTrainedModel,
    masks: Mapping[str, torch.Tensor] | None = None,
    *,
    batch: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Removes the structures that are pruned as a whole: heads, neurons, channels and layers.

    The outputs stay what they are, up to rounding: on a small batch they are compared, also with those of the model
    that its config would build. The weights that remain are new tensors; an optimizer that was made before holds the
    old ones. The model's config says what the model is now, as far as a config of its family can. Everything else is
    recorded in it, and `from_pretrained` reads it where hf_prune has been imported. Of a model that is a part of
    another one, such as the language model of a LLaVA, the config of the whole says or records it too.

    Args:
        model: The model, unwrapped; changed in place.
        masks: Parameter → bool mask, True = kept, such as `PruningTrainerCallback.masks`; if None, what is not zero
            is kept.
        batch: What the model is called with to compare outputs, where none can be made from its config.

    Returns:
        The model.

    Raises:
        ValueError: if no structure is pruned as a whole, if all in one group are, if the family is unknown, or if the
            outputs would be others, because the family is described wrongly. The model is then as it was.

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
    remove_(model, structures, kept, batch)
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
def remove_(
    model: PreTrainedModel,
    structures: Structures,
    kept: Mapping[str, torch.Tensor],
    batch: Mapping[str, Any] | None = None,
) -> None:
    """Removes structures from a model, in place, and requires that it computes what it did with them at zero.

    Args:
        model: The model, unwrapped.
        structures: Every group of each kind of which something goes: the fields of a config count them all.
        kept: Group → `[count]` bools, False for what goes.
        batch: As in `shrink`.

    Raises:
        ValueError: if nothing is left of a group, or the outputs are others. The model is then as it was.
    """
    _require_some_left(structures, kept)
    build_empty(type(model), model.config)  # Else nothing could be recorded.
    whole = whole_of(model)
    layers_go = any(group.kind == "layer" and not kept[name].all() for name, group in structures.items())
    could_generate = layers_go and why_not_generated(model) is None
    try:
        _remove_compared_(model, whole, structures, kept, batch)
    except Differs as error:
        culprit = _first_that_differs(model, whole, structures, kept, batch)
        doubt = (
            f"Does what is said of the family {model.config.model_type!r} fit this model, and does describe_family "
            "name all that goes with one?"
        )
        if is_convolutional(model):
            doubt = "It counts on its widths where torch-pruning sees nothing of it."
        raise ValueError(
            f"{culprit} of {type(model).__name__} cannot be removed: {error}. {doubt} The model is as it was."
        ) from error
    if could_generate and (why := why_not_generated(model)):
        logger.warning(
            "%s cannot generate any more with the layers that are left, though it can be called: %s. Some versions of "
            "Transformers make a cache by the number of the encoder's layers "
            "(https://github.com/huggingface/transformers/issues/30508). Generate with use_cache=False, or prune "
            "heads and neurons instead.",
            type(model).__name__, why,
        )  # fmt: skip
    _forget_alignment_(model, structures, kept)


def _remove_compared_(
    model: PreTrainedModel,
    whole: PreTrainedModel,
    structures: Structures,
    kept: Mapping[str, torch.Tensor],
    batch: Mapping[str, Any] | None,
) -> None:
    """Removes structures and compares outputs; raises `Differs`, with the model as it was, if they are others."""
    reference = None
    try:
        reference = Reference(model, masks_of(structures, kept), batch)
    except ValueError as error:
        logger.warning("Whether the shrunk model has the outputs of the masked one could not be seen: %s", error)
    with whole_on_error(whole):
        saved = _remove_(model, whole, structures, kept)
        if reference is not None:
            reference.require_same(model, saved)


def _first_that_differs(
    model: PreTrainedModel,
    whole: PreTrainedModel,
    structures: Structures,
    kept: Mapping[str, torch.Tensor],
    batch: Mapping[str, Any] | None,
) -> str:
    """The first group without which, by itself, a model has other outputs; the model stays as it is."""
    for name in [name for name in structures if not kept[name].all()]:
        alone = {other: kept[name] if other == name else torch.ones_like(kept[other]) for other in structures}
        try:
            with contextlib.suppress(_Undone), whole_on_error(whole):
                _remove_compared_(model, whole, structures, alone, batch)
                raise _Undone
        except Differs:
            return f"a {structures[name].kind} of {name!r}"
    return "what is pruned"


class _Undone(Exception):
    """Ends a trial that went well."""


def _require_some_left(structures: Structures, kept: Mapping[str, torch.Tensor]) -> None:
    """Requires that something is left of each group in layers that stay, and all that has to."""
    for name, group in _in_layers_that_stay(structures, kept).items():
        if not kept[name].any():
            raise ValueError(
                f"all {group.count} {group.kind}s of {name!r} are pruned; at least one has to stay. (A layer goes if "
                "all its weights are zero.)"
            )
        if not kept[name][list(group.stay)].all():
            raise ValueError(f"{group.kind} {group.stay[0]} of {name!r} is pruned, and makes what the others read.")


def _in_layers_that_stay(structures: Structures, kept: Mapping[str, torch.Tensor]) -> dict[str, StructureGroup]:
    """The groups that are in no layer that goes; layers come last."""
    layers = [name for name, group in structures.items() if group.kind == "layer"]
    gone = tuple(f"{stack}.{int(i)}." for stack in layers for i in (~kept[stack]).nonzero())
    inside = [name for name in structures if name not in layers and not f"{name}.".startswith(gone)]
    return {name: structures[name] for name in (*inside, *layers)}


def _remove_(
    model: PreTrainedModel, whole: PreTrainedModel, structures: Structures, kept: Mapping[str, torch.Tensor]
) -> PreTrainedModel:
    """Removes structures, and has the configs of the model and of the whole say or record what is left.

    Returns:
        What can be loaded then: the model that it is a part of, or itself.
    """
    groups = _in_layers_that_stay(structures, kept)
    own_configs_(whole)
    widths = {name: group for name, group in groups.items() if group.kind != "layer"}
    _remove_parts_(model, {name: group for name, group in widths.items() if not kept[name].all()}, kept)
    say_widths_(model, widths, kept)
    for name, group in groups.items():
        if group.kind == "layer" and not kept[name].all():
            _remove_layers_(model, group, kept[name])
    record_shapes_(model)
    if whole is not model:
        with contextlib.suppress(ValueError):  # Of a class that no config builds, whose parts are saved one by one.
            record_shapes_(whole)
            return whole
    return model


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
        say_layers_(config, group, stay)
        if config is not model.config and hasattr(config, "num_layers"):  # So does a decoder of T5 call its own.
            config.num_layers = len(stay)
