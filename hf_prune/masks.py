"""Masks: a side table from parameter names to what is kept."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from .digests import Digest
from .files import Layout, save_tensors
from .processes import sum_over_processes_
from .shards import from_own, is_sharded, own, rows_held, whole
from .targets import find_targets
from .zero import is_whole, mask_parts_, shape_of

_FORMAT = "hf_prune.masks"
_PIECE = 2**20  # weights that are multiplied at once


class MaskSet(Mapping[str, torch.Tensor]):
    """Bool masks by parameter name, True = kept; one byte a weight, bit-packed on disk.

    The weights of the model stay ordinary parameters: nothing is renamed, wrapped or added to its `state_dict`. Masks
    of sharded parameters are sharded as these are; what looks at all of them is then called by all processes. What is
    in a mask does not change.

    Args:
        masks: Name of a parameter in the unwrapped model → bool tensor of the parameter's shape.

    Raises:
        TypeError: if a mask is not a bool tensor.

    Example:
        >>> masks = MaskSet({"weight": torch.tensor([[True, False], [True, True]])})
        >>> masks.sparsity
        0.25
    """

    def __init__(self, masks: Mapping[str, torch.Tensor] | None = None) -> None:
        self._masks = dict(masks or {})
        self._digest: str | None = None
        self._masked: int | None = None
        for name, mask in self._masks.items():
            if not (torch.is_tensor(mask) and mask.dtype == torch.bool):
                got = mask.dtype if torch.is_tensor(mask) else type(mask).__name__
                raise TypeError(f"the mask of {name!r} must be a bool tensor (True = kept), got {got}.")

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MaskSet) and self.digest() == other.digest()

    def __repr__(self) -> str:
        return f"MaskSet({len(self)} masks, {self.total} weights, sparsity {self.sparsity:.4f})"

    @property
    def total(self) -> int:
        """Number of weights under masks."""
        return sum(mask.numel() for mask in self.values())

    @property
    def masked(self) -> int:
        """Number of weights masked away."""
        if self._masked is None:
            self._masked = sum(masked_in(mask) for mask in self.values())
        return self._masked

    @property
    def sparsity(self) -> float:
        """Fraction of the weights under masks that are masked away; 0 where there are none."""
        return self.masked / self.total if self.total else 0.0

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> None:
        """Sets the masked weights of `model` to zero, in place.

        Raises:
            ValueError: if the model lacks a parameter, or one has another shape than its mask. The model is then as
                it was.
        """
        parameters = []
        for name, mask in self.items():
            try:
                parameter = model.get_parameter(name)
            except AttributeError:
                raise ValueError(f"the model has no parameter {name!r}; the masks are of another model.") from None
            if shape_of(parameter) != mask.shape:
                raise ValueError(
                    f"the mask of {name!r} has shape {tuple(mask.shape)}, the parameter {tuple(shape_of(parameter))}; "
                    "the masks are of another model."
                )
            parameters.append(parameter)
        for parameter, mask in zip(parameters, self.values(), strict=True):
            if is_whole(parameter):
                held = own(parameter)
                mask_(held, own(mask).to(held.device))
            mask_parts_(parameter, mask)

    @classmethod
    @torch.no_grad()
    def from_zeros(cls, model: nn.Module, names: Iterable[str] | None = None) -> "MaskSet":
        """Reads the masks from the zeros of a model.

        Args:
            model: A model that is sparse already.
            names: The parameters to read; the default targets if None.

        Returns:
            Masks that are False exactly where a weight is zero.

        Raises:
            ValueError: as `find_targets` does, if `names` is None.
            AttributeError: if the model has no parameter of a name.
        """
        if names is None:
            names = find_targets(model)
        return cls({name: model.get_parameter(name) != 0 for name in names})

    def digest(self) -> str:
        """A SHA-256 over names, shapes and bits: equal masks have equal digests on every device and machine."""
        if self._digest is None:
            digest = Digest(together=self.are_sharded)
            for name in sorted(self):
                mask = torch.atleast_1d(own(self[name])).cpu().numpy()
                bits = np.packbits(mask.reshape(len(mask), math.prod(mask.shape[1:])), axis=1)
                first = rows_held(self[name]).start if is_sharded(self[name]) else None
                digest.add([name, list(self[name].shape)], bits, first)
            self._digest = digest.hexdigest()
        return self._digest

    def settle_(self) -> None:
        """Counts and digests sharded masks; all processes call this, and each may then ask by itself."""
        if self.are_sharded:
            self._masked = self.masked
            self._digest = self.digest()

    def digests(self) -> dict[str, str]:
        """The digest of each mask by itself."""
        return {name: MaskSet({name: mask}).digest() for name, mask in self.items()}

    @property
    def are_sharded(self) -> bool:
        """Whether each process has a part of each mask."""
        return any(is_sharded(mask) for mask in self.values())

    def save(self, path: str | os.PathLike[str], *, write: bool = True) -> None:
        """Writes the masks as safetensors, one bit a weight; the file appears whole or not at all.

        Args:
            path: Where to.
            write: Whether this process writes. All of them call this where masks are sharded.
        """
        layout = {name: Layout(torch.uint8, [(mask.numel() + 7) // 8]) for name, mask in self.items()}
        shapes = json.dumps({name: list(mask.shape) for name, mask in self.items()})
        metadata = {"format": _FORMAT, "shapes": shapes}
        save_tensors(layout, lambda name: _pack(self[name]), path, metadata, write=write, together=self.are_sharded)

    @classmethod
    def load(cls, path: str | os.PathLike[str], like: Mapping[str, torch.Tensor] | None = None) -> "MaskSet":
        """Reads what `save` wrote, onto the CPU.

        Args:
            path: Where from.
            like: Name → sharded tensor: of these masks only the rows are read that this process holds, and they are
                sharded and placed as the tensors are.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is truncated or not a file of masks, or of masks with other shapes than `like`.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no masks at {path}.")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError(f"its format is {metadata.get('format')!r}")
                shapes = json.loads(metadata["shapes"])
                return cls({name: _read(file, name, shape, (like or {}).get(name)) for name, shape in shapes.items()})
        except (SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is truncated or not a file of masks ({error}).") from error


def mask_(tensor: torch.Tensor, mask: torch.Tensor) -> None:
    """Multiplies a tensor with a mask of its shape and device, in place."""
    # On a CPU torch first makes a copy of the mask in the tensor's dtype: in pieces, so that it stays in the cache.
    pieces = max(1, math.ceil(tensor.numel() / _PIECE)) if tensor.is_cpu else 1
    factor = mask.view(torch.uint8)  # floats are multiplied by bytes faster than by bools
    tensor, factor = torch.atleast_1d(tensor, factor)
    for piece, kept in zip(tensor.chunk(pieces), factor.chunk(pieces), strict=True):
        piece.mul_(kept)


def masked_in(mask: torch.Tensor) -> int:
    """Number of weights that a mask prunes; of a sharded one, on all processes together."""
    held = own(mask)
    # NumPy counts bools several times faster than torch does.
    kept = np.count_nonzero(held.numpy()) if held.is_cpu else held.count_nonzero()
    if is_sharded(mask):
        kept = sum_over_processes_(torch.tensor(int(kept), device=held.device))
    return mask.numel() - int(kept)


def _pack(mask: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.packbits(whole(mask).cpu().numpy()))


def _read(file: safe_open, name: str, shape: list[int], like: torch.Tensor | None) -> torch.Tensor:
    """A mask of a file; of one that is to be sharded as another tensor is, the rows that this process holds."""
    packed, count = file.get_slice(name), math.prod(shape)
    if packed.get_dtype() != "U8" or packed.get_shape() != [(count + 7) // 8] or min(shape, default=0) < 0:
        raise ValueError(f"{packed.get_shape()} of {packed.get_dtype()} cannot be a mask of shape {shape}")
    if like is None:
        return _unpack(packed[:], 0, count).view(shape)
    if shape != list(like.shape):
        raise ValueError(f"{name!r} has shape {shape}, and the weight {list(like.shape)}")
    rows, row = rows_held(like), math.prod(shape[1:])
    first, last = rows.start * row, rows.stop * row
    held = _unpack(packed[first // 8 : (last + 7) // 8], first % 8, last - first).view(-1, *shape[1:])
    return from_own(held.to(own(like).device), like)


def _unpack(packed: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """So many bits from one on."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=first + count)[first:].astype(bool))
