"""Checkpoints: where an interrupted run is found again, and whether what is there is whole."""

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypedDict, cast

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .masks import MaskSet

MASKS_NAME = "pruning_masks.safetensors"

logger = logging.getLogger(__name__)


class Progress(TypedDict):
    """What a pruning run puts into the trainer's state, as JSON."""

    config: dict[str, object]
    criterion: str
    cuts: list[int]
    masks: str | None
    history: dict[str, object]


def find_checkpoint(folders: Iterable[Path], callback: str, progress: Progress) -> Path | None:
    """Finds the checkpoint from which a trainer's state was read; Trainer does not tell callbacks its path.

    Args:
        folders: Where it may be.
        callback: The name under which the callback's state is stored.
        progress: What that state says. Its clocks make it unlike that of any other checkpoint.

    Returns:
        The folder, or None if it is elsewhere.
    """
    wanted = json.dumps(progress, sort_keys=True)
    return next((f for f in folders if json.dumps(_stored_progress(f, callback), sort_keys=True) == wanted), None)


def load_renamed_weights_(model: nn.Module, folder: Path) -> None:
    """Loads a checkpoint's weights if its names for them are not the model's; does nothing otherwise.

    `save_pretrained` writes the names of the Hub, and for some models (ViT, fused experts) they are not those in
    memory. `from_pretrained` translates; Trainer, when it resumes and when it brings back the best model, does not,
    and silently leaves such weights as they are (transformers issue 48805).

    Args:
        model: The model, unwrapped; changed in place.
        folder: The checkpoint.
    """
    if isinstance(model, PreTrainedModel) and not _names_in(folder) <= set(model.state_dict()):
        saved = type(model).from_pretrained(folder, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())


def recover_masks(folder: Path | None, digest: str, model: nn.Module, names: Iterable[str]) -> MaskSet | None:
    """Finds the masks of a digest: in the checkpoint, else in the zeros of the model.

    A run that is killed between the trainer's state and the masks leaves a checkpoint without the latter; unless a
    weight that is not pruned happens to be zero, they are the zeros of its weights.

    Args:
        folder: The checkpoint, None if it is unknown.
        digest: `MaskSet.digest()` of the masks, as the checkpoint recorded it.
        model: The model with the checkpoint's weights.
        names: The parameters that have masks.

    Returns:
        The masks, on the devices of their weights; None if there are none whose weights are zero.
    """
    for masks in (None if folder is None else _load(folder), MaskSet.from_zeros(model, names)):
        if masks is not None and masks.digest() == digest:
            masks = MaskSet({name: mask.to(model.get_parameter(name).device) for name, mask in masks.items()})
            return masks if _are_zero(model, masks) else None
    return None


def newest_complete(output_dir: Path, callback: str) -> Path | None:
    """The newest checkpoint from which a pruning run can be resumed.

    Args:
        output_dir: The folder that holds the checkpoints.
        callback: The name under which the callback's state is stored.

    Returns:
        A checkpoint folder, or None if there is none.
    """
    for folder in sorted(output_dir.glob("checkpoint-*"), key=_step, reverse=True):
        progress = _stored_progress(folder, callback)
        if progress is not None:
            masks = _load(folder)
            if progress["masks"] is None or (masks is not None and masks.digest() == progress["masks"]):
                return folder
    return None


def progress_of(stored: object, callback: str) -> Progress:
    """Reads what a pruning run put into the trainer's state.

    Args:
        stored: `TrainerState.stateful_callbacks` of the checkpoint.
        callback: The name under which the callback's state is stored.

    Returns:
        The progress.

    Raises:
        ValueError: if there is none, or more than one.
    """
    state = stored.get(callback) if isinstance(stored, Mapping) else None
    if isinstance(state, list):
        raise ValueError(f"the checkpoint holds the state of {len(state)} {callback}s; a run can have one.")
    progress = state.get("progress") if isinstance(state, Mapping) else None
    if not isinstance(progress, Mapping):
        raise ValueError(
            f"the checkpoint holds no state of a {callback}: it was not saved by a pruning run. "
            "To prune it, load its weights as the model and train without resume_from_checkpoint."
        )
    return cast(Progress, progress)


@torch.no_grad()
def _are_zero(model: nn.Module, masks: MaskSet) -> bool:
    """Whether every masked weight of the model is zero."""
    return not any(torch.any(model.get_parameter(name).masked_fill(mask, 0)) for name, mask in masks.items())


def _stored_progress(folder: Path, callback: str) -> Progress | None:
    try:
        state = json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        return progress_of(state["stateful_callbacks"], callback)
    except (OSError, ValueError, KeyError):
        return None  # Not a checkpoint of a pruning run, or one that was being written.


def _names_in(folder: Path) -> set[str]:
    """The names of the weights in a checkpoint; empty if it has no safetensors."""
    index, whole = folder / SAFE_WEIGHTS_INDEX_NAME, folder / SAFE_WEIGHTS_NAME
    if index.is_file():
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    if not whole.is_file():
        return set()
    with safe_open(whole, framework="pt") as file:
        return set(file.keys())


def _load(folder: Path) -> MaskSet | None:
    try:
        return MaskSet.load(folder / MASKS_NAME)
    except FileNotFoundError:
        return None
    except ValueError as error:
        logger.warning("%s", error)
        return None


def _step(folder: Path) -> int:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1
