"""ZeRO: what DeepSpeed keeps of a parameter beside it, divided among processes.

This is a copy in float32, the master, from which each step makes the parameter anew, and the optimizer's state. At the
stages 1 and 2 parameters themselves are whole. DeepSpeed is imported only where it is in use.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn


def is_zero(parameter: torch.Tensor) -> bool:
    """Whether DeepSpeed keeps something of a parameter in partitions."""
    return hasattr(parameter, "_hp_mapping")


def has_zero(model: nn.Module) -> bool:
    """Whether DeepSpeed keeps something of a model's parameters in partitions."""
    return any(is_zero(parameter) for parameter in model.parameters())


@torch.no_grad()
def master_of(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter in the precision in which it is trained, whole; all processes call this."""
    if not is_zero(parameter):
        return parameter.detach()
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter)


@torch.no_grad()
def set_master_(parameter: torch.Tensor, values: torch.Tensor) -> None:
    """Gives a parameter other values, also in the precision in which it is trained."""
    parameter.copy_(values)
    if is_zero(parameter):
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, values.to(parameter.device))


@torch.no_grad()
def mask_master_(parameter: torch.Tensor, mask: torch.Tensor) -> None:
    """Zeroes pruned weights in what this process keeps of a parameter in the precision in which it is trained."""
    for fragment, kept in _fragments(parameter, mask):
        fragment.hp_fragment.mul_(kept.to(fragment.hp_fragment.device))


@torch.no_grad()
def mask_state_(parameter: torch.Tensor, mask: torch.Tensor) -> None:
    """Zeroes what the optimizer remembers of pruned weights on this process; all of it, where it is not finite."""
    for fragment, kept in _fragments(parameter, mask):
        remembered = (fragment.optim_fragment or {}).values()
        are_finite = all(value.isfinite().all() for value in remembered)
        for value in remembered:
            value.mul_(kept.to(value.device)) if are_finite else value.zero_()


@torch.no_grad()
def forget_(states: Iterable[dict[str, Any]]) -> None:
    """Has an optimizer forget everything, in place: DeepSpeed holds on to the tensors."""
    for state in states:
        for key, value in state.items():
            if torch.is_tensor(value):
                value.zero_()
            elif isinstance(value, int):
                state[key] = 0


def _fragments(parameter: torch.Tensor, mask: torch.Tensor) -> Iterator[tuple[Any, torch.Tensor]]:
    """What this process keeps of a parameter, if it keeps any, and the part of its mask, flat."""
    if is_zero(parameter) and (fragment := parameter._hp_mapping) is not None:  # type: ignore[attr-defined]
        held = fragment.lp_fragment_address
        yield fragment, mask.flatten().narrow(0, held.start, held.numel)
