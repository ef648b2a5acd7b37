"""What a recipe prints and saves at the end."""

import copy
from pathlib import Path

from accelerate import PartialState
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import PredictionOutput

from common.task import Task
from hf_prune import PruningTrainerCallback


def predict_apart(model: PreTrainedModel, training: TrainingArguments, task: Task) -> PredictionOutput:
    """What `Trainer.predict` gives on the test split, before the training of the model.

    It is a copy that predicts: a Trainer that has predicted is not to train on several processes, as accelerate then
    takes the model for prepared and leaves its gradients apart.
    """
    return Trainer(copy.deepcopy(model), training, **task.trainer_kwargs).predict(task.test)


def report(
    trainer: Trainer, callback: PruningTrainerCallback, dense: PredictionOutput, pruned: PredictionOutput
) -> None:
    """Prints the rounds and the result on test; saves model, test metrics and plot where the history already is.

    Args:
        trainer: The trainer, after training.
        callback: The callback that pruned.
        dense: What `predict_apart` gave before training.
        pruned: What `trainer.predict` gave on the test split after training.
    """
    assert trainer.model is not None
    history, folder = callback.history, Path(str(trainer.args.output_dir))
    metric = history.metric.removeprefix("eval_")
    results = {f"dense_{name}": value for name, value in (dense.metrics or {}).items()} | (pruned.metrics or {})
    sparsity = history[-1].reached if history else 0.0
    trainer.save_model()
    trainer.save_metrics("test", results)
    if trainer.is_world_process_zero():
        history.plot(folder / "pruning.png")
    PartialState().print(
        f"\n{history}\n\n"
        f"Test {metric}: dense {results[f'dense_test_{metric}']:.4f}, "
        f"pruned to sparsity {sparsity:.4f} {results[f'test_{metric}']:.4f}\n\n"
        f"Saved in {folder}: model, preprocessing, history, and pruning.png. "
        f'Load it with {type(trainer.model).__name__}.from_pretrained("{folder}").'
    )
