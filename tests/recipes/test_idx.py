import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from common.idx import is_idx_folder, read_idx, read_pair

IMAGES = bytes([0, 0, 8, 3]) + struct.pack(">3I", 2, 1, 3) + bytes([1, 2, 3, 253, 254, 255])
LABELS = bytes([0, 0, 8, 1]) + struct.pack(">I", 2) + bytes([7, 9])


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_reads_hand_made_bytes(tmp_path: Path, suffix: str) -> None:
    images = read_idx(write(tmp_path / f"images{suffix}", IMAGES))
    assert images.dtype == np.uint8
    assert images.tolist() == [[[1, 2, 3]], [[253, 254, 255]]]
    assert read_idx(write(tmp_path / f"labels{suffix}", LABELS)).tolist() == [7, 9]


@pytest.mark.parametrize(
    "content",
    [b"", b"\x89PNG....", bytes([0, 0, 13, 3]) + IMAGES[4:], bytes([0, 0, 8, 0])],
    ids=["empty", "another format", "floats", "no dimensions"],
)
def test_wrong_magic(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ValueError, match="an IDX file of unsigned bytes starts with 00 00 08"):
        read_idx(write(tmp_path / "images", content))


@pytest.mark.parametrize(("length", "expected"), [(23, 22), (21, 22), (16, 22), (9, 16)])
def test_wrong_length(tmp_path: Path, length: int, expected: int) -> None:
    with pytest.raises(ValueError, match=f"has {length} bytes, but its header asks for {expected}"):
        read_idx(write(tmp_path / "images", (IMAGES + b"?")[:length]))


@pytest.mark.parametrize("damage", [lambda c: c[:-9], lambda c: c[:12] + b"\xff" * 8 + c[20:], lambda c: b"no" + c])
def test_damaged_gzip(tmp_path: Path, damage) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(damage(gzip.compress(IMAGES)))
    with pytest.raises(ValueError, match="is not a whole gzip file"):
        read_idx(path)


def test_pairs(tmp_path: Path) -> None:
    assert not is_idx_folder(tmp_path)
    write(tmp_path / "train-images-idx3-ubyte.gz", IMAGES)
    assert is_idx_folder(tmp_path)
    with pytest.raises(ValueError, match=r"has no train-labels-idx1-ubyte\[.gz\]"):
        read_pair(tmp_path, "train")
    write(tmp_path / "train-labels-idx1-ubyte", LABELS)
    images, labels = read_pair(tmp_path, "train")
    assert (images.shape, labels.tolist()) == ((2, 1, 3), [7, 9])


def test_pairs_that_do_not_belong_together(tmp_path: Path) -> None:
    write(tmp_path / "train-images-idx3-ubyte", IMAGES)
    write(tmp_path / "train-labels-idx1-ubyte", bytes([0, 0, 8, 1]) + struct.pack(">I", 3) + bytes(3))
    with pytest.raises(ValueError, match=r"images of shape \(2, 1, 3\) and labels of shape \(3,\)"):
        read_pair(tmp_path, "train")
