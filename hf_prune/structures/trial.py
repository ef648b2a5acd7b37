"""Trials: what is removed is compared; structures that nobody has described, on a copy or a small model first."""

import copy
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..weights.targets import Target, find_targets
from .comparing import Differs, Reference
from .expert_neurons import find_expert_neurons
from .experts import bar_pruned_, find_experts
from .groups import KINDS, WITHOUT_STRUCTURES, StructureGroup, Structures, kinds_of
from .removal import Removal
from .small_models import class_and_config, small_model_like
from .widths import find_width

_FOUND_BY_THEMSELVES: dict[str, Callable[[nn.Module, Mapping[str, Target]], dict[str, StructureGroup]]] = {
    "width": lambda model, targets: find_width(model, targets, 1),
    "expert": find_experts,
    "neuron": lambda model, targets: find_expert_neurons(model, targets, 1),  # Those of experts.
}
"""Kind → what finds its structures in a model of any family."""

_failures: dict[tuple[type[PreTrainedModel], str, str], str | None] = {}
_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@torch.no_grad()
def apply_compared_(removal: Removal, reference: Reference | None, *, load: bool = True) -> None:
    """Removes structures, and raises `Differs` if the outputs are others than those of the reference.

    Unless they are not to be loaded, those of what the config builds count too.
    """
    try:
        saved = removal.apply_()
    except _ERRORS as error:
        raise Differs(f"no config builds what is left ({type(error).__name__}: {error})") from error
    if reference is not None:
        reference.require_same(removal.model, saved if load else None)


def require_exact_on_a_copy(model: nn.Module, structures: Structures) -> None:
    """Requires that a copy of a model without half of its structures gives what it gives with zeros for them.

    Networks may count on their widths where no graph shows it: they split channels into parts of fixed lengths, or
    have a norm over a weight.

    Raises:
        ValueError: if the copy gives other outputs, or cannot be called.
    """
    levels = {name: group.counts_that_may_go() for name, group in structures.items()}
    kept = {name: group.without(levels[name][len(levels[name]) // 2]) for name, group in structures.items()}
    tried = cast(PreTrainedModel, copy.deepcopy(model))
    removal = Removal(tried, tried, structures, kept)
    try:
        apply_compared_(removal, Reference(tried, removal.masks))
    except (Differs, ValueError) as error:
        kinds = " and ".join(KINDS[kind] for kind in kinds_of(structures))
        raise ValueError(
            f"{kinds} cannot be removed from {type(model).__name__}: a copy without half of them fails ({error}). "
            f"Its code seems to rely on fixed widths. {WITHOUT_STRUCTURES}"
        ) from error


def require_exact_on_a_small_model(model: PreTrainedModel, kind: str) -> None:
    """Requires that a small model of the same class without some structures gives what it gives with zeros for them.

    A class may use its width where no attribute of a module shows it, as in what it multiplies logits with; and
    routers may share tokens out by the number of experts. What is found is kept for models of the same class and
    config.

    Args:
        model: The model, unwrapped; only its class, its config and the kinds of its layers are looked at.
        kind: "width", "expert", or "neuron" for those of experts.

    Raises:
        ValueError: if the small model gives other outputs, or cannot be built or called.
    """
    key = *class_and_config(model), kind
    if key not in _failures:
        _failures[key] = _why_not_exact(model, kind)
    if (why := _failures[key]) is not None:
        of_experts = " of experts" if kind == "neuron" else ""
        raise ValueError(
            f"{KINDS[kind]}{of_experts} cannot be removed from {type(model).__name__}: a small model of this class "
            f"without some of them fails ({why}). Choose another granularity."
        )


def _why_not_exact(model: PreTrainedModel, kind: str) -> str | None:
    """Why structures cannot be removed from a small model of a class; None if they can."""
    try:
        small = small_model_like(model)
        groups = _FOUND_BY_THEMSELVES[kind](small, find_targets(small))
        bar_pruned_(small, groups)
        removal = Removal(small, small, groups, some_of_each(groups))
        apply_compared_(removal, Reference(small, removal.masks, channels=removal.channels))
    except (Differs, ValueError) as error:
        return str(error)
    return None


def some_of_each(structures: Structures, *, uniform: bool = False) -> dict[str, torch.Tensor]:
    """What is kept if the fewest that may go do so, or in turn the second fewest: of all groups as many if uniform."""
    kept = {}
    for i, (name, group) in enumerate(structures.items()):
        levels = group.counts_that_may_go()
        gone = levels[min(1 if uniform else 1 + i % 2, len(levels) - 1)]
        # From another position in each group, so that no order of structures goes unnoticed.
        kept[name] = group.without(gone, first=i % ((group.count - gone) // group.runs + 1))
    return kept
