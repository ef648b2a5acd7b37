"""Digests: what tensors are known by, whichever process holds which of their rows."""

import hashlib
import json
from collections.abc import Callable, Mapping

import numpy as np

from .processes import gather_from_processes, rank_and_size

_MODULUS = 1 << 256


def digests_of(
    rows_of: Callable[[str], np.ndarray], described: Mapping[str, object], first: Mapping[str, int]
) -> dict[str, str]:
    """A SHA-256 of each of several tensors, the same on all processes that hold the same.

    It covers a description and the sum of the SHA-256s of the rows, each with its number: so each process adds up
    those that it holds, and only sums are sent.

    Args:
        rows_of: Name → `[rows, bytes]`, of which this process holds some or all; asked for one tensor at a time.
        described: Name → whatever else counts, as JSON; the same on all processes.
        first: Name → the number of the first of the rows, of those tensors of which processes hold parts. If there
            are any, all processes call this.
    """
    counts = not first or rank_and_size()[0] == 0
    sums = [_sum(rows_of(name), first.get(name, 0)) if name in first or counts else 0 for name in described]
    everywhere = gather_from_processes(sums) if first else [sums]
    totals = [sum(of_one) % _MODULUS for of_one in zip(*everywhere, strict=True)]
    return {name: _sha([described[name], f"{total:064x}"]) for name, total in zip(described, totals, strict=True)}


def digest_of(digests: Mapping[str, str]) -> str:
    """One digest for several, whatever their order."""
    return _sha(sorted(digests.items()))


def _sum(rows: np.ndarray, first: int) -> int:
    total = 0
    for number, row in enumerate(np.ascontiguousarray(rows), start=first):
        sha = hashlib.sha256(number.to_bytes(8, "little") + row.tobytes())
        total += int.from_bytes(sha.digest(), "little")
    return total % _MODULUS


def _sha(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
