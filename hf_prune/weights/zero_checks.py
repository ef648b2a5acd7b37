"""Zero checks: what others write into pruned weights behind the callback is taken out again."""

import logging
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ..distributed.shards import has_shards
from ..distributed.zero import has_partitions
from .masks import MaskSet

logger = logging.getLogger(__name__)


class ZeroCheck:
    """Puts zeros back before a model is saved, and after training until it is used.

    Other callbacks write weights when this one has had its turn, such as averages of them at the end. Copies of a
    model, and files of it, get a check of nothing.

    Attributes:
        masks: What is to be zero.
    """

    def __init__(self) -> None:
        self.masks = MaskSet()
        self._hooks: list[RemovableHandle] = []

    def __reduce__(self) -> tuple[type["ZeroCheck"], tuple[()]]:
        return ZeroCheck, ()

    def watch_(self, model: nn.Module, masks: MaskSet) -> None:
        """Checks from now on whenever a model's state dict is taken, as it is to save it."""
        self.stop_()
        self.masks = masks
        if not has_shards(model) and not has_partitions(model):  # Their state dicts are put together elsewhere.
            self._hooks.append(model.register_state_dict_pre_hook(self._look))

    def watch_until_used_(self, model: nn.Module, masks: MaskSet) -> None:
        """Checks as well whenever a state dict is loaded, and once more when the model is called, and then no more."""
        self.watch_(model, masks)
        if self._hooks:
            self._hooks.append(model.register_load_state_dict_post_hook(self._look))
            self._hooks.append(model.register_forward_pre_hook(self._look_once_more))

    def stop_(self) -> None:
        """Checks no more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def look_(self, model: nn.Module) -> None:
        """Puts zeros back, and says so if there were too few."""
        if filled := self.masks.restore_(model):
            logger.warning(
                "%d pruned weights were no longer zero, and are zero again. Does another callback write weights? Name "
                "it before PruningTrainerCallback in callbacks.",
                filled,
            )

    def _look(self, model: nn.Module, *_: Any) -> None:
        self.look_(model)

    def _look_once_more(self, model: nn.Module, *_: Any) -> None:
        self.look_(model)
        self.stop_()
