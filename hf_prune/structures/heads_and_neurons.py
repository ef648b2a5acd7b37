"""Heads, queries, neurons and layers: where a model has them, by the table or found by themselves."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..weights.targets import Target
from .families import FAMILIES, HOW_TO_ADD, is_described
from .groups import KINDS, Member, StructureGroup, advice_for_wrappers
from .layer import PROJECTIONS
from .proof import NOTHING_FOUND, Proved, prove
from .stacks import LayerStack, stacks_of, structures_of


class NothingToPrune(ValueError):
    """A model has no structures of a kind, or none whose weights are all targets."""


def find_in_family(
    model: nn.Module, kinds: Collection[str], targets: Mapping[str, Target], multiple_of: int
) -> dict[str, StructureGroup]:
    """Finds the structures of some kinds in a model, by name, in the order of the layers.

    Args:
        model: The model, unwrapped.
        kinds: Of "head", "query", "neuron" and "layer".
        targets: The weights that may be pruned; a structure stays that has a matrix which is none of them.
        multiple_of: The number of neurons that remain in a layer is a multiple of this.

    Raises:
        ValueError: if the family is in no table, and its structures could not be found, or not be removed from a
            small model of the class; if it does not look as described; if layers share weights; if the number of
            query heads is no multiple of that of key-value heads, or the same and queries are asked for; or if layers
            cannot be left out.
    """
    everything = structures_of(_stacks(model, kinds), kinds, multiple_of)
    found = {}
    for name, group in everything.items():
        others = [m for m in _matrices(model, group) if m.name not in targets]
        if group.kind == "layer":
            stay = sorted({*group.stay, *(int(m.owners[0]) for m in others)})
            found[name] = dataclasses.replace(group, stay=tuple(stay))
        elif not others:
            found[name] = group
    if all(len(group.stay) == group.count for group in found.values()):
        raise NothingToPrune(
            f"no {' or '.join(kinds)} of {type(model).__name__} is left to prune. It is left alone if one of its "
            "projections is no target. Name all of them in target_modules, or leave that out."
        )
    return found


def _stacks(model: nn.Module, kinds: Collection[str]) -> list[LayerStack]:
    """The stacks of a model: where the table has them, or where they were found, or described, and proved."""
    config: Any = getattr(model, "config", None)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"heads, neurons and layers are those of a Transformers model, got {type(model).__name__}. "
            f"{advice_for_wrappers(model)}"
        )
    family = FAMILIES.get(config.model_type)
    if family is not None and not is_described(config.model_type):
        return stacks_of(model, family)
    proved = prove(model, family)
    _require_proved(model, proved, kinds)
    return stacks_of(model, proved.family)


def _require_proved(model: PreTrainedModel, proved: Proved, kinds: Collection[str]) -> None:
    """Requires that the structures of some kinds were found, and removed from a small model."""
    model_type, name = model.config.model_type, type(model).__name__
    refused = {kind: proved.refused[kind] for kind in kinds if kind in proved.refused}
    if not refused and proved.family:
        return
    kind, why = next(iter(refused.items()), ("layer", proved.refused.get("layer", "")))
    error = NothingToPrune if why == NOTHING_FOUND else ValueError
    advice = HOW_TO_ADD.format(model_type)
    if is_described(model_type):
        advice = "Name in describe_family all projections, and what counts them; or nothing, to have them found."
    if not proved.family:
        raise error(
            f"hf_prune does not know where the family {model_type!r} has its heads, neurons and layers, and could not "
            f"find them: {why}. It knows {', '.join(FAMILIES)}. {HOW_TO_ADD.format(model_type)}"
        )
    raise error(
        f"{KINDS[kind]} cannot be removed from {name}, as a small model of its class shows: {why}. Choose another "
        f"granularity. {advice}"
    )


def _matrices(model: nn.Module, structures: StructureGroup) -> list[Member]:
    """The weights of projections of which structures own something."""
    holders = ((member, model.get_submodule(member.name.rpartition(".")[0])) for member in structures.members)
    return [m for m, holder in holders if m.parameter.ndim > 1 and isinstance(holder, PROJECTIONS)]
