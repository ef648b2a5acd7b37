"""Digests: what tensors are known by, whichever process holds which of their rows."""

import hashlib
import json

import numpy as np

from .processes import gather_from_processes, rank_and_size

_MODULUS = 1 << 256


class Digest:
    """A SHA-256 over tensors, in the order in which they are added.

    Of each it covers a description and the sum of the SHA-256s of its rows, each with its number: so each process adds
    up those that it holds, and only sums are sent.

    Args:
        together: Whether processes hold parts of tensors. All of them then add the same tensors.
    """

    def __init__(self, *, together: bool) -> None:
        self._together = together
        self._is_first = rank_and_size()[0] == 0
        self._described: list[object] = []
        self._sums: list[int] = []

    def add(self, description: object, rows: np.ndarray, first: int | None = None) -> None:
        """Adds a tensor.

        Args:
            description: Its name and whatever else counts, as JSON; the same on all processes.
            rows: `[rows, bytes]`, of which this process holds some or all.
            first: The number of the first of them; None if they are all, on each process.
        """
        total = 0
        if first is not None or self._is_first or not self._together:
            for number, row in enumerate(np.ascontiguousarray(rows), start=first or 0):
                sha = hashlib.sha256(number.to_bytes(8, "little") + row.tobytes())
                total += int.from_bytes(sha.digest(), "little")
        self._described.append(description)
        self._sums.append(total % _MODULUS)

    def hexdigest(self) -> str:
        """The digest. All processes call this, if they hold parts."""
        sums = gather_from_processes(self._sums) if self._together else [self._sums]
        totals = [sum(of_one) % _MODULUS for of_one in zip(*sums, strict=True)]
        content = [[d, f"{total:064x}"] for d, total in zip(self._described, totals, strict=True)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()
