"""Checkpoints: where an interrupted run is found again, and whether what is there is whole."""

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, TypedDict, TypeVar, cast

import torch
from torch import nn
from transformers import TrainerState, TrainingArguments

from ..distributed.processes import gather_from_processes, sum_over_processes_
from ..distributed.shards import own
from ..plan import Plan, Settings
from ..recovery.lora import has_adapters
from ..reporting.history import PruningHistory
from ..weights.masks import MaskSet
from ..weights.movement import Movement
from ..weights.snapshot import Snapshot, sharded_tensors
from .events import Event
from .renamed_weights import has_other_names_in_files, load_renamed_weights_

TRAINER_STATE_NAME = "trainer_state.json"  # As in `transformers.trainer`, which imports datasets.
MASKS_NAME = "pruning_masks.safetensors"
BEST_NAME = "pruning_best.safetensors"
MOVEMENT_NAME = "pruning_movement.safetensors"
ELSEWHERE = (
    "If the checkpoint is not in output_dir, name it in TrainingArguments(resume_from_checkpoint=...) too: "
    "callbacks are not told the path that is given to train()."
)

logger = logging.getLogger(__name__)

Loaded = TypeVar("Loaded", MaskSet, Snapshot, Movement)


class Progress(TypedDict):
    """What a pruning run puts into the trainer's state, as JSON.

    Keys:
        run: A name that no other run has.
        config: `PruningConfig.to_dict()`.
        criterion: Name of what scores the weights.
        pacing: The fields of the pacing.
        lr_start: `start` of `restart_lr_` at the last cut, None if the learning rate goes on.
        masks: `MaskSet.digest()`, None before the first cut.
        best: `Snapshot.digest()` of the best weights of the current round, None without such weights.
        movement: `Movement.digest()`, what it is known by, None if no criterion asks for it.
        history: `PruningHistory.to_dict()`.
    """

    run: str
    config: dict[str, object]
    criterion: str
    pacing: dict[str, object]
    lr_start: int | None
    masks: str | None
    best: str | None
    movement: str | None
    history: dict[str, object]


def blank_progress(settings: Settings) -> Progress:
    """The progress of a run that has not begun."""
    return {
        "run": "",
        "config": settings.config.to_dict(),
        "criterion": settings.criterion_name,
        "pacing": {},
        "lr_start": None,
        "masks": None,
        "best": None,
        "movement": None,
        "history": PruningHistory().to_dict(),
    }


class Recovered(NamedTuple):
    """What an interrupted run has left, beside what Trainer loads."""

    masks: MaskSet
    best: Snapshot | None
    movement: Movement | None


def require_same(progress: Progress, plan: Plan) -> None:
    """Requires that a run is resumed as it was begun.

    Args:
        progress: What the checkpoint says.
        plan: The plan now.

    Raises:
        ValueError: naming what has changed.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(plan.config)}  # Of what came later.
    theirs = {**defaults, **progress["config"], "criterion": progress["criterion"]}
    ours = {**plan.config.to_dict(), "criterion": plan.criterion_name}
    if changed := [key for key in ours | theirs if ours.get(key) != theirs.get(key)]:
        was = ", ".join(f"{key}={theirs.get(key)!r} (now {ours.get(key)!r})" for key in changed)
        raise ValueError(
            f"the checkpoint was pruned with another config: {was}. Resume with the same one, or load the "
            "checkpoint as the model and start anew with hold_zeros=True."
        )


def recover_(plan: Plan, event: Event, progress: Progress) -> Recovered:
    """Finds what an interrupted run has left in its checkpoint, and loads the weights that Trainer does not load.

    Args:
        plan: What is pruned, and how.
        event: The training's beginning; its model, with what Trainer has loaded, is changed in place.
        progress: What the trainer's state says.

    Returns:
        The masks, on the devices of their weights, none before the first cut; the best weights of the round, or None;
        and the movement, or None.

    Raises:
        ValueError: if one of them is not there as it was recorded.
    """
    model, args, names = event.model, event.args, plan.parameters
    named = [Path(args.resume_from_checkpoint)] if args.resume_from_checkpoint else []
    folders = [*named, checkpoint_folder(args, event.state)]
    folder = _find_checkpoint(folders, progress, event.state.global_step)
    if folder is not None:
        load_renamed_weights_(model, folder)
    elif has_other_names_in_files(model):
        raise ValueError(f"the weights of this {type(model).__name__} cannot be found to be resumed. {ELSEWHERE}")
    sharded = sharded_tensors(model)
    try:
        # A run that is killed between the trainer's state and the masks leaves a checkpoint without the latter; unless
        # a weight that is not pruned happens to be zero, they are the zeros of its weights.
        adapted = has_adapters(model)  # Of such a model the weights are those from before the first cut.
        masks = _recorded(
            "masks of the checkpoint are",
            MASKS_NAME,
            progress["masks"],
            (
                lambda: _load(MaskSet, folder, MASKS_NAME, names),
                lambda: plan.zeros(model),
            ),
            folder,
            lambda found: set(found) == set(names) and (adapted or _are_zero(model, found)),
        )
        if adapted and masks:
            masks.apply_(model)
        best = _recorded(
            "best weights of the round are",
            BEST_NAME,
            progress["best"],
            # They may be those of the checkpoint itself.
            (lambda: Snapshot.of(model), lambda: _load(Snapshot, folder, BEST_NAME, sharded)),
            folder,
        )
        return Recovered(
            masks or MaskSet(),
            best,
            _recorded(
                "movement of the weights is",
                MOVEMENT_NAME,
                progress["movement"],
                (lambda: _load(Movement, folder, MOVEMENT_NAME, sharded),),
                folder,
            ),
        )
    except ValueError as error:
        newest = newest_complete(str(args.output_dir))
        hint = f" The newest complete checkpoint here: {newest}." if newest else ""
        raise ValueError(f"{error}{hint}") from error


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder of the checkpoint that Trainer writes at its present step."""
    output_dir, name = Path(str(args.output_dir)), f"checkpoint-{state.global_step}"
    if state.is_hyper_param_search:
        # Each trial saves into a folder of its own, whose name callbacks are not told.
        trials = output_dir.glob(f"*/{name}")
        return max(trials, key=lambda folder: folder.stat().st_mtime, default=output_dir / name)
    return output_dir / name


def newest_complete(output_dir: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint from which a pruning run can be resumed.

    A run that is killed while it saves leaves a checkpoint that is not whole, and `resume_from_checkpoint=True` takes
    the newest one as it is.

    Args:
        output_dir: The folder that holds the checkpoints.

    Returns:
        A checkpoint folder, or None if there is none.
    """
    for folder in sorted(Path(output_dir).glob("checkpoint-*"), key=_step, reverse=True):
        progress, step = _read_progress(folder)
        if progress is not None and _is_complete(folder, progress, step):
            return folder
    return None


def progress_of(stored: object) -> Progress:
    """Reads what a pruning run put into the trainer's state, whatever the class of its callback is called.

    Args:
        stored: `TrainerState.stateful_callbacks`.

    Returns:
        The progress.

    Raises:
        ValueError: if there is none, or more than one.
    """
    entries = stored.values() if isinstance(stored, Mapping) else ()
    states = [state for entry in entries for state in (entry if isinstance(entry, list) else [entry])]
    found = [state.get("progress") for state in states if isinstance(state, Mapping)]
    found = [p for p in found if isinstance(p, Mapping) and p.keys() >= Progress.__annotations__.keys()]
    if len(found) > 1:
        raise ValueError("there is more than one PruningTrainerCallback; a run can have one.")
    if not found:
        raise ValueError(
            "the checkpoint holds no state of a PruningTrainerCallback: it was not saved by a pruning run. "
            "To prune it, load its weights as the model and train without resume_from_checkpoint."
        )
    return cast(Progress, found[0])


def _find_checkpoint(folders: Iterable[Path], progress: Progress, step: int) -> Path | None:
    """The checkpoint from which a trainer's state was read; Trainer does not tell callbacks its path."""
    for folder in folders:
        found, at = _read_progress(folder)
        if found is not None and (found["run"], at) == (progress["run"], step):
            return folder
    return None


def _recorded(
    what: str,
    name: str,
    digest: str | None,
    candidates: Iterable[Callable[[], Loaded | None]],
    folder: Path | None,
    fits: Callable[[Loaded], bool] = lambda _: True,
) -> Loaded | None:
    """The first of several candidates, made one by one, with the digest on record; None if there is none on record."""
    if digest is None:
        return None
    for find in candidates:
        candidate = find()
        # The digest of rows is computed by all processes together, and one may have found nothing.
        if not all(gather_from_processes(candidate is not None)) or candidate is None:
            continue
        if candidate.digest() == digest and fits(candidate):
            return candidate
    raise ValueError(f"the {what} missing or damaged: no {name} fits the digest on record. {_whereabouts(folder)}")


def _whereabouts(folder: Path | None) -> str:
    return ELSEWHERE if folder is None else f"The checkpoint is {folder}."


@torch.no_grad()
def _are_zero(model: nn.Module, masks: MaskSet) -> bool:
    """Whether every masked weight of the model is zero."""
    weights = {name: model.get_parameter(name) for name in masks}
    found = [torch.any(own(weights[name]).masked_fill(own(mask), 0)) for name, mask in masks.items()]
    count = torch.stack([each.float() for each in found]).sum()
    return not (sum_over_processes_(count) if masks.are_sharded else count)


def _read_progress(folder: Path) -> tuple[Progress | None, int]:
    """A checkpoint's progress and step; None if it is not of a pruning run, or was being written."""
    try:
        state = json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        return progress_of(state["stateful_callbacks"]), state["global_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None, 0


def _is_complete(folder: Path, progress: Progress, step: int) -> bool:
    """Whether masks, best weights and movement are in a checkpoint as it recorded them."""
    rounds = PruningHistory.from_dict(progress["history"])[-1:]
    best_is_own = bool(rounds) and rounds[0].best_step == step  # Then the checkpoint's own weights are the best.
    return (
        _is_as_recorded(MaskSet, folder, MASKS_NAME, progress["masks"])
        and _is_as_recorded(Snapshot, folder, BEST_NAME, None if best_is_own else progress["best"])
        and _is_as_recorded(Movement, folder, MOVEMENT_NAME, progress["movement"])
    )


def _is_as_recorded(kind: type[Loaded], folder: Path, name: str, digest: str | None) -> bool:
    if digest is None:
        return True
    found = _load(kind, folder, name)
    return found is not None and found.digest() == digest


def _load(
    kind: type[Loaded], folder: Path | None, name: str, like: Mapping[str, torch.Tensor] | None = None
) -> Loaded | None:
    if folder is None:
        return None
    try:
        return kind.load(folder / name, like)
    except FileNotFoundError:
        return None
    except ValueError as error:
        logger.warning("%s", error)
        return None


def _step(folder: Path) -> int:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1
