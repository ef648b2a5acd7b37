"""Runs on several processes that can be killed and resumed."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import torch
from transformers import TrainerCallback

from hf_prune import PruningConfig, PruningTrainerCallback
from hf_prune.distributed.zero import has_partitions
from hf_prune.weights.snapshot import Snapshot
from tests.processes import in_turn
from tests.tiny import batch, build
from tests.trainers import FSDP, trainer_factory, zero

# Improves for a while after each cut, so that some of the best weights are of a step that is not a checkpoint's last.
PATIENT = PruningConfig(
    sparsity=0.8, schedule="geometric", rounds=2, begin=1, patience=1, min_round_steps=2, max_round_steps=4,
    restart_lr=True, metric="score", end=6,
)  # fmt: skip
KINDS: dict[str, dict] = {
    "ddp": {},
    "fsdp": FSDP,
    "fsdp-sharded": {"fsdp": True, "fsdp_config": {**FSDP["fsdp_config"], "state_dict_type": "SHARDED_STATE_DICT"}},
    "zero-2": zero(2),
    "zero-3": zero(3),
}


class KillOne(TrainerCallback):
    """The last process dies in the middle of a step, without a word to the others."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, options: dict, kill_at: int, resume: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model = build("llama") if "deepspeed" in options else build("llama").double()
    # Movement is of all that was trained before, and so is in the checkpoint too.
    config = dataclasses.replace(PATIENT, criterion="movement") if "fsdp" in options else PATIENT
    pruning = PruningTrainerCallback(config)
    trainer = trainer_factory(folder)(
        model, pruning, KillOne(kill_at), train_dataset=batch(model, 24), eval_dataset=batch(model, 8, seed=1),
        max_steps=10, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=2,
        per_device_train_batch_size=4 // int(os.environ["WORLD_SIZE"]), warmup_steps=3, **options,
    )  # fmt: skip
    pruning.evaluate, pruning.log = trainer.evaluate, trainer.log

    def compute_metrics(_) -> dict[str, float]:
        """Best two steps after the cut, and worse from there."""
        since = trainer.state.global_step - (pruning.history[-1].step if pruning.history else 0)
        return {"score": -abs(since - 2)}

    trainer.compute_metrics = compute_metrics
    trainer.train(resume_from_checkpoint=resume)
    history = pruning.history.to_dict()
    for row in history["rounds"]:
        del row["seconds"]
    if trainer.is_world_process_zero():  # By itself.
        assert pruning.masks.sparsity == pruning.history[-1].reached
    weights = Snapshot.of(trainer.model)
    outcome = {
        "world_size": trainer.args.world_size,
        "backend": torch.distributed.get_backend(),
        "sharded": len(weights.like),
        "partitioned": has_partitions(trainer.model),
        "history": history,
        "masks": pruning.masks.digest(),
        "weights": weights.digest(),
        "sums": [float(weights.whole(name).abs().sum()) for name in sorted(weights.tensors)],
    }
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(folder / "saved"))
    (folder / f"rank-{trainer.args.process_index}.json").write_text(json.dumps(outcome))


def train_kinds(folder: Path, step: int, how: str, *kinds: str) -> None:
    """One after the other, each in a folder of its kind's name."""
    in_turn(kinds, lambda kind: train(folder / kind, KINDS[kind], step, how == "resume"))
