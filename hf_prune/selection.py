"""Selection: the k lowest scores of many tensors, exactly, without ever putting the tensors together.

The order is total: by value (`−0.0` equals `0.0`), ties by position (tensor by tensor, each in its row-major order).
Floating-point numbers are mapped to integers that sort alike, and the k-th lowest integer is found from its highest
16 bits down, with one histogram of 65,536 counts for each 16 bits. Beyond the scores of one tensor at a time this
needs no memory that grows with the model, and the histograms of parts add up to the histogram of the whole.
"""

import functools
from collections.abc import Callable, Iterator, Mapping

import numpy as np
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
    ranking = _Ranking(scores, kept or {})
    if not 0 <= k <= ranking.total:
        raise ValueError(f"k must be in [0, {ranking.total}], the number of scores; got {k}.")
    threshold, ties = _kth_lowest(ranking, k)
    masks = {}
    for name, shape in ranking.shapes.items():
        chunks = []
        for key in ranking.keys(name):
            keep = key >= threshold
            if ties:
                # Of the scores that equal the threshold just as many go as the count wants: the first by position.
                equal = (key == threshold).nonzero().flatten()
                keep[equal[:ties]] = False
                ties = max(ties - len(equal), 0)
            chunks.append(keep)
        masks[name] = torch.cat(chunks).view(shape)
    dropped = sum(masked_in(mask) for mask in masks.values())
    if dropped != k:
        raise ValueError(
            f"{dropped} instead of {k} were dropped: the criterion gave other scores when it was called again. It has "
            "to give the same ones each time; seed what is random by ScoreInputs.seed and .name."
        )
    return masks


def drop_lowest_of_each(name: str, scores: torch.Tensor, k: int, kept: torch.Tensor | None = None) -> torch.Tensor:
    """Drops the `k` lowest scores of each row; of ties the first by position.

    Args:
        name: The tensor's name, for messages.
        scores: `[rows, columns]`, floating-point.
        k: How many to drop of each row, those that `kept` has dropped already included.
        kept: Bool tensor of the same shape; what is False there goes first. None if nothing is dropped yet.

    Returns:
        Bool tensor of the scores' shape, True = kept, with exactly `k` False in each row.

    Raises:
        ValueError: if a score is NaN, or `kept` has dropped more than `k` of a row.

    Example:
        >>> drop_lowest_of_each("a", torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 1.0]]), 1)
        tensor([[ True, False,  True],
                [False,  True,  True]])
    """
    check_scores(name, scores)
    order = scores.argsort(stable=True, dim=1)
    if kept is not None:
        if (kept.shape[1] - kept.sum(1) > k).any():
            raise ValueError(
                f"{name!r} has rows in which more than {k} of {kept.shape[1]} are zero already, and what is pruned "
                "stays pruned. Start without hold_zeros, or take another scope."
            )
        # A rank below that of every score, −inf included, for what is dropped already.
        order = order.gather(1, kept.gather(1, order).byte().argsort(stable=True, dim=1))
    return torch.ones_like(order, dtype=torch.bool).scatter_(1, order[:, :k], False)


def masked_in(mask: torch.Tensor) -> int:
    """Number of weights that a mask prunes."""
    # NumPy counts bools several times faster than torch does.
    kept = np.count_nonzero(mask.numpy()) if mask.is_cpu else mask.count_nonzero()
    return mask.numel() - int(kept)


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


class _Ranking:
    """Scores as integers that sort as they do, one tensor at a time."""

    def __init__(self, scores: Scores, kept: Mapping[str, torch.Tensor]) -> None:
        self._scores, self._kept = scores, kept
        self._positive: set[str] = set()
        self.shapes: dict[str, torch.Size] = {}
        dtypes = []
        for name, compute in scores.items():
            values = compute()
            check_scores(name, values)
            if values.numel() and values.min() > 0:
                self._positive.add(name)
            self.shapes[name] = values.shape
            dtypes.append(values.dtype)
        self._dtype = functools.reduce(torch.promote_types, dtypes)
        self._integer = _KEY_DTYPES[self._dtype]
        self.bits = torch.iinfo(self._integer).bits
        self.total = sum(shape.numel() for shape in self.shapes.values())

    def keys(self, name: str) -> Iterator[torch.Tensor]:
        """The keys of one tensor, in chunks; what is dropped already gets the lowest integer of all."""
        lowest = torch.iinfo(self._integer).min
        flags = self._kept[name].flatten().split(_CHUNK) if name in self._kept else None
        for i, chunk in enumerate(self._scores[name]().flatten().split(_CHUNK)):
            key = chunk.to(self._dtype).view(self._integer)
            # The bits of a positive float sort as the float does; those of a negative one the other way round.
            # This mapping gives −0.0 and 0.0 one key, and leaves the lowest integer to no float.
            if name not in self._positive:
                key = torch.where(key < 0, lowest - key, key)
            yield key if flags is None else torch.where(flags[i], key, lowest)


def _kth_lowest(ranking: _Ranking, k: int) -> tuple[int, int]:
    """The k-th lowest key, and how many of the scores that equal it are among the k lowest.

    For `k = 0` the lowest integer, and none.
    """
    top = ranking.bits - 16
    known = 0  # The digits found so far, as a signed integer.
    for shift in range(top, -1, -16):
        histogram = torch.zeros(1 << 16, dtype=torch.int64)
        for name in ranking.shapes:
            for key in ranking.keys(name):
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
