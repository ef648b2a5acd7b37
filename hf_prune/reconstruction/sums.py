"""Sums: what outputs of projections become once something is added to them, as a residual stream is."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .dependencies import METADATA

_ADDITIONS = {
    torch.add, torch.Tensor.add, torch.Tensor.add_,
    torch.Tensor.__add__, torch.Tensor.__radd__, torch.Tensor.__iadd__,
}  # fmt: skip
_VIEWS = {
    torch.reshape, torch.Tensor.reshape, torch.Tensor.view, torch.Tensor.contiguous, torch.Tensor.detach,
    torch.squeeze, torch.Tensor.squeeze, torch.unsqueeze, torch.Tensor.unsqueeze, torch.flatten, torch.Tensor.flatten,
    torch.Tensor.to, torch.Tensor.float, torch.Tensor.type_as, F.dropout, torch.dropout, torch.Tensor.view_as,
}  # fmt: skip
_COPIES = {torch.clone, torch.Tensor.clone}  # Of what is cached.


class SumWatch(TorchFunctionMode):
    """A context that follows tensors through additions of others of their shape, up to the first other use.

    Views and what changes nothing, such as dropout in evaluation mode, are no other use. What a module without
    children is given it uses, also where it does so by a kernel of its own, which is not seen.

    Args:
        on_end: Called before the first other use of a tensor.
    """

    def __init__(self, on_end: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self._on_end = on_end
        self._followed: dict[str, torch.Tensor] = {}
        self._sums: dict[str, torch.Tensor] = {}
        self._hook = contextlib.ExitStack()

    @property
    def is_open(self) -> bool:
        """Whether a tensor is followed now."""
        return bool(self._followed)

    def follow(self, name: str, tensor: torch.Tensor) -> None:
        """Begins with a tensor."""
        self._followed[name] = tensor

    def take(self) -> dict[str, torch.Tensor]:
        """Name → the last sum, of the first tensor's shape up to views, where anything was added."""
        found, self._followed, self._sums = self._sums, {}, {}
        return found

    def __enter__(self) -> "SumWatch":
        hook = register_module_forward_pre_hook(self._before_module)
        self._hook.callback(hook.remove)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hook.close()

    def _before_module(self, module: nn.Module, args: Any) -> None:
        is_leaf = next(module.children(), None) is None
        if is_leaf and self._followed and not isinstance(module, (nn.Dropout, nn.Identity)):
            self._end(list(self._among(pytree.tree_leaves(args))))

    def _among(self, values: list[Any]) -> Iterator[str]:
        return (name for name, tensor in self._followed.items() if any(value is tensor for value in values))

    def _end(self, names: list[str]) -> None:
        for name in names:
            del self._followed[name]
        if names:
            self._on_end()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function, and follows what it makes of the tensors."""
        kwargs = kwargs or {}
        if not self._followed or func in METADATA or func in _COPIES:
            return func(*args, **kwargs)
        given = [value for value in pytree.tree_leaves((args, kwargs)) if torch.is_tensor(value)]
        names = list(self._among(given))
        if not names:
            return func(*args, **kwargs)
        if func in _ADDITIONS and "alpha" not in kwargs and _are_two_alike(given):
            output = func(*args, **kwargs)
            for name in names:
                self._followed[name] = self._sums[name] = output
            return output
        if func in _VIEWS:
            output = func(*args, **kwargs)
            for name in names:
                if not _is_same(output, self._followed[name]):
                    self._end([name])
                    continue
                self._followed[name] = output
                if name in self._sums:
                    self._sums[name] = output
            return output
        self._end(names)
        return func(*args, **kwargs)


def _are_two_alike(given: list[torch.Tensor]) -> bool:
    return len(given) == 2 and given[0] is not given[1] and given[0].shape == given[1].shape


def _is_same(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether one holds the same numbers in the same memory and order as another, as a view of another shape does."""
    return (
        tensor.data_ptr() == other.data_ptr()
        and tensor.numel() == other.numel()
        and tensor.dtype == other.dtype
        and tensor.is_contiguous()
        and other.is_contiguous()
    )
