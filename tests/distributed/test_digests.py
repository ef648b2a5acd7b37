"""Digests against the sums they stand for, written down."""

import hashlib
import json

import numpy as np
import pytest

from hf_prune.distributed.digests import digest_of, digests_of
from tests.processes import on_processes

ROWS = np.arange(14, dtype=np.uint8).reshape(7, 2)


def row(number: int, content: bytes) -> int:
    return int.from_bytes(hashlib.sha256(number.to_bytes(8, "little") + content).digest(), "little")


def sha(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def test_they_are_those_of_the_descriptions_and_of_the_sums_of_the_rows():
    rows = {"a": np.array([[1, 2], [3, 4]], dtype=np.uint8), "none": np.zeros((0, 2), dtype=np.uint8)}
    total = (row(0, b"\x01\x02") + row(1, b"\x03\x04")) % 2**256
    assert digests_of(rows.__getitem__, {"a": ["a", 1], "none": "none"}, {}) == {
        "a": sha([["a", 1], f"{total:064x}"]),
        "none": sha(["none", "0" * 64]),
    }


def test_one_for_several_whatever_their_order():
    assert digest_of({"b": "2", "a": "1"}) == digest_of({"a": "1", "b": "2"}) == sha([["a", "1"], ["b", "2"]])


def test_rows_in_another_order_are_others():
    assert digests_of(lambda _: ROWS, {"a": ""}, {}) != digests_of(lambda _: ROWS[::-1], {"a": ""}, {})


DESCRIBED = {"divided": [7, 2], "whole": [7, 2]}


def of_parts(rank: int) -> dict[str, str]:
    start, stop = [(0, 3), (3, 3), (3, 7)][rank]
    rows = {"divided": ROWS[start:stop], "whole": ROWS}
    return digests_of(rows.__getitem__, DESCRIBED, {"divided": start})


@pytest.mark.multiprocess
def test_it_does_not_matter_who_holds_which_rows(tmp_path):
    expected = digests_of(lambda _: ROWS, DESCRIBED, {})
    assert on_processes(3, of_parts, tmp_path) == [expected] * 3
