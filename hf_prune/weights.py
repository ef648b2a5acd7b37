"""The best weights of a round: a real copy, which later steps do not change."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from .files import save_tensors


@dataclass(frozen=True, eq=False)
class WeightsCopy:
    """A copy of a model's parameters and persistent buffers, on the CPU.

    Attributes:
        tensors: Name in memory → copy; a tensor that has several names has one of them.
    """

    tensors: dict[str, torch.Tensor]

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module) -> "WeightsCopy":
        """Copies the weights of a model, unwrapped."""
        return cls({name: tensor.detach().to("cpu", copy=True) for name, tensor in _tensors_of(model).items()})

    @torch.no_grad()
    def restore_(self, model: nn.Module) -> None:
        """Gives the weights back to their model, in place: its parameters stay the objects that they are."""
        for name, tensor in _tensors_of(model).items():
            tensor.copy_(self.tensors[name])

    def digest(self) -> str:
        """A SHA-256 over names, shapes, dtypes and bytes: equal weights have equal digests on every machine."""
        sha = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            sha.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
            sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return sha.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the weights as safetensors; the file appears whole or not at all."""
        save_tensors(self.tensors, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "WeightsCopy":
        """Reads what `save` wrote, onto the CPU.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is truncated or not a file of weights.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no weights at {path}.")
        try:
            return cls(load_file(path))
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or not a file of weights ({error}).") from error


def _tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and persistent buffers, each once."""
    buffers = dict(model.named_buffers())
    saved = model.state_dict(keep_vars=True)
    return dict(model.named_parameters()) | {name: buffers[name] for name in buffers if name in saved}
