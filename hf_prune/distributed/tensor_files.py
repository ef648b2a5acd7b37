"""Files of tensors that appear whole or not at all, written tensor by tensor and read by rows."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .digests import digest_of, digests_of
from .shards import from_own, is_sharded, own, rows_held, whole

Kind = TypeVar("Kind", bound="Tensors")


@dataclass(frozen=True, eq=False)
class Tensors:
    """Tensors that go into a checkpoint, known by a digest.

    Attributes:
        tensors: Name → tensor.
        like: Name → the sharded tensor of whose rows it holds those of this process, for those that are such rows.
            What looks at all rows is then called by all processes.
        metadata: Text that goes into the file's header.
    """

    tensors: dict[str, torch.Tensor]
    like: dict[str, torch.Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    def shape_of(self, name: str) -> torch.Size:
        """The shape of a tensor with all its rows."""
        shape = self.tensors[name].shape
        return torch.Size([len(self.like[name]), *shape[1:]]) if name in self.like else shape

    def whole(self, name: str) -> torch.Tensor:
        """A tensor with all its rows, on the CPU."""
        tensor = self.tensors[name].detach()
        if name in self.like:
            like = self.like[name]
            tensor = whole(from_own(tensor.to(own(like).device), like, self.shape_of(name)))
        return tensor.cpu()

    def digests(self) -> dict[str, str]:
        """A SHA-256 of each tensor, its name, shape and dtype."""
        described = {name: [name, list(self.shape_of(name)), str(t.dtype)] for name, t in self.tensors.items()}
        first = {name: rows_held(like).start for name, like in self.like.items()}
        return digests_of(lambda name: _rows_of(self.tensors[name]), described, first)

    def digest(self) -> str:
        """One for all of them: equal tensors have equal digests on every machine."""
        return digest_of(self.digests())

    def save(self, path: str | os.PathLike[str], *, write: bool = True) -> None:
        """Writes the tensors as safetensors, gathering one at a time; the file appears whole or not at all.

        Where tensors are rows, all processes call this, and `write` says whether this one writes.
        """
        layout = {name: Layout(tensor.dtype, self.shape_of(name)) for name, tensor in self.tensors.items()}
        save_tensors(layout, self.whole, path, self.metadata, write=write, together=bool(self.like))

    @classmethod
    def load(cls: type[Kind], path: str | os.PathLike[str], like: Mapping[str, torch.Tensor] | None = None) -> Kind:
        """Reads what `save` wrote, onto the CPU; of tensors that are sharded in `like` only the rows of this process.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is truncated or not a file of tensors, or one of them has not as many rows as `like`.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no tensors at {path}.")
        try:
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                like = {name: t for name, t in (like or {}).items() if name in names and is_sharded(t)}
                for name, tensor in like.items():
                    if (shape := file.get_slice(name).get_shape())[:1] != [len(tensor)]:
                        raise ValueError(f"{path} has {name!r} of shape {shape}, the model {list(tensor.shape)}.")
                tensors = {
                    name: file.get_slice(name)[rows_held(like[name])] if name in like else file.get_tensor(name)
                    for name in names
                }
                return cls(tensors, like, file.metadata() or {})
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or not a file of tensors ({error}).") from error


class Layout(NamedTuple):
    """What of a tensor is told in a file's header."""

    dtype: torch.dtype
    shape: Sequence[int]


def save_tensors(
    layout: Mapping[str, Layout],
    tensor_of: Callable[[str], torch.Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    *,
    write: bool = True,
    together: bool = False,
) -> None:
    """Writes safetensors under a temporary name, and renames them when they are whole.

    Each tensor is made by `tensor_of`, on the CPU, and written before the next, so that they need not be in memory
    together. If all processes make each of them `together`, those that do not `write` call this too.
    """
    # The widest first, so that each begins at a multiple of its elements' size.
    names = sorted(layout, key=lambda name: (-layout[name].dtype.itemsize, name))
    if not write:
        for name in names if together else ():
            tensor_of(name)
        return
    with _appearing_whole(Path(path)) as file:
        file.write(_header({name: layout[name] for name in names}, metadata or {}))
        for name in names:
            file.write(_bytes_of(tensor_of(name)).data)


@contextmanager
def _appearing_whole(path: Path) -> Iterator[BinaryIO]:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as file:
            yield file
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _rows_of(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a tensor, `[rows, bytes]`."""
    rows = torch.atleast_1d(tensor.detach().cpu())
    return _bytes_of(rows).reshape(len(rows), math.prod(rows.shape[1:]) * rows.element_size())


def _bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a tensor on the CPU, in row-major order."""
    # Torch calls a tensor contiguous whatever the strides of axes of length one, and then views no bytes of it.
    tensor = tensor.contiguous()
    return tensor.as_strided([tensor.numel()], [1]).view(torch.uint8).numpy()


def _header(layout: Mapping[str, Layout], metadata: Mapping[str, str]) -> bytes:
    """What safetensors begin with: how long it is, and as JSON which bytes behind it are which tensor."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in layout.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _name_of(dtype), "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _name_of(dtype: torch.dtype) -> str:
    """What safetensors call a dtype, read off an empty tensor that they write."""
    written = save({"x": torch.empty(0, dtype=dtype)})
    return str(json.loads(written[8:])["x"]["dtype"])
