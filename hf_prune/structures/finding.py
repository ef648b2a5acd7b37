"""Finding: the structures that are pruned in a model."""

import copy
from collections.abc import Mapping
from typing import cast

from torch import nn
from transformers import PreTrainedModel

from ..weights.masks import MaskSet
from ..weights.targets import Target, find_targets
from ..weights.timm import config_of_timm
from .by_kind import find_by_kind, require_no_adapters
from .channels import find_channels, is_convolutional
from .configs import set_fields_
from .groups import (
    KINDS,
    LEAST,
    StructureGroup,
    Structures,
    fields_of,
    kept_in,
    kinds_of,
    masks_of,
    nonzeros,
    parameters_of,
)
from .loading import build_empty, can_say
from .ranking import count_left, pools_of, require_attainable
from .removal import whole_of
from .trial import require_exact_on_a_copy, require_exact_on_a_small_model


def find_structures(
    model: nn.Module, kinds: tuple[str, ...], targets: Mapping[str, Target], multiple_of: int
) -> dict[str, StructureGroup]:
    """Finds the structures of some kinds, in the order of the layers, by the module that they are in.

    The kinds are some of `KINDS`. The number of neurons, channels or widths that remain is a multiple of
    `multiple_of`, or all.
    """
    require_no_adapters(model)
    if kinds == ("channel",):
        return find_channels(model, targets, multiple_of)
    if is_convolutional(model):
        raise ValueError(
            f"{type(model).__name__} is a convolutional network and has no "
            f"{' and '.join(KINDS[kind] for kind in kinds)} that are known. Choose granularity channel."
        )
    _require_no_side(model)
    return find_by_kind(model, kinds, targets, multiple_of, warns=True)


def _require_no_side(model: nn.Module) -> None:
    """Requires that a model is not one side of an encoder-decoder, with a copy of its config that is not saved."""
    if isinstance(model, PreTrainedModel) and getattr(model.config, "is_encoder_decoder", False):
        whole = whole_of(model)
        if whole.config is not model.config:
            raise ValueError(
                f"this {type(model).__name__} is one side of a {type(whole).__name__}, and has a config of its own "
                "that is not saved. Prune the whole. What is to stay is named in exclude_modules, such as 'decoder.*'."
            )


def require_removable(
    model: nn.Module, structures: Structures, final: float, scope: str, own: Mapping[str, float], *, uniform: bool
) -> None:
    """Requires that structures can be removed up to a final sparsity without emptying a module.

    Args:
        model: The model, unwrapped.
        structures: What `find_structures` found.
        final: Fraction of them that is to be gone in the end.
        scope: "global" or "layer".
        own: Module → its own final sparsity.
        uniform: Whether a config of the model's family has to say what is left.
    """
    if final > 0:
        for kind in kinds_of(structures):
            of_kind = [group for group in structures.values() if group.kind == kind]
            if all(len(group.counts_that_may_go()) == 1 for group in of_kind):
                few = "one" if of_kind[0].multiple == 1 else f"{of_kind[0].multiple} (multiple_of)"
                if (least := max(group.least for group in of_kind)) > 1:
                    few = f"the {least} that have to stay: {LEAST}"
                raise ValueError(f"no {kind} of {type(model).__name__} can go: no place has more than {few}.")
    if uniform:
        _require_uniform(model, structures, {name: own.get(name, final) for name in structures})
    # Networks of Transformers say in their config how many channels images have; of others less is known.
    if kinds_of(structures) == ["channel"] and (
        not hasattr(model.config, "num_channels") or any(map(config_of_timm, model.modules()))
    ):
        require_exact_on_a_copy(model, structures)
    for kind in kinds_of({name: group for name, group in structures.items() if _is_of_experts(group)}):
        require_exact_on_a_small_model(cast(PreTrainedModel, model), kind)
    for names, share in pools_of(structures, final, scope, own):
        require_attainable({name: structures[name] for name in names}, share, {})
    for group in structures.values():
        if group.kind == "width" and final > 0:
            left = {name: count_left(each, own.get(name, final)) for name, each in structures.items()}
            together = structures if scope == "layer" else {}  # Else nobody knows how many heads each layer keeps.
            _require_width(cast(PreTrainedModel, model), group, together, left)


def _require_width(
    model: PreTrainedModel, group: StructureGroup, together: Structures, left: Mapping[str, int]
) -> None:
    """Requires that a config can say how wide a model gets, alone or with the other kinds; and that it is exact."""
    if (whole := whole_of(model)) is not model:
        raise ValueError(
            f"this {type(model).__name__} is a part of a {type(whole).__name__}, whose other parts hand it what is as "
            "wide as it is. Widths go of a model that stands alone."
        )
    ways = [fields_of({group.name: group}, left), fields_of({group.name: group, **together}, left)]
    if not any(can_say(model.config, fields) for fields in ways):
        field = group.fields[0][0]
        raise ValueError(
            f"no config of {type(model).__name__} can say {field}={left[group.name]}: a multiple of its heads may be "
            "asked for. Choose another sparsity or multiple_of."
        )
    require_exact_on_a_small_model(model, "width")


def zeros_of(model: nn.Module, targets: Mapping[str, Target], structures: Structures) -> MaskSet:
    """The masks of what is zero: of weights, or of whole structures where there are some."""
    if not structures:
        return MaskSet.from_zeros(model, targets)
    return masks_of(structures, kept_in(structures, nonzeros(structures)))


def held_zeros(model: nn.Module, targets: Mapping[str, Target], structures: Structures) -> MaskSet:
    """The masks that hold all zeros of the targets, which have to be whole structures where these are pruned."""
    masks = zeros_of(model, targets, structures)
    for name, mask in masks.items() if structures else ():
        if name in targets and bool(((targets[name].weight == 0) & mask).any()):
            kinds = " or ".join(KINDS[kind] for kind in kinds_of(structures))
            raise ValueError(
                f"the zeros of {targets[name].module!r} are not whole {kinds}. Start without hold_zeros, or choose "
                "another granularity."
            )
    return masks


def _require_uniform(model: nn.Module, structures: Structures, gone: Mapping[str, float]) -> None:
    """Requires that a config of the family can say what is left, and that all groups of a kind lose as many."""
    said: dict[str, int] = {}
    for kind in kinds_of(structures):
        of_kind = {name: group for name, group in structures.items() if group.kind == kind}
        fields = fields_of(of_kind, {name: count_left(group, gone[name]) for name, group in of_kind.items()})
        counted = {field for group in of_kind.values() for field in (*dict(group.fields), *group.run_fields)}
        if not all(group.fields or group.run_fields for group in of_kind.values()) or not counted <= fields.keys():
            raise ValueError(
                f"uniform: no config of {type(model).__name__} can say fewer {KINDS[kind]}. Leave uniform out: the "
                "shapes are then recorded in the config, and load where hf_prune is imported."
            )
        if kind != "layer":  # Their number goes with lists that shrinking shortens too, so that it can be said.
            said |= fields
    # All together: a width may be one that the heads that are left divide, and those that there were do not.
    if not can_say(cast(PreTrainedModel, model).config, said):
        fields_said = ", ".join(f"{name}={value}" for name, value in said.items())
        raise ValueError(
            f"uniform: no config of {type(model).__name__} can say {fields_said}. Choose another sparsity, or leave "
            "uniform out."
        )
    in_layers = [kind for kind in kinds_of(structures) if kind != "width"]  # Widths are everywhere anyway.
    everywhere = find_by_kind(model, in_layers, find_targets(model), 1) if in_layers else {}
    if left_out := [name for name in everywhere if name not in structures]:
        raise ValueError(f"uniform: {', '.join(map(repr, left_out))} would keep all. Leave uniform out, or prune all.")
    _require_alone(cast(PreTrainedModel, model), structures, said)


def _require_alone(model: PreTrainedModel, structures: Structures, said: Mapping[str, int]) -> None:
    """Requires that fields of a config say nothing of what is not pruned, such as the width of shared experts."""
    config = copy.deepcopy(model.config)
    for each in (config, config.get_text_config()):
        set_fields_(each, said)
    built = {name: parameter.shape for name, parameter in build_empty(type(model), config).named_parameters()}
    owned = parameters_of(structures).keys()
    for name, parameter in model.named_parameters():
        if name not in owned and built.get(name, parameter.shape) != parameter.shape:
            values = ", ".join(f"{field}={value}" for field, value in said.items())
            raise ValueError(
                f"uniform: a config that says {values} would also give {name!r} another shape, which keeps its own. "
                "Leave uniform out: the shapes are then recorded in the config, and load where hf_prune is imported."
            )


def _is_of_experts(group: StructureGroup) -> bool:
    return group.kind == "expert" or (group.kind == "neuron" and group.runs > 1)
