"""Zero checks: what others write into pruned weights after the callback's turn is set back to zero."""

import functools
import logging
import sys
import traceback
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ..distributed.shards import has_shards
from ..distributed.zero import has_partitions
from .masks import MaskSet

logger = logging.getLogger(__name__)


_CHECKS: "weakref.WeakKeyDictionary[nn.Module, ZeroCheck]" = weakref.WeakKeyDictionary()


class ZeroCheck:
    """Sets pruned weights back to zero before a model is saved, and after training until it is used.

    Other callbacks may write weights after this one's turn, such as averages of them at the end of training. What is
    loaded after that is its owner's, and not looked at.
    """

    def __init__(self) -> None:
        self._masks = MaskSet()
        self._hooks: list[RemovableHandle] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return ZeroCheck, ()  # A copy has no hooks in the model.

    def watch_(self, model: nn.Module, masks: MaskSet) -> None:
        """Checks from now on whenever a model's state dict is taken, as it is to save it; no other check goes on."""
        self.stop_()
        if model in _CHECKS:
            _CHECKS[model].stop_()
        _CHECKS[model] = self
        self._masks = masks
        if not has_shards(model) and not has_partitions(model):  # Their state dicts are put together elsewhere.
            self._hooks.append(model.register_state_dict_pre_hook(_Hook(self.check_)))

    def watch_until_used_(self, model: nn.Module, masks: MaskSet) -> None:
        """Checks as well when callbacks behind load a state dict, and a last time when the model is called."""
        self.watch_(model, masks)
        if self._hooks:
            self._hooks.append(model.register_load_state_dict_post_hook(_Hook(self._check_if_training_ends)))
            self._hooks.append(model.register_forward_pre_hook(_Hook(self._check_last)))

    def stop_(self) -> None:
        """Checks no more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def check_(self, model: nn.Module) -> None:
        """Sets pruned weights back to zero, and says so if some were not."""
        if filled := self._masks.rezero_(model):
            logger.warning(
                "Set %d pruned weights back to zero: something wrote into them after PruningTrainerCallback. If it is "
                "a callback, list it before PruningTrainerCallback.",
                filled,
            )

    def _check_if_training_ends(self, model: nn.Module) -> None:
        if _is_under_way("on_train_end"):
            self.check_(model)
        else:
            self.stop_()

    def _check_last(self, model: nn.Module) -> None:
        self.check_(model)
        self.stop_()


def _is_under_way(function: str) -> bool:
    """Whether a function of this name has called, such as a callback's for an event."""
    # No event tells callbacks that a training has returned, and that whoever loads weights now means them.
    return any(frame.f_code.co_name == function for frame, _ in traceback.walk_stack(None))


class _Hook:
    """A hook of a module that is called with the module alone.

    Pickles and copies of the module get one that does nothing, and is no class of hf_prune.
    """

    def __init__(self, check: Callable[[nn.Module], None]) -> None:
        self._check = check

    def __call__(self, module: nn.Module, *_: Any) -> None:
        self._check(module)

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial, (sys.audit, "zero_check")  # It takes any arguments, and nobody listens.
