"""The random states of torch, NumPy and Python, kept while something else draws from them."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def keep_random_state(device: torch.device) -> Iterator[None]:
    """Gives back every random state as it was.

    Args:
        device: Where the model is, if not on the CPU, whose state is kept too.
    """
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
