"""Masks: a side table from parameter names to what is kept."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..distributed.digests import digest_of, digests_of
from ..distributed.gathering import accessible
from ..distributed.processes import sum_over_processes_
from ..distributed.shards import from_own, is_sharded, own, reshard_, rows_held
from ..distributed.tensor_files import Tensors
from ..distributed.zero import is_present, mask_parts_, shape_of
from .targets import find_targets

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
        self._digests: dict[str, str] | None = None
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
        reshard_(model)
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
            if is_present(parameter):
                held = own(parameter)
                mask_(held, own(mask).to(held.device))
            mask_parts_(parameter, mask)

    @torch.no_grad()
    def rezero_(self, model: nn.Module) -> int:
        """Sets pruned weights of `model` back to zero where something has written into them.

        Parameters that are missing or have another shape are skipped: the model was shrunk or resized since.

        Returns:
            How many were not zero, of those that this process holds.
        """
        reshard_(model)
        parameters, filled = dict(model.named_parameters(remove_duplicate=False)), {}
        for name, mask in self.items():
            parameter = parameters.get(name)
            if parameter is not None and shape_of(parameter) == mask.shape and is_present(parameter):
                held = own(parameter)
                filled[name] = int(((held.abs() > 0) & ~own(mask).to(held.device)).sum())
        MaskSet({name: self[name] for name, count in filled.items() if count}).apply_(model)
        return sum(filled.values())

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
        with accessible(model):
            return cls({name: model.get_parameter(name) != 0 for name in names})

    def digests(self) -> dict[str, str]:
        """The digest of each mask."""
        if self._digests is None:
            described = {name: [name, list(mask.shape)] for name, mask in self.items()}
            first = {name: rows_held(mask).start for name, mask in self.items() if is_sharded(mask)}
            self._digests = digests_of(lambda name: _bits_of(self[name]), described, first)
        return self._digests

    def digest(self) -> str:
        """A SHA-256 over names, shapes and bits: equal masks have equal digests on every device and machine."""
        return digest_of(self.digests())

    def settle_(self) -> None:
        """Counts and digests sharded masks; all processes call this, and each may then ask by itself."""
        if self.are_sharded:
            self._masked = self.masked
            self.digests()

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
        # A byte for every eight weights of a row, so that who holds rows of a mask holds rows of these too.
        packed = {name: torch.from_numpy(_bits_of(mask)) for name, mask in self.items()}
        sharded = {name: mask for name, mask in self.items() if is_sharded(mask)}
        shapes = json.dumps({name: list(mask.shape) for name, mask in self.items()})
        Tensors(packed, sharded, {"format": _FORMAT, "shapes": shapes}).save(path, write=write)

    @classmethod
    def load(cls, path: str | os.PathLike[str], like: Mapping[str, torch.Tensor] | None = None) -> "MaskSet":
        """Reads what `save` wrote.

        Args:
            path: Where from.
            like: Name → tensor: of these masks only those rows are read that this process holds of the tensor, and
                they are sharded and placed as it is. All others are read whole, onto the CPU.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is truncated or not a file of masks, or of masks with other shapes than `like`.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no masks at {path}.")
        like = like or {}
        try:
            packed = Tensors.load(path, like)
            if packed.metadata.get("format") != _FORMAT:
                raise ValueError(f"its format is {packed.metadata.get('format')!r}")
            shapes = {name: torch.Size(shape) for name, shape in json.loads(packed.metadata["shapes"]).items()}
            for name, shape in shapes.items():
                if name in like and shape != like[name].shape:
                    raise ValueError(f"{name!r} has shape {list(shape)}, and the weight {list(like[name].shape)}")
            return cls({name: _unpack(packed, name, shape, like.get(name)) for name, shape in shapes.items()})
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
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


def _bits_of(mask: torch.Tensor) -> np.ndarray:
    held = torch.atleast_1d(own(mask)).cpu()
    return np.packbits(held.reshape(len(held), math.prod(held.shape[1:])).numpy(), axis=1)


def _unpack(packed: Tensors, name: str, shape: torch.Size, like: torch.Tensor | None) -> torch.Tensor:
    bits, rows, width = packed.tensors[name], shape[0] if shape else 1, math.prod(shape[1:])
    if bits.dtype != torch.uint8 or packed.shape_of(name) != (rows, (width + 7) // 8) or min(shape, default=0) < 0:
        raise ValueError(f"{tuple(packed.shape_of(name))} of {bits.dtype} cannot be a mask of shape {list(shape)}")
    kept = torch.from_numpy(np.unpackbits(bits.numpy(), axis=1, count=width).astype(bool))
    if like is None:
        return kept.view(shape)
    return from_own(kept.view(-1, *shape[1:]).to(own(like).device), like)
