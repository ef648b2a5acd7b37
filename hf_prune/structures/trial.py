"""Trials: what is removed is compared; structures that nobody has described, on a copy or a small model first."""

import copy
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..calibration.contexts import unpartitioned
from ..weights.targets import Target, find_targets
from .comparing import Differs, Reference
from .expert_neurons import find_expert_neurons
from .experts import bar_pruned_, find_experts
from .groups import KINDS, WITHOUT_STRUCTURES, StructureGroup, Structures, kinds_of
from .loading import recorded_in
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
    tried = cast(PreTrainedModel, copy.deepcopy(model))
    removal = Removal(tried, tried, structures, half_of_each(structures))
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
        with unpartitioned():
            small = small_model_like(model)
            # Where layers differ their shapes are recorded; of half of each a config may say it, and code may read it.
            for choose in (some_of_each, half_of_each):
                tried = copy.deepcopy(small)
                groups = _FOUND_BY_THEMSELVES[kind](tried, find_targets(tried))
                if (why := why_differs(tried, groups, choose(groups))) is not None:
                    return why
    except ValueError as error:
        return str(error)
    return None


def why_differs(
    model: PreTrainedModel,
    structures: Structures,
    kept: Mapping[str, torch.Tensor],
    *,
    is_said: bool = False,
    reference: Reference | None = None,
) -> str | None:
    """How the outputs of a model without some structures differ from those with zeros for them, or fail.

    Args:
        model: The model, which is changed.
        structures: Its structures.
        kept: Group → `[count]` bools, which of them stay.
        is_said: Whether the config has to say what is left; what has to be recorded beside it then counts too.
        reference: What it gives with zeros for them, if that is known.

    Returns:
        How; None if they are the same.
    """
    if all(bool(each.all()) for each in kept.values()):
        return "nothing of it can go"
    bar_pruned_(model, structures)
    removal = Removal(model, model, structures, kept)
    try:
        removal.require_some_left()
        apply_compared_(removal, reference or Reference(model, removal.masks, channels=removal.channels))
    except (Differs, ValueError) as error:
        return str(error)
    return "no config says what is left" if is_said and recorded_in(model.config) else None


def some_of_each(structures: Structures, *, uniform: bool = False) -> dict[str, torch.Tensor]:
    """All but the smallest number that may go; in every second group all but the second smallest, unless uniform."""
    kept = {}
    for i, (name, group) in enumerate(structures.items()):
        levels = group.counts_that_may_go()
        gone = levels[min(1 if uniform else 1 + i % 2, len(levels) - 1)]
        # From another position in each group, so that no order of structures goes unnoticed.
        kept[name] = group.without(gone, first=i % ((group.count - gone) // group.runs + 1))
    return kept


def half_of_each(structures: Structures) -> dict[str, torch.Tensor]:
    """All but half of what may go of each group."""
    kept = {}
    for name, group in structures.items():
        levels = group.counts_that_may_go()
        kept[name] = group.without(levels[len(levels) // 2])
    return kept
