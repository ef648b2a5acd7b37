"""Compression: a sparse tensor as the bits that say which of its elements are not zero, and those elements."""

import collections
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

BITMASK = ":bitmask"
"""What follows a tensor's name in a file, in that of its bits. Its values have its own name: a reader that knows
nothing of compression meets a wrong shape, and no tensor that is missing."""


def compress(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor of any shape and dtype without its zeros: negative ones are zeros too, and come back as positive ones.

    Returns:
        The bits in the order of the elements, the highest first, `[⌈n/8⌉]`, uint8, the last byte filled up with zeros;
        and the elements that are not zero, `[those]`. Both on the CPU.

    Example:
        >>> compress(torch.tensor([[0.0, 1.5], [0.0, 2.5]]))
        (tensor([80], dtype=torch.uint8), tensor([1.5000, 2.5000]))
    """
    flat = tensor.detach().cpu().flatten()
    kept = flat != 0
    return torch.from_numpy(np.packbits(kept.numpy())), flat[kept]


def decompress(name: str, bitmask: torch.Tensor, values: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The tensor that was compressed, on the device of its bits and values; the name is for messages.

    Raises:
        ValueError: if bits and elements do not fit each other, or the shape.

    Example:
        >>> decompress("a", *compress(torch.tensor([[0.0, 1.5], [0.0, 2.5]])), (2, 2))
        tensor([[0.0000, 1.5000],
                [0.0000, 2.5000]])
    """
    count = math.prod(shape)
    fits = bitmask.dtype == torch.uint8 and bitmask.shape == ((count + 7) // 8,)
    if not fits or values.ndim != 1 or not values.is_floating_point():
        raise ValueError(
            f"{name!r} of shape {list(shape)} cannot be read from {list(bitmask.shape)} bits of {bitmask.dtype} and "
            f"values of shape {list(values.shape)} and {values.dtype}."
        )
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=bitmask.device)
    bits = ((bitmask[:, None] >> shifts) & 1).bool().flatten()
    if bits[count:].any() or int(bits.sum()) != len(values):
        raise ValueError(
            f"the bitmask of {name!r} says {int(bits.sum())} of {count} elements, there are {len(values)}."
        )
    return values.new_zeros(count).masked_scatter_(bits[:count], values).view(torch.Size(shape))


def compressed_state(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, list[int]]]:
    """A state dict in which tensors are compressed that are smaller so, with their shapes by name.

    The values of a compressed tensor have its name, its bits have `BITMASK` behind it. What goes by several names
    stays as it is, so that Transformers saves it once.
    """
    found: dict[str, torch.Tensor] = {}
    shapes: dict[str, list[int]] = {}
    names = collections.Counter(tensor.data_ptr() for tensor in state.values())
    for name, tensor in state.items():
        found[name] = tensor
        if tensor.dtype in _DTYPES and tensor.ndim and names[tensor.data_ptr()] == 1:
            size = int(tensor.count_nonzero()) * tensor.element_size() + (tensor.numel() + 7) // 8
            if size < tensor.nbytes:
                found[name + BITMASK], found[name] = compress(tensor)
                shapes[name] = list(tensor.shape)
    return found, shapes


_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
