"""Folders: saved models, read from their files tensor by tensor, so that they may be larger than memory."""

import contextlib
import functools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from ..structures.loading import Record, recorded_in
from ..weights.compression import BITMASK, decompress

# Weights, configs, tokenizers of all kinds, and the card: nothing that is code or a pickle.
_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.tiktoken", "*.jinja", "README.md"]


class Stored(NamedTuple):
    """A tensor of a saved model, mapped to the file if it is not compressed.

    Attributes:
        bytes: What it takes in the file.
        compressed: Whether the file leaves its zeros out.
    """

    tensor: torch.Tensor
    bytes: int
    compressed: bool


class SavedModel(Mapping[str, Stored]):
    """The tensors of a saved model by their names in the files; each is read when it is asked for.

    Args:
        folder: Where it is.

    Attributes:
        folder: As given.
        record: What hf_prune has recorded in `config.json`: shapes of a model that was shrunk, and of compressed
            tensors; empty if that is nothing.

    Raises:
        ValueError: if there is no saved model, or a file is missing or truncated; when a tensor is read, if it is
            compressed and damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        config = self.folder / "config.json"
        self.record: Mapping[str, object] = {}
        if config.is_file():
            self.record = Record(**recorded_in(read_json(config))).to_dict()
        self._shapes: Mapping[str, list[int]] = self.record.get("compressed", {})  # type: ignore[assignment]
        self._files: dict[str, Path] = {}
        for path in files_of_weights(self.folder):
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118 - it is no mapping
                    self._files[self._whole(name)] = path

    def __getitem__(self, name: str) -> Stored:
        with _opened(self._files[name]) as file:
            if name not in self._shapes:
                tensor = file.get_tensor(name)
                return Stored(tensor, tensor.nbytes, False)
            if name + BITMASK not in file.keys():  # noqa: SIM118 - it is no mapping
                raise ValueError(f"{name!r} is compressed, and its bits are missing.")
            bitmask, values = (file.get_tensor(key) for key in (name + BITMASK, name))
            tensor = decompress(name, bitmask, values, self._shapes[name])
            return Stored(tensor, bitmask.nbytes + values.nbytes, True)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._files))

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype of its floating-point tensors, `torch.float32` if there are none."""
        found: set[torch.dtype] = set()
        for path in set(self._files.values()):
            with _opened(path) as file:
                # An empty slice has the dtype, and reads nothing.
                found |= {file.get_slice(name)[:0].dtype for name in file.keys() if file.get_slice(name).get_shape()}  # noqa: SIM118
        floating = [dtype for dtype in found if dtype.is_floating_point]
        return functools.reduce(torch.promote_types, floating) if floating else torch.float32

    def __len__(self) -> int:
        return len(self._files)

    def _whole(self, name: str) -> str:
        """The name of the tensor for which one in a file stands."""
        whole = name.removesuffix(BITMASK)
        return whole if whole in self._shapes else name


def local_folder(model: str) -> Path:
    """The folder of a model: itself, or the one into which its files of the Hub are downloaded."""
    if Path(model).exists():
        return Path(model)
    try:
        validate_repo_id(model)
    except HFValidationError as error:
        raise ValueError(f"{model!r} is neither a folder nor a name on the Hub.") from error
    return Path(snapshot_download(model, allow_patterns=_PATTERNS))


def names_in(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Translates names in files into names in a model, where they are names of the same tensor.

    The files may be those of another version of the model, with its body alone, or with a head.

    Returns:
        Name in the model → name in the files, of those that are in both.
    """
    known, prefix = model.state_dict().keys(), f"{model.base_model_prefix}."
    renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
    found = {}
    for name in names:
        renamed = name
        for renaming in renamings:
            renamed, _ = renaming.rename_source_key(renamed)
        for own in (renamed, prefix + renamed, renamed.removeprefix(prefix)):
            if own in known:
                found[own] = name
                break
    return found


def files_of_weights(folder: Path) -> list[Path]:
    """The files of a saved model's weights; where there are several kinds, those that Transformers reads."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file() and not (folder / names[0]).is_file():
        found = read_json(index).get("weight_map")
        if not isinstance(found, Mapping) or not found or not all(isinstance(name, str) for name in found.values()):
            raise ValueError(f"{index} must name a file for each weight in its 'weight_map'.")
        names = sorted(set(found.values()))
        if strange := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{index} names {strange[0]!r}, which is not a file beside it.")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"{folder} is not a saved model: it has no {missing[0]}.")
    return [folder / name for name in names]


def read_json(path: Path) -> Mapping[str, object]:
    """Reads an object from a file of JSON."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path} is truncated or not JSON ({error}).") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} must hold an object, got {type(found).__name__}.")
    return found


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a file of weights ({error}).") from error
