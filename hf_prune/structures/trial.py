"""Trials: structures of networks that others have written, removed from a copy first."""

import copy
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from .comparing import Differs, Reference
from .experts import bar_pruned_
from .groups import KINDS, WITHOUT_STRUCTURES, StructureGroup, Structures, kinds_of
from .removal import Removal
from .shrinking import apply_compared_


def require_exact_on_a_copy(model: nn.Module, structures: Structures) -> None:
    """Requires that a copy of a model without half of its structures gives what it gives with zeros for them.

    Networks may count on their widths where no graph shows it: they split channels into parts of fixed lengths, or
    have a norm over a weight. Routers may share tokens out by the number of experts.

    Raises:
        ValueError: if the copy gives other outputs, or cannot be called.
    """
    kept = {name: _half_of(group) for name, group in structures.items()}
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


def _half_of(group: StructureGroup) -> torch.Tensor:
    """Which structures stay, if about half may go: the last ones of each run."""
    levels, each = group.counts_that_may_go(), group.count // group.runs
    return torch.arange(group.count) % each >= levels[len(levels) // 2] // group.runs
