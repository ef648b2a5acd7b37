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
from .groups import Place, Places, fields_of, kinds_of, masks_of_zeros
from .heads_and_neurons import find_in_family
from .loading import can_say
from .ranking import count_left, pools_of, require_attainable


def find_places(model: nn.Module, config: PruningConfig, targets: Mapping[str, Target]) -> dict[str, Place]:
    """Finds the structures that a config prunes.

    Args:
        model: The model, unwrapped.
        config: The pruning config.
        targets: What `find_targets` found for it.

    Returns:
        Place → its structures, in the order of the layers; empty where the granularity is not one of structures.

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


def require_prunable(model: nn.Module, config: PruningConfig, places: Places) -> None:
    """Requires that structures can be pruned as a config asks.

    Args:
        model: The model, unwrapped.
        config: The pruning config.
        places: What `find_places` found; may be empty.

    Raises:
        ValueError: if a pattern of `layer_sparsity` matches no place, if the final sparsity would empty a place, or if
            `uniform` asks for what no config of the family can say.
    """
    if not places or not config.round_sparsities:
        return
    config.require_layer_sparsity_matches(places, "places of structures")
    if config.round_sparsities[-1] > 0:
        for kind in kinds_of(places):
            of_kind = [place for place in places.values() if place.kind == kind]
            if all(len(place.levels()) == 1 for place in of_kind):
                few = "one" if of_kind[0].multiple == 1 else f"{config.multiple_of} (multiple_of)"
                raise ValueError(f"no {kind} of {type(model).__name__} can go: no place has more than {few}.")
    if config.uniform:
        _require_uniform(model, config, places)
    final, scope = config.round_sparsities[-1], effective_scope(config)
    for names, share in pools_of(places, final, scope, config.sparsities_of(places, final)):
        require_attainable({name: places[name] for name in names}, share, {})


def zeros_of(model: nn.Module, targets: Mapping[str, Target], places: Places) -> MaskSet:
    """The masks of what is zero: of weights, or of whole structures where there are some."""
    return masks_of_zeros(places) if places else MaskSet.from_zeros(model, targets)


def held_zeros(model: nn.Module, targets: Mapping[str, Target], places: Places) -> MaskSet:
    """The masks that hold all zeros of the targets.

    Raises:
        ValueError: if whole structures are pruned, and zeros are in others.
    """
    masks = zeros_of(model, targets, places)
    for name, mask in masks.items() if places else ():
        if name in targets and bool(((targets[name].weight == 0) & mask).any()):
            kinds = " or ".join(f"{kind}s" for kind in kinds_of(places))
            raise ValueError(
                f"the zeros of {targets[name].module!r} are not whole {kinds}. Start without hold_zeros, or choose "
                "another granularity."
            )
    return masks


def _require_uniform(model: nn.Module, config: PruningConfig, places: Places) -> None:
    """Requires that a config of the family can say what is left, and that all places of a kind lose as many."""
    for kind in kinds_of(places):
        of_kind = {name: place for name, place in places.items() if place.kind == kind}
        left = {name: count_left(place, config.round_sparsities[-1]) for name, place in of_kind.items()}
        fields = fields_of(of_kind, left)
        counted = {field for place in of_kind.values() for field, _ in place.fields}
        if not all(place.fields for place in of_kind.values()) or not counted <= fields.keys():
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
    everywhere = find_in_family(model, kinds_of(places), find_targets(model), 1)
    if left_out := [name for name in everywhere if name not in places]:
        raise ValueError(f"uniform: {', '.join(map(repr, left_out))} would keep all. Leave uniform out, or prune all.")
