"""Trials: the channels of networks that others have written, which a copy of the network is tried without first."""

import copy
from collections.abc import Mapping
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..calibration.contexts import undisturbed
from ..weights.targets import Target
from .channels import find_channels, image_for, outputs_of
from .groups import StructureGroup, Structures, masks_of
from .shrinking import remove_

_TOLERANCE = 1e-3  # of the largest output: rounding is far below it, and a channel that is missed is far above
_ERRORS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


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
        raise _not_removable(model, f"they cannot be followed ({error})") from error
    if why := _difference(cast(PreTrainedModel, copy.deepcopy(model).float()), channels):
        raise _not_removable(model, f"a copy without half of them {why}")
    return channels


def _difference(tried: PreTrainedModel, channels: Structures) -> str | None:
    """What a network does without half of its channels and not with zeros for them; None if that is nothing."""
    kept = {}
    for name, group in channels.items():
        levels = group.counts_that_may_go()
        kept[name] = torch.arange(group.count) >= levels[len(levels) // 2]
    with undisturbed(tried), torch.no_grad():
        masks_of(channels, kept).apply_(tried)
        image = torch.randn_like(image_for(tried))
        masked = outputs_of(tried(image))
        try:
            remove_(tried, channels, kept)
            without = outputs_of(tried(image))
        except _ERRORS as error:
            return f"cannot be called ({error})"
        for ours, theirs in zip(without, masked, strict=True):
            if ours.shape != theirs.shape or (ours - theirs).abs().max() > _TOLERANCE * theirs.abs().max():
                return "gives other outputs"
    return None


def _not_removable(model: nn.Module, why: str) -> ValueError:
    return ValueError(
        f"channels of this {type(model).__name__} cannot be removed: {why}. Choose granularity unstructured, N:M or "
        "block:RxC."
    )
