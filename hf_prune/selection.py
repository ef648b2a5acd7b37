"""Selection: the k lowest scores of many tensors, exactly, without ever putting the tensors together.

The order is total: by value (`−0.0` equals `0.0`), ties by position (tensor by tensor, each in its row-major order).
Floating-point numbers are mapped to integers that sort alike, and the k-th lowest integer is found from its highest
16 bits down, with one histogram of 65,536 counts for each 16 bits. Beyond the scores of one tensor at a time this
needs no memory that grows with the model, and the histograms of parts add up to the histogram of the whole.
"""

import functools
from collections.abc import Callable, Iterator, Mapping

import torch

Scores = Mapping[str, Callable[[], torch.Tensor]]
"""Name → a function that gives the scores of that tensor. It is called once for each pass and must give the same
scores each time, so that not all scores have to exist at once."""

_KEY_DTYPES = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
_CHUNK = 1 << 20  # Elements worked on at a time: bounds the temporaries, which are several times larger than scores.


def drop_lowest(scores: Scores, k: int, kept: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Drops the `k` lowest of all scores together.

    Args:
        scores: Name → function that gives scores of any shape, floating-point. Mixed dtypes are compared in the
            dtype that holds them all; scores are never cast down.
        k: How many to drop, those in `kept` that are dropped already included.
        kept: Name → bool tensor of the same shape; what is False there ranks below every score, so that it is
            dropped first. Names may be missing.

    Returns:
        Name → bool tensor of the scores' shape, True = kept, with exactly `k` False in all.

    Raises:
        ValueError: if a score is NaN (the message names the tensor), or `k` is negative or above the number of
            scores.

    Example:
        >>> a, b = torch.tensor([3.0, 1.0]), torch.tensor([2.0, 1.0])
        >>> drop_lowest({"a": lambda: a, "b": lambda: b}, k=3)
        {'a': tensor([ True, False]), 'b': tensor([False, False])}
    """
    kept = kept or {}
    dtype, total = _survey(scores)
    if not 0 <= k <= total:
        raise ValueError(f"k must be in [0, {total}], the number of scores; got {k}.")
    threshold, ties = _kth_lowest(scores, kept, dtype, k)
    masks = {}
    for name, compute in scores.items():
        values = compute()
        chunks = []
        for key in _keys(values, kept.get(name), dtype):
            above = key > threshold
            # Of the scores that equal the threshold just as many stay as the count wants: the last by position.
            equal = (key == threshold).nonzero().flatten()
            above[equal[ties:]] = True
            ties = max(ties - len(equal), 0)
            chunks.append(above)
        masks[name] = torch.cat(chunks).view(values.shape)
    dropped = sum(mask.numel() - int(mask.count_nonzero()) for mask in masks.values())
    if dropped != k:
        raise ValueError(
            f"{dropped} instead of {k} were dropped: the criterion gave other scores when it was called again. It has "
            "to give the same ones each time; seed what is random by ScoreInputs.seed and .name."
        )
    return masks


def check_scores(name: str, values: torch.Tensor) -> None:
    """Requires scores that can be ranked.

    Args:
        name: The tensor's name, for the message.
        values: Its scores.

    Raises:
        ValueError: if they are not floating-point, or one is NaN.
    """
    if values.dtype not in _KEY_DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _KEY_DTYPES)
        raise ValueError(f"the scores of {name!r} have dtype {values.dtype}; scores must be one of {known}.")
    if values.numel() and values.aminmax().max.isnan():
        raise ValueError(
            f"{int(values.isnan().sum())} of the {values.numel()} scores of {name!r} are NaN. "
            "A criterion has to give every weight a number."
        )


def _survey(scores: Scores) -> tuple[torch.dtype, int]:
    """Checks all scores; gives the dtype that holds them all and their number."""
    dtypes, total = [], 0
    for name, compute in scores.items():
        values = compute()
        check_scores(name, values)
        dtypes.append(values.dtype)
        total += values.numel()
    return functools.reduce(torch.promote_types, dtypes), total


def _keys(values: torch.Tensor, kept: torch.Tensor | None, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Chunks of integers that sort as the scores do; what is dropped already gets the lowest integer of all."""
    integer = _KEY_DTYPES[dtype]
    lowest = torch.iinfo(integer).min
    flags = None if kept is None else kept.flatten().split(_CHUNK)
    for i, chunk in enumerate(values.flatten().split(_CHUNK)):
        key = chunk.to(dtype).view(integer)
        # The bits of a non-negative float sort as the float does; those of a negative one the other way round.
        # This mapping gives −0.0 and 0.0 one key, and leaves the lowest integer to no float.
        if chunk.numel() and not chunk.min() > 0:
            key = torch.where(key < 0, lowest - key, key)
        yield key if flags is None else torch.where(flags[i], key, lowest)


def _kth_lowest(scores: Scores, kept: Mapping[str, torch.Tensor], dtype: torch.dtype, k: int) -> tuple[int, int]:
    """The k-th lowest key, and how many of the scores that equal it are among the k lowest.

    For `k = 0` the lowest integer, and none.
    """
    top = torch.iinfo(_KEY_DTYPES[dtype]).bits - 16
    known = 0  # The digits found so far, as a signed integer.
    for shift in range(top, -1, -16):
        histogram = torch.zeros(1 << 16, dtype=torch.int64)
        for name, compute in scores.items():
            for key in _keys(compute(), kept.get(name), dtype):
                if shift == top:
                    digit = (key >> shift).int() + (1 << 15)  # The sign is in the first digit.
                else:
                    digit = (key[(key >> (shift + 16)) == known] >> shift) & 0xFFFF
                histogram += torch.bincount(digit, minlength=1 << 16).cpu()
        below = histogram.cumsum(0)
        found = int(torch.searchsorted(below, k))
        k -= int(below[found] - histogram[found])
        known = found - (1 << 15) if shift == top else (known << 16) | found
    return known, k
