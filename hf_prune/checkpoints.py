"""Checkpoints: where the masks of an interrupted run are found again, and whether they are the right ones."""

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypedDict, cast

import torch
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME

from .masks import MaskSet

MASKS_NAME = "pruning_masks.safetensors"

logger = logging.getLogger(__name__)


def recover_masks(folders: Iterable[Path], digest: str, model: nn.Module, names: Iterable[str]) -> MaskSet | None:
    """Finds the masks of a digest: in the first folder that has them, else in the zeros of the model.

    A run that is killed between the trainer's state and the masks leaves a checkpoint without the latter; unless a
    weight that is not pruned happens to be zero, they are the zeros of its weights.

    Args:
        folders: Checkpoint folders to look into.
        digest: `MaskSet.digest()` of the masks, as the checkpoint recorded it.
        model: The model with the checkpoint's weights.
        names: The parameters that have masks.

    Returns:
        The masks, or None if they are nowhere.
    """
    for masks in [*map(_load, folders), MaskSet.from_zeros(model, names)]:
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
        try:
            stored = json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
            digest = stored["stateful_callbacks"][callback]["progress"]["masks"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # Not a checkpoint of a pruning run, or one that was being written.
        masks = _load(folder)
        if digest is None or (masks is not None and masks.digest() == digest):
            return folder
    return None


class Progress(TypedDict):
    """What a pruning run puts into the trainer's state, as JSON."""

    config: dict[str, object]
    criterion: str
    cuts: list[int]
    masks: str | None
    history: dict[str, object]


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
