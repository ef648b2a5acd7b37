"""Finding: the structures that a config prunes in a model."""

from collections.abc import Mapping
from typing import cast

from torch import nn
from transformers import PreTrainedModel

from .. import granularities
from ..config import PruningConfig
from ..granularities import Structural
from ..resolving import effective_scope
from ..weights.masks import MaskSet
from ..weights.targets import Target, find_targets
from .channels import find_channels, is_convolutional
from .groups import StructureGroup, Structures, fields_of, kinds_of, masks_of_zeros
from .heads_and_neurons import find_in_family
from .loading import can_say
from .ranking import count_left, pools_of, require_attainable


def find_structures(
    model: nn.Module, config: PruningConfig, targets: Mapping[str, Target]
) -> dict[str, StructureGroup]:
    """Finds the structures that a config prunes.

    Args:
        model: The model, unwrapped.
        config: The pruning config.
        targets: What `find_targets` found for it.

    Returns:
        Group → its structures, in the order of the layers; empty where the granularity is not one of structures.

    Raises:
        ValueError: as `find_in_family` and `find_channels` do, or if the model carries adapters.
    """
    granularity = granularities.parse(config.granularity)
    if not isinstance(granularity, Structural):
        return {}
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"this {type(model).__name__} carries adapters, whose matrices are as wide as the layers that they stand "
            "beside. Merge them first (merge_and_unload), or add them to the pruned model."
        )
    if granularity.kinds == ("channel",):
        return find_channels(model, targets, config.multiple_of)
    if is_convolutional(model):
        raise ValueError(
            f"{type(model).__name__} is a convolutional network and has no {config.granularity}s that are known. "
            "Choose granularity channel."
        )
    return find_in_family(model, granularity.kinds, targets, config.multiple_of)


def require_prunable(model: nn.Module, config: PruningConfig, structures: Structures) -> None:
    """Requires that structures can be pruned as a config asks.

    Args:
        model: The model, unwrapped.
        config: The pruning config.
        structures: What `find_structures` found; may be empty.

    Raises:
        ValueError: if a pattern of `layer_sparsity` matches no group, if the final sparsity would empty a group, or if
            `uniform` asks for what no config of the family can say.
    """
    if not structures or not config.round_sparsities:
        return
    config.require_layer_sparsity_matches(structures, "places of structures")
    if config.round_sparsities[-1] > 0:
        for kind in kinds_of(structures):
            of_kind = [group for group in structures.values() if group.kind == kind]
            if all(len(group.levels()) == 1 for group in of_kind):
                few = "one" if of_kind[0].multiple == 1 else f"{config.multiple_of} (multiple_of)"
                raise ValueError(f"no {kind} of {type(model).__name__} can go: no place has more than {few}.")
    if config.uniform:
        _require_uniform(model, config, structures)
    final, scope = config.round_sparsities[-1], effective_scope(config)
    for names, share in pools_of(structures, final, scope, config.sparsities_of(structures, final)):
        require_attainable({name: structures[name] for name in names}, share, {})


def zeros_of(model: nn.Module, targets: Mapping[str, Target], structures: Structures) -> MaskSet:
    """The masks of what is zero: of weights, or of whole structures where there are some."""
    return masks_of_zeros(structures) if structures else MaskSet.from_zeros(model, targets)


def held_zeros(model: nn.Module, targets: Mapping[str, Target], structures: Structures) -> MaskSet:
    """The masks that hold all zeros of the targets.

    Raises:
        ValueError: if whole structures are pruned, and zeros are in others.
    """
    masks = zeros_of(model, targets, structures)
    for name, mask in masks.items() if structures else ():
        if name in targets and bool(((targets[name].weight == 0) & mask).any()):
            kinds = " or ".join(f"{kind}s" for kind in kinds_of(structures))
            raise ValueError(
                f"the zeros of {targets[name].module!r} are not whole {kinds}. Start without hold_zeros, or choose "
                "another granularity."
            )
    return masks


def _require_uniform(model: nn.Module, config: PruningConfig, structures: Structures) -> None:
    """Requires that a config of the family can say what is left, and that all groups of a kind lose as many."""
    for kind in kinds_of(structures):
        of_kind = {name: group for name, group in structures.items() if group.kind == kind}
        left = {name: count_left(group, config.round_sparsities[-1]) for name, group in of_kind.items()}
        fields = fields_of(of_kind, left)
        counted = {field for group in of_kind.values() for field, _ in group.fields}
        if not all(group.fields for group in of_kind.values()) or not counted <= fields.keys():
            raise ValueError(
                f"uniform: no config of {type(model).__name__} can say fewer {kind}s. Leave uniform out: the shapes "
                "are then recorded in the config, and load where hf_prune is imported."
            )
        if not can_say(cast(PreTrainedModel, model).config, fields):
            said = ", ".join(f"{name}={value}" for name, value in fields.items())
            raise ValueError(
                f"uniform: no config of {type(model).__name__} can say {said}. Choose another sparsity, or leave "
                "uniform out."
            )
    everywhere = find_in_family(model, kinds_of(structures), find_targets(model), 1)
    if left_out := [name for name in everywhere if name not in structures]:
        raise ValueError(f"uniform: {', '.join(map(repr, left_out))} would keep all. Leave uniform out, or prune all.")
