"""Trials: what is removed is compared; structures that nobody has described, on a copy first."""

import copy
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..weights.targets import find_targets
from .comparing import Differs, Reference
from .experts import bar_pruned_
from .groups import KINDS, WITHOUT_STRUCTURES, Structures, kinds_of
from .removal import Removal
from .small_models import small_model_like
from .widths import find_width

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
    have a norm over a weight. Routers may share tokens out by the number of experts.

    Raises:
        ValueError: if the copy gives other outputs, or cannot be called.
    """
    levels = {name: group.counts_that_may_go() for name, group in structures.items()}
    kept = {name: group.without(levels[name][len(levels[name]) // 2]) for name, group in structures.items()}
    tried = cast(PreTrainedModel, copy.deepcopy(model))
    bar_pruned_(tried, structures)
    removal = Removal(tried, tried, structures, kept)
    try:
        apply_compared_(removal, Reference(tried, removal.masks))
    except (Differs, ValueError) as error:
        kinds = " and ".join(KINDS[kind] for kind in kinds_of(structures))
        raise ValueError(
            f"{kinds} cannot be removed from {type(model).__name__}: a copy without half of them fails ({error}). "
            f"Its code seems to rely on fixed widths. {WITHOUT_STRUCTURES}"
        ) from error


def require_width_exact_on_a_copy(model: nn.Module) -> None:
    """Requires that a small model of the same class without half of its width gives what it gives with zeros for it.

    A class may use its width where no attribute of a module shows it, as in what it multiplies logits with.

    Raises:
        ValueError: if the small model gives other outputs, or cannot be built or called.
    """
    advice = "Choose granularity head, query, neuron or layer."
    try:
        small = small_model_like(cast(PreTrainedModel, model))
        groups = find_width(small, find_targets(small), 1)
        kept = {name: torch.arange(group.count) % 2 == 0 for name, group in groups.items()}
        removal = Removal(small, small, groups, kept)
        apply_compared_(removal, Reference(small, removal.masks, channels=removal.channels))
    except (Differs, ValueError) as error:
        raise ValueError(
            f"widths cannot be removed from {type(model).__name__}: a small model of this class without half of them "
            f"fails ({error}). {advice}"
        ) from error
