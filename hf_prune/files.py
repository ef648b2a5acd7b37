"""Files of tensors that appear whole or not at all."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .digests import Digest
from .shards import from_own, own, rows_held, whole

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

    def whole(self, name: str) -> torch.Tensor:
        """A tensor with all its rows, on the CPU."""
        tensor = self.tensors[name].detach()
        if name in self.like:
            like = self.like[name]
            tensor = whole(from_own(tensor.to(own(like).device), like))
        return tensor.cpu()

    def digest(self) -> str:
        """A SHA-256 over names, shapes, dtypes and bytes: equal tensors have equal digests on every machine."""
        digest = Digest(together=bool(self.like))
        for name, tensor in sorted(self.tensors.items()):
            like = self.like.get(name)
            shape = list(tensor.shape if like is None else like.shape)
            rows = torch.atleast_1d(tensor.detach().cpu())
            rows = rows.reshape(len(rows), math.prod(rows.shape[1:])).contiguous().view(torch.uint8)
            first = None if like is None else rows_held(like).start
            digest.add([name, shape, str(tensor.dtype)], rows.numpy(), first)
        return digest.hexdigest()

    def save(self, path: str | os.PathLike[str], *, write: bool = True) -> None:
        """Writes the tensors as safetensors; the file appears whole or not at all.

        Args:
            path: Where to.
            write: Whether this process writes. All of them call this where tensors are rows.
        """
        tensors = {}
        for name in self.tensors if write or self.like else ():
            tensor = self.whole(name)
            if write:
                tensors[name] = tensor
        if write:
            save_tensors(tensors, path, self.metadata)

    @classmethod
    def load(cls: type[Kind], path: str | os.PathLike[str]) -> Kind:
        """Reads what `save` wrote, onto the CPU.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is truncated or not a file of tensors.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no tensors at {path}.")
        try:
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                return cls({name: file.get_tensor(name) for name in names}, metadata=file.metadata() or {})
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or not a file of tensors ({error}).") from error


def save_tensors(
    tensors: Mapping[str, torch.Tensor], path: str | os.PathLike[str], metadata: dict[str, str] | None = None
) -> None:
    """Writes safetensors under a temporary name and renames them when they are whole.

    Args:
        tensors: Name → tensor; no two of them may share memory.
        path: Where to. What was there before stays until the new file is whole.
        metadata: Text to write into the header.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished, metadata=metadata)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
