"""The k lowest scores of many tensors, exactly, without ever putting the tensors together.

The order is total: by value (`−0.0` equals `0.0`), ties by position (tensor by tensor, each in its row-major order).
Floating-point numbers are mapped to integers that sort alike, and the k-th lowest integer is found from its highest
16 bits down, with one histogram of 65,536 counts for each 16 bits, until few enough are left to be sorted. Beyond the
scores of one tensor at a time and these few this needs no memory that grows with the model. Histograms of shards add
up: processes that have a shard of each tensor find the same integer, and tell each other how often they have it.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch

from ..distributed.processes import failing_together, gather_from_processes, rank_and_size, sum_over_processes_
from ..weights.masks import masked_in

Scores = Mapping[str, Callable[[], torch.Tensor]]
"""Name → a function that gives the scores of that tensor. It is called once for each pass and must give the same
scores each time, so that not all scores have to exist at once."""

_KEY_DTYPES = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
_SORTED_SHARE = 1 / 64  # The largest share of the scores that is sorted, which takes about 20 bytes for each of them.
_CHUNK = 1 << 20  # Elements worked on at a time: bounds the temporaries, which are several times larger than scores.


def drop_lowest(
    scores: Scores, k: int, kept: Mapping[str, torch.Tensor] | None = None, *, sharded: bool = False
) -> dict[str, torch.Tensor]:
    """Drops the `k` lowest of all scores together.

    Args:
        scores: Name → function that gives scores of any shape, floating-point. Mixed dtypes are compared in the
            dtype that holds them all; scores are never cast down.
        k: How many to drop, those in `kept` that are dropped already included.
        kept: Name → bool tensor of the same shape; what is False there ranks below every score, so that it is
            dropped first. Names may be missing.
        sharded: Whether each process has a shard of every tensor, maybe an empty one: the first process the first
            rows, and so on. All of them call this, with their shards of `scores` and `kept`, the same names and `k`.

    Returns:
        Name → bool tensor of the scores' shape, True = kept, with exactly `k` False in all; if sharded, in all shards.

    Raises:
        ValueError: if a score is NaN (the message names the tensor), or `k` is negative or above the number of
            scores.

    Example:
        >>> a, b = torch.tensor([3.0, 1.0]), torch.tensor([2.0, 1.0])
        >>> drop_lowest({"a": lambda: a, "b": lambda: b}, k=3)
        {'a': tensor([ True, False]), 'b': tensor([False, False])}
    """
    ranking = _Ranking(scores, kept or {}, sharded)
    if not 0 <= k <= ranking.total:
        raise ValueError(f"k must be in [0, {ranking.total}], the number of scores; got {k}.")
    prefix, shift, inside, left = _bin_of_kth_lowest(ranking, k)
    # What stays is made now: among scores that come and go it would leave holes in the memory.
    masks = {n: torch.empty(s, dtype=torch.bool, device=ranking.devices[n]) for n, s in ranking.shapes.items()}
    keys, places = torch.empty(2, inside if shift else 0, dtype=torch.int64)
    filled, ends = 0, []
    ties = ranking.ties_to_drop(prefix, left) if sharded else {}
    for name in masks:
        mask, left = masks[name].view(-1), ties.get(name, left)
        for chunk, key in ranking.keys(name):
            digits = key >> shift if shift else key
            torch.ge(digits, prefix, out=mask[chunk])
            positions = (digits == prefix).nonzero().flatten()
            if shift:
                filled += len(positions)
                if filled > inside:
                    raise _other_scores(f"{filled} scores are close to the {k}-th lowest, and {inside} were")
                keys[filled - len(positions) : filled] = key[positions]
                places[filled - len(positions) : filled] = positions + chunk.start
            else:  # They are equal, and the first by position go.
                mask[chunk][positions[:left]] = False
                left = max(left - len(positions), 0)
        ends.append(filled)
    keep = torch.ones_like(keys, dtype=torch.bool).scatter_(0, keys.argsort(stable=True)[:left], False)
    for mask, start, end in zip(masks.values(), [0, *ends], ends, strict=False):
        mask.view(-1)[places[start:end].to(mask.device)] = keep[start:end].to(mask.device)
    dropped = ranking.sum(torch.tensor(sum(masked_in(mask) for mask in masks.values()))).item()
    if dropped != k:
        raise _other_scores(f"{dropped} instead of {k} were dropped")
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


def _other_scores(seen_by: str) -> ValueError:
    return ValueError(
        f"{seen_by}: the criterion gave other scores when it was called again. It has to give the same ones each "
        "time; seed what is random by ScoreInputs.seed and .name."
    )


class _Ranking:
    """Scores as integers that sort as they do, one tensor at a time.

    Attributes:
        shapes: The shape of each tensor.
        devices: Its device.
        sharded: Whether these are shards, and what is counted is counted in all of them.
        total: Number of scores.
        bits: Number of bits of a key.
        histogram: Number of keys that begin with each 16 bits, in their order.
    """

    def __init__(self, scores: Scores, kept: Mapping[str, torch.Tensor], sharded: bool) -> None:
        self._scores, self._kept, self.sharded = scores, kept, sharded
        self._dtypes: set[torch.dtype] = set()
        self._positive: set[str] = set()
        self.shapes: dict[str, torch.Size] = {}
        self.devices: dict[str, torch.device] = {}
        if sharded:
            with failing_together():
                for name in scores:
                    next(self.keys(name), None)
        self.histogram = self.histogram_within(None)
        if len(self._dtypes) > 1:  # The first ones were not yet compared in the dtype that holds them all.
            self.histogram = self.histogram_within(None)
        self.total = int(self.sum(torch.tensor(sum(shape.numel() for shape in self.shapes.values()))))

    def sum(self, count: torch.Tensor) -> torch.Tensor:
        """A count, over all shards."""
        if not self.sharded:
            return count
        device = next(iter(self.devices.values()), count.device)  # Some backends add up on their own device only.
        return sum_over_processes_(count.to(device)).cpu()

    def ties_to_drop(self, key: int, left: int) -> dict[str, int]:
        """How many of equal keys go from each tensor of this process, if so many of all go, the first by position."""
        counts = {name: sum(int((keys == key).sum()) for _, keys in self.keys(name)) for name in self._scores}
        rank, shares = rank_and_size()[0], {}
        everywhere = gather_from_processes(counts)
        for name in counts:
            before = sum(each[name] for each in everywhere[:rank])
            shares[name] = min(max(left - before, 0), counts[name])
            left = max(left - sum(each[name] for each in everywhere), 0)
        return shares

    @property
    def _dtype(self) -> torch.dtype:
        return functools.reduce(torch.promote_types, self._dtypes)

    @property
    def bits(self) -> int:
        return torch.iinfo(_KEY_DTYPES[self._dtype]).bits

    def keys(self, name: str) -> Iterator[tuple[slice, torch.Tensor]]:
        """The keys of one tensor, in chunks, and where these are; what is dropped already gets the lowest integer.

        The first call for a tensor also checks it and notes its shape, device and dtype.
        """
        values = self._scores[name]()
        if name not in self.shapes:
            check_scores(name, values)
            self.shapes[name], self.devices[name] = values.shape, values.device
            self._dtypes.add(values.dtype)
            if values.numel() and values.min() > 0:
                self._positive.add(name)
        elif values.shape != self.shapes[name]:
            raise _other_scores(f"{tuple(values.shape)} instead of {tuple(self.shapes[name])} scores of {name!r}")
        kept = self._kept[name].flatten() if name in self._kept else None
        dtype, values = self._dtype, values.flatten()
        integer = _KEY_DTYPES[dtype]
        lowest = torch.iinfo(integer).min
        for start in range(0, len(values), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            key = values[chunk].to(dtype).view(integer)
            # The bits of a positive float sort as the float does; those of a negative one the other way round.
            # This mapping gives −0.0 and 0.0 one key, and leaves the lowest integer to no float.
            if name not in self._positive:
                key = torch.where(key < 0, lowest - key, key)
            yield chunk, key if kept is None else torch.where(kept[chunk], key, lowest)

    def histogram_within(self, prefix: int | None, shift: int = 0) -> torch.Tensor:
        """Number of keys by 16 of their bits.

        Args:
            prefix: The bits before these, as a signed integer: only keys that begin with them count. None for the
                first 16 bits, in which the sign is.
            shift: Number of bits behind these.
        """
        histogram = torch.zeros(1 << 16, dtype=torch.int64)
        for name in self._scores:
            for _, key in self.keys(name):
                if prefix is None:
                    digit = (key >> (self.bits - 16)).int() + (1 << 15)
                else:
                    digit = (key[(key >> (shift + 16)) == prefix] >> shift) & 0xFFFF
                histogram += torch.bincount(digit, minlength=1 << 16).cpu()
        return self.sum(histogram)


class _Bin(NamedTuple):
    """Keys that begin alike.

    Attributes:
        prefix: The bits that they begin with, as a signed integer.
        shift: Number of bits behind these.
        size: Number of the keys.
        drop: How many of them go.
    """

    prefix: int
    shift: int
    size: int
    drop: int


def _bin_of_kth_lowest(ranking: _Ranking, k: int) -> _Bin:
    """The bin that the k-th lowest key is in: so narrow that what is in it can be sorted, or a single key.

    For `k = 0` the lowest bin, of which none go.
    """
    prefix, shift, histogram = -1 << 15, ranking.bits - 16, ranking.histogram
    while True:
        up_to = histogram.cumsum(0)
        if k > up_to[-1]:
            raise _other_scores(f"{k - int(up_to[-1])} scores are missing")
        found = int(torch.searchsorted(up_to, k))
        inside = int(histogram[found])
        k -= int(up_to[found]) - inside
        prefix += found
        if shift == 0 or (not ranking.sharded and inside <= ranking.total * _SORTED_SHARE):
            return _Bin(prefix, shift, inside, k)
        shift -= 16
        histogram = ranking.histogram_within(prefix, shift)
        prefix <<= 16
