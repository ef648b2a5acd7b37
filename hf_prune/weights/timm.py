"""timm: what its networks, which Transformers wraps, say of themselves."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

_STEMS = ("conv", "stem", "embed", "proj")
_NUMBERS = re.compile(r"(\.\d+)+$")


def config_of_timm(module: nn.Module) -> Mapping[str, Any] | None:
    """What a model of timm says of itself: the size of its images, its first convolution, and its classifier."""
    found = [getattr(module, name, None) for name in ("pretrained_cfg", "default_cfg")]
    return next((each for each in found if isinstance(each, Mapping) and "first_conv" in each), None)


def ends_of_timm(module: nn.Module) -> Iterator[str]:
    """The names of the first convolutions and the classifiers in a model of timm."""
    config = config_of_timm(module) or {}
    for names in (config.get("first_conv"), config.get("classifier")):
        for name in [names] if isinstance(names, str) else names or ():
            # A stem of several convolutions is named by its first, as conv1.0; so is all of a VGG, by features.0.
            stem = _NUMBERS.sub("", name)
            name = stem if any(part in stem.rpartition(".")[2] for part in _STEMS) else name
            yield from (name, name.replace(".", "_", 1))  # The latter where it gives features alone.
