"""Trials: the channels of networks that others have written, which a copy of the network is tried without first."""

import copy
from collections.abc import Mapping
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..weights.targets import Target
from .channels import find_channels
from .groups import StructureGroup
from .shrinking import remove_


def find_channels_that_can_go(
    model: nn.Module, targets: Mapping[str, Target], multiple_of: int
) -> dict[str, StructureGroup]:
    """Finds channels as `find_channels` does, and requires that a copy gives the same outputs without half of them.

    Networks may count on their widths where no graph shows it: they split channels into parts of fixed lengths, or
    have a norm over a weight.

    Raises:
        ValueError: also if the copy gives other outputs, or none.
    """
    try:
        channels = find_channels(model, targets, multiple_of)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise _not_removable(model, f"they cannot be followed ({error}).") from error
    kept = {}
    for name, group in channels.items():
        levels = group.counts_that_may_go()
        kept[name] = torch.arange(group.count) >= levels[len(levels) // 2]
    try:
        remove_(cast(PreTrainedModel, copy.deepcopy(model)), channels, kept)
    except ValueError as error:
        raise _not_removable(model, f"of a copy without half of them, {error}") from error
    return channels


def _not_removable(model: nn.Module, why: str) -> ValueError:
    return ValueError(
        f"channels of this {type(model).__name__} cannot be removed: {why} Choose granularity unstructured, N:M or "
        "block:RxC."
    )
