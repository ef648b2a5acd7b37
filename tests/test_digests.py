"""Digests against the sums they stand for, written down."""

import hashlib
import json

import numpy as np
import pytest

from hf_prune.digests import Digest
from tests.processes import on_processes

ROWS = np.arange(14, dtype=np.uint8).reshape(7, 2)


def row(number: int, content: bytes) -> int:
    return int.from_bytes(hashlib.sha256(number.to_bytes(8, "little") + content).digest(), "little")


def test_it_is_that_of_the_descriptions_and_of_the_sums_of_the_rows():
    digest = Digest(together=False)
    digest.add(["a", 1], np.array([[1, 2], [3, 4]], dtype=np.uint8))
    digest.add("none", np.zeros((0, 2), dtype=np.uint8))
    total = (row(0, b"\x01\x02") + row(1, b"\x03\x04")) % 2**256
    content = [[["a", 1], f"{total:064x}"], ["none", "0" * 64]]
    assert digest.hexdigest() == hashlib.sha256(json.dumps(content).encode()).hexdigest()


def test_rows_in_another_order_are_others():
    digests = set()
    for rows in (ROWS, ROWS[::-1]):
        digest = Digest(together=False)
        digest.add("a", rows)
        digests.add(digest.hexdigest())
    assert len(digests) == 2


def of_parts(rank: int) -> str:
    start, stop = [(0, 3), (3, 3), (3, 7)][rank]
    digest = Digest(together=True)
    digest.add("divided", ROWS[start:stop], start)
    digest.add("whole", ROWS)
    return digest.hexdigest()


@pytest.mark.multiprocess
def test_it_does_not_matter_who_holds_which_rows(tmp_path):
    digest = Digest(together=False)
    digest.add("divided", ROWS)
    digest.add("whole", ROWS)
    assert on_processes(3, of_parts, tmp_path) == [digest.hexdigest()] * 3
