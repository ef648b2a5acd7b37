"""The IDX format of MNIST and Fashion-MNIST: a magic number, the shape, the bytes. Plain or gzipped."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

UNSIGNED_BYTE = 0x08


def is_idx_folder(folder: Path) -> bool:
    """Whether `folder` holds training images in an IDX file."""
    return any(folder.glob("train-images-idx3-ubyte*"))


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Reads one IDX file of unsigned bytes: shape `(images, height, width)` or `(labels,)`.

    Raises:
        ValueError: The magic number is not that of unsigned bytes, or the file is shorter or longer than it says.
    """
    content = path.read_bytes()
    try:
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file ({error}). Fetch it again.") from error
    magic, dimensions = content[:3], content[3] if len(content) > 3 else 0
    if magic != bytes([0, 0, UNSIGNED_BYTE]) or not dimensions:
        raise ValueError(
            f"{path} starts with the bytes {content[:4].hex(' ')}; an IDX file of unsigned bytes starts with 00 00 08 "
            "and its number of dimensions. Give files such as train-images-idx3-ubyte.gz as they were published."
        )
    start = 4 + 4 * dimensions
    shape = struct.unpack(f">{dimensions}I", content[4:start].ljust(4 * dimensions, b"\0"))
    if len(content) != start + math.prod(shape):
        raise ValueError(
            f"{path} has {len(content)} bytes, but its header asks for {start + math.prod(shape)}. Fetch it again."
        )
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


def read_pair(folder: Path, prefix: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Reads the images `(n, height, width)` and the labels `(n,)` whose file names start with `prefix`.

    Raises:
        ValueError: One of the two files is missing, or they differ in length.
    """
    arrays = []
    for kind in ("images-idx3", "labels-idx1"):
        plain = folder / f"{prefix}-{kind}-ubyte"
        path = plain if plain.exists() else plain.with_name(plain.name + ".gz")
        if not path.exists():
            raise ValueError(f"{folder} has no {plain.name}[.gz], which the other IDX files there need. Add it.")
        arrays.append(read_idx(path))
    images, labels = arrays
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{folder}: {prefix} has images of shape {images.shape} and labels of shape {labels.shape}; "
            "they must be (n, height, width) and (n,). Are the files of one data set?"
        )
    return images, labels
