"""What a recipe measures before and after, prints and saves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PredictionOutput

from hf_prune import PruningTrainerCallback, push_to_hub


class DenseTest(TrainerCallback, ExportableState):
    """Measures the dense model on the test split, as training begins: put it in front of the callback that prunes.

    Before, several processes cannot: with DistributedDataParallel a model that has predicted is not trained together
    any more, and with FSDP2 none predicts that has no optimizer yet. Every checkpoint keeps what was measured.

    Attributes:
        predict: `Trainer.predict`, to be set once there is a trainer.
        metrics: Name → value, with `dense_test_` in front; of a resumed run, those of its beginning.
    """

    def __init__(self, test: Dataset) -> None:
        self.test = test
        self.predict: Callable[..., PredictionOutput] | None = None
        self.metrics: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measures, or takes what was measured from the checkpoint."""
        if state.global_step == 0:
            assert self.predict is not None
            self.metrics = self.predict(self.test, metric_key_prefix="dense_test").metrics or {}
        else:
            kept: Any = state.stateful_callbacks
            self.metrics = kept[type(self).__name__]["attributes"]["metrics"]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"metrics": self.metrics}}


def report(trainer: Trainer, callback: PruningTrainerCallback, dense: DenseTest) -> None:
    """Measures on test, prints the rounds and the result; saves model, test metrics and plot where the history is,
    and pushes them with a card if the arguments say `push_to_hub`.

    Args:
        trainer: The trainer, after training.
        callback: The callback that pruned.
        dense: The one that measured before.
    """
    assert isinstance(trainer.model, PreTrainedModel)
    history, folder = callback.history, Path(str(trainer.args.output_dir))
    metric = history.metric.removeprefix("eval_")
    results = dense.metrics | (trainer.predict(dense.test).metrics or {})
    sparsity = history[-1].reached if history else 0.0
    if trainer.is_fsdp_enabled:  # Of parts that are saved apart no model could be loaded.
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()
    trainer.save_metrics("test", results)
    if trainer.is_world_process_zero():
        history.plot(folder / "pruning.png")
    if trainer.args.push_to_hub:
        push_to_hub(trainer, metrics=results)
    several = ""
    if (size := trainer.args.world_size) > 1:
        kinds = {"FSDP": trainer.is_fsdp_enabled, "DeepSpeed": trainer.is_deepspeed_enabled}
        kind = next((name for name, is_it in kinds.items() if is_it), "DistributedDataParallel")
        several = f"\nTrained by {size} processes, {kind} over {torch.distributed.get_backend()}.\n"
    PartialState().print(
        f"\n{history}\n{several}\n"
        f"Test {metric}: dense {results.get(f'dense_test_{metric}', float('nan')):.4f}, "
        f"pruned to sparsity {sparsity:.4f} {results[f'test_{metric}']:.4f}\n\n"
        f"Saved in {folder}: model, preprocessing, history, and pruning.png. "
        f'Load it with {(trainer.model.config.architectures or [""])[0]}.from_pretrained("{folder}").'
    )


def end(trainer: Trainer) -> None:
    """Lets go of the other processes, when all of them have done what they had to do."""
    # A process that leaves right after it has sent something may be gone before gloo's threads have let go of what
    # was sent, and is then aborted.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
