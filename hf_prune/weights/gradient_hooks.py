"""Hooks that zero the gradients of pruned weights as they are accumulated, which is before they are clipped."""

import contextlib
import functools
import weakref
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..distributed.shards import own
from ..distributed.zero import is_partitioned
from .masks import mask_

# By parameter, shared by all: a run takes away what an interrupted one has left on its model.
_HOOKS = WeakTensorKeyDictionary()


_PAUSED: list[None] = []  # One for each `paused` that is entered; for all threads, as backward passes have their own.


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """A context in which no hook changes gradients."""
    _PAUSED.append(None)
    try:
        yield
    finally:
        _PAUSED.pop()


class GradientHooks:
    """The hooks of a run; they end with this object, as a run that is interrupted cannot take them away."""

    def __init__(self) -> None:
        self._held: list[str] = []

    def hold_(self, weights: Mapping[str, nn.Parameter], masks: Mapping[str, torch.Tensor]) -> None:
        """Puts a hook on each trainable weight that has a mask, in place of those that are there."""
        self.release_(weights.values())
        self._held = _trainable(weights, masks)
        for name in self._held:
            weight, owned = weights[name], (weakref.ref(self), masks[name])
            if is_partitioned(weight):  # DeepSpeed takes gradients away as soon as they are accumulated.
                _HOOKS[weight] = weight.register_hook(functools.partial(_masked_gradient, *owned))
            else:
                hook = functools.partial(_mask_gradient, *owned)
                _HOOKS[weight] = weight.register_post_accumulate_grad_hook(hook)

    def are_on(self, weights: Mapping[str, nn.Parameter], masks: Mapping[str, torch.Tensor]) -> bool:
        """Whether there are hooks on all weights that need one: somebody may have unfrozen some."""
        return self._held == _trainable(weights, masks)

    def release_(self, weights: Iterable[nn.Parameter]) -> None:
        """Takes all hooks from weights, whoever has put them there."""
        self._held = []
        for weight in weights:
            if weight in _HOOKS:
                _HOOKS.pop(weight).remove()


def _trainable(weights: Mapping[str, nn.Parameter], masks: Mapping[str, torch.Tensor]) -> list[str]:
    return [name for name in masks if weights[name].requires_grad]


def _mask_gradient(owner: weakref.ref[GradientHooks], mask: torch.Tensor, parameter: torch.Tensor) -> None:
    # Optimizers that step inside the backward pass may have taken the gradient away already.
    if not _PAUSED and owner() is not None and parameter.grad is not None:
        mask_(own(parameter.grad), own(mask))


def _masked_gradient(
    owner: weakref.ref[GradientHooks], mask: torch.Tensor, gradient: torch.Tensor
) -> torch.Tensor | None:
    return None if _PAUSED or owner() is None else gradient * mask
