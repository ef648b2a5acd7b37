"""What several processes know together."""

from typing import TypeVar

import torch
import torch.distributed

Value = TypeVar("Value")


def rank_and_size() -> tuple[int, int]:
    """The number of this process, from 0, and how many there are."""
    if not _are_several():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def sum_over_processes_(total: torch.Tensor) -> torch.Tensor:
    """Adds a tensor up over all processes, in place, and returns it."""
    if _are_several():
        torch.distributed.all_reduce(total)
    return total


def gather_from_processes(value: Value) -> list[Value]:
    """What each process gives, in their order, on each of them."""
    if not _are_several():
        return [value]
    gathered: list[Value] = [value] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def _are_several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
