"""The dense stage: a model is trained until validation stops improving, once, and found again the next time."""

import dataclasses
import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from common.arguments import EVALUATIONS
from common.task import Task

# Arguments that decide what is shown, what is kept, and where; or, like the epochs, that the cap on steps overrules.
IRRELEVANT = (
    *("output_dir", "num_train_epochs", "save_", "log", "report_to", "run_name", "project", "disable_tqdm"),
    *("hub_", "push_to_hub", "trackio_"),
)


@dataclass
class DenseArguments:
    """How the dense model is trained before it is pruned. All else is as in `TrainingArguments`."""

    dense_steps: int = field(default=1000, metadata={"help": "Train the dense model for at most this many steps."})
    dense_patience: int = field(
        default=3,
        metadata={"help": f"Stop earlier after this many evaluations, of {EVALUATIONS}, without improvement."},
    )
    dense_dir: str = field(
        default="~/.cache/hf_prune", metadata={"help": "Folder that keeps dense models for the next run."}
    )


def dense_model(task: Task, script: DenseArguments, training: TrainingArguments) -> PreTrainedModel:
    """The model that is to be pruned: trained here, or found where an earlier run of the same task has kept it.

    Args:
        task: The model before any training here, and the data.
        script: Cap, patience and cache folder.
        training: Everything else about the training, such as learning rate, batch size and seed.

    Returns:
        The model with the best validation metric, read from the cache folder, which all processes must see; or the
        task's model as it is, if that is the dense one.

    Raises:
        ValueError: Cap or patience is below 1.
    """
    model = task.make_model()
    if task.has_dense_model:
        return model
    for name in ("dense_steps", "dense_patience"):
        if getattr(script, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(script, name)}.")
    cache = Path(script.dense_dir).expanduser()
    # The best checkpoint is taken as it is: Trainer's own way back to it, `load_best_model_at_end`, loads nothing of
    # models whose weights have other names in files than in memory, such as ViT (transformers issue 48805).
    args = dataclasses.replace(
        training,
        max_steps=script.dense_steps,
        eval_strategy="steps",
        eval_steps=1 / EVALUATIONS,
        save_strategy="best",
        save_total_limit=1,
        save_only_model=True,
        load_best_model_at_end=False,
        resume_from_checkpoint=None,
        push_to_hub=False,
        report_to="none",
    )
    folder = cache / f"{model.config.model_type}-{_digest(model, args, script.dense_patience, task.trainer_kwargs)}"
    # One process decides for all, or those that look later would not train with those that looked before.
    folder, found, process = broadcast_object_list([folder, folder.exists(), os.getpid()])
    if found:
        PartialState().print(f"Dense model: found in {folder}")
    else:
        PartialState().print(f"Dense model: training for {args.max_steps} steps at most; kept in {folder}")
        args.output_dir = str(folder.with_name(f"{folder.name}.{process}.partial"))
        _train(
            Trainer(model, args, callbacks=[EarlyStoppingCallback(script.dense_patience)], **task.trainer_kwargs),
            folder,
        )
    PartialState().wait_for_everyone()
    unset_hf_deepspeed_config()  # ZeRO-3, once used, would divide what is read here, which nothing gathers yet.
    return type(model).from_pretrained(folder, dtype=model.dtype)


def _train(trainer: Trainer, folder: Path) -> None:
    """Trains, and puts the best checkpoint where it is kept."""
    try:
        trainer.train()
        # Renamed when whole, so that a folder of this name is never half a model. Another run may have been first.
        if trainer.is_world_process_zero() and not folder.exists():
            Path(str(trainer.state.best_model_checkpoint)).rename(folder)
    finally:
        if trainer.is_world_process_zero():
            shutil.rmtree(str(trainer.args.output_dir), ignore_errors=True)
    best = f"{trainer.args.metric_for_best_model} {trainer.state.best_metric:.4f}"
    PartialState().print(f"Dense model: trained for {trainer.state.global_step} steps, best {best}")


def _digest(model: PreTrainedModel, args: TrainingArguments, patience: int, parts: dict[str, Any]) -> str:
    """A digest of all that decides the trained weights: the first weights, the data, and how it is trained."""
    settings = {name: value for name, value in args.to_dict().items() if not name.startswith(IRRELEVANT)}
    data = [parts[name]._fingerprint for name in ("train_dataset", "eval_dataset")]
    described = [settings, args.world_size, patience, data, repr(parts["processing_class"]), str(model.config)]
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
    for weight in model.state_dict().values():
        digest.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
