"""What several processes know together."""

import contextlib
import pickle
from collections.abc import Iterator, Mapping
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


@contextlib.contextmanager
def failing_together(together: bool = True) -> Iterator[None]:
    """If what is done in it fails on one process, it fails on all: else the others would wait for it for ever.

    All processes raise the error of the first on which it fails. Nothing that is done in it may wait for other
    processes, but for what fails on all of them together. Unless the processes do it `together`, this does nothing.
    """
    if not together:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught if _can_be_sent(caught) else RuntimeError(f"{type(caught).__name__}: {caught}")
    if first := next((each for each in gather_from_processes(error) if each is not None), None):
        raise first from error


def require_agreement(values: Mapping[str, object], what: str) -> None:
    """Requires that all processes have the same values. All call it; `what` names them in the message.

    Where one differs from the first process, all processes raise the error. It names the first such value.
    """
    first, *others = gather_from_processes(dict(values))
    for rank, other in enumerate(others, start=1):
        if other != first:
            name = next(name for name in first | other if first.get(name) != other.get(name))
            raise ValueError(
                f"process {rank} has {what} of {name!r} other than process 0. What decides it must be the same "
                "everywhere: the weights, the seed, and what a criterion computes."
            )


def _can_be_sent(error: Exception) -> bool:
    """Whether other processes can be told of an error as it is."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return False
    return True


def _are_several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
