"""Trials: channels of networks that others have written, removed from a copy first."""

import copy
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from .comparing import Differs, Reference
from .groups import WITHOUT_STRUCTURES, Structures
from .removal import Removal
from .shrinking import apply_compared_


def require_exact_on_a_copy(model: nn.Module, channels: Structures) -> None:
    """Requires that a copy of a network without half of its channels gives what it gives with zeros for them.

    Networks may count on their widths where no graph shows it: they split channels into parts of fixed lengths, or
    have a norm over a weight.

    Raises:
        ValueError: if the copy gives other outputs, or cannot be called.
    """
    kept = {}
    for name, group in channels.items():
        levels = group.counts_that_may_go()
        kept[name] = torch.arange(group.count) >= levels[len(levels) // 2]
    tried = cast(PreTrainedModel, copy.deepcopy(model))
    removal = Removal(tried, tried, channels, kept)
    try:
        apply_compared_(removal, Reference(tried, removal.masks))
    except (Differs, ValueError) as error:
        raise ValueError(
            f"channels cannot be removed from {type(model).__name__}: a copy without half of them fails ({error}). "
            f"Its code seems to rely on fixed widths. {WITHOUT_STRUCTURES}"
        ) from error
