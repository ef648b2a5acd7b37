"""Files of tensors that appear whole or not at all."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

Kind = TypeVar("Kind", bound="Tensors")


@dataclass(frozen=True, eq=False)
class Tensors:
    """Tensors that go into a checkpoint, known by a digest.

    Attributes:
        tensors: Name → tensor.
    """

    tensors: dict[str, torch.Tensor]

    def digest(self) -> str:
        """A SHA-256 over names, shapes, dtypes and bytes: equal tensors have equal digests on every machine."""
        sha = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            sha.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
            sha.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
        return sha.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the tensors as safetensors; the file appears whole or not at all."""
        save_tensors(self.tensors, path)

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
            return cls(load_file(path))
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
