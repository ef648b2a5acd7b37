"""Access to a model's parameters, whatever divides them among processes."""

import contextlib
from collections.abc import Iterator

from torch import nn

from .shards import reshard_
from .zero import gathered


@contextlib.contextmanager
def accessible(model: nn.Module) -> Iterator[None]:
    """A context in which the parameters of a model can be looked at: whole ones, or the shards that it trains.

    All processes enter it together. Outside of it a module of FSDP2 may hold copies that it gathered for a forward
    pass, and those that ZeRO's stage 3 divides are empty. What is done to the latter is as `gathered` says.
    """
    reshard_(model)
    with gathered(model):
        yield
