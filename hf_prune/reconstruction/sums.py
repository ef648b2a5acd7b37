"""Sums: what the output of a projection becomes once the residual stream is added to it."""

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .dependencies import METADATA

_ADDITIONS = {
    torch.add, torch.Tensor.add, torch.Tensor.add_,
    torch.Tensor.__add__, torch.Tensor.__radd__, torch.Tensor.__iadd__,
}  # fmt: skip

_COPIES = {torch.clone, torch.Tensor.clone}  # Of what is cached.


class SumWatch(TorchFunctionMode):
    """A context that follows a tensor through additions of others of its shape, until something else is done with it.

    Args:
        on_end: Called once something else has read it.
    """

    def __init__(self, on_end: Callable[[], None]) -> None:
        super().__init__()
        self._on_end = on_end
        self._followed: torch.Tensor | None = None
        self._sum: torch.Tensor | None = None
        self.is_open = False

    def follow(self, tensor: torch.Tensor) -> None:
        """Begins with a tensor."""
        self._followed, self._sum, self.is_open = tensor, None, True

    def take(self) -> torch.Tensor | None:
        """The last sum, of the first tensor's shape up to views; None if nothing was added."""
        found, self._followed, self._sum, self.is_open = self._sum, None, None, False
        return found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function, and follows what it makes of the tensor."""
        kwargs = kwargs or {}
        followed = self._followed
        if not self.is_open or followed is None or func in METADATA or func in _COPIES:
            return func(*args, **kwargs)
        given = [value for value in pytree.tree_leaves((args, kwargs)) if torch.is_tensor(value)]
        if all(value is not followed for value in given):
            return func(*args, **kwargs)
        if func in _ADDITIONS and "alpha" not in kwargs and len(given) == 2 and given[0].shape == given[1].shape:
            self._followed = self._sum = func(*args, **kwargs)
            return self._sum
        output = func(*args, **kwargs)
        if not torch.is_tensor(output):
            return output
        if _is_same(output, followed):
            self._followed = output
            self._sum = None if self._sum is None else output
            return output
        self.is_open = False
        self._on_end()
        return output


def _is_same(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether one holds the same numbers in the same memory and order as another, such as a view of another shape."""
    return (
        tensor.data_ptr() == other.data_ptr()
        and tensor.numel() == other.numel()
        and tensor.dtype == other.dtype
        and tensor.is_contiguous()
        and other.is_contiguous()
    )
