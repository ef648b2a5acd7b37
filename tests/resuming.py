"""A run on several processes that can be killed and resumed: `torchrun -m tests.resuming FOLDER OPTIONS STEP HOW`."""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

from hf_prune import PruningTrainerCallback
from hf_prune.weights import WeightsCopy
from hf_prune.zero import has_zero
from tests.processes import end_processes
from tests.test_resume import PATIENT
from tests.tiny import batch, build
from tests.training import trainer_factory


class KillOne(TrainerCallback):
    """The last process dies in the middle of a step, without a word to the others."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, options: dict, kill_at: int, resume: bool) -> None:
    model = build("llama") if options.pop("float32", False) else build("llama").double()
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
    weights = WeightsCopy.of(trainer.model)
    outcome = {
        "world_size": trainer.args.world_size,
        "backend": torch.distributed.get_backend(),
        "sharded": len(weights.like),
        "partitioned": has_zero(trainer.model),
        "history": history,
        "masks": pruning.masks.digest(),
        "weights": weights.digest(),
        "sums": [float(weights.whole(name).abs().sum()) for name in sorted(weights.tensors)],
    }
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(folder / "saved"))
    (folder / f"rank-{trainer.args.process_index}.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    train(Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "resume")
    end_processes()
