"""Image classification: images in three splits, a processor, and a model that is pretrained or small."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    ViTImageProcessorPil,
    set_seed,
)

from common.arguments import parse
from common.dense import DenseArguments, dense_model
from common.images import ImageCollator, load_images
from common.report import DenseTest, end, report
from common.splits import SplitArguments, three_splits
from common.task import Task
from hf_prune import PruningTrainerCallback
from hf_prune.metrics import accuracy_metrics

DEFAULTS = {
    "metric_for_best_model": "accuracy",
    "dense_steps": 1000,
    "dense_patience": 10,
    "remove_unused_columns": False,  # the collator makes the model's inputs from the columns of the dataset
}
SMALL_MODEL = {
    "learning_rate": 1e-3,
    "warmup_steps": 0.1,
    "num_train_epochs": 20,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 128,
}


@dataclass
class ScriptArguments(SplitArguments, DenseArguments):
    """Which images, which model."""

    dataset: str = field(
        default="digits",
        metadata={"help": "digits, a folder of images or IDX files, or a dataset of the Hub."},
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or Hub name of a pretrained model; a small one if left out."}
    )


def classification_task(
    script: ScriptArguments,
    training: TrainingArguments,
    small_model: Callable[[int, list[str]], PreTrainedModel],
    side: int | None = None,
) -> Task:
    """Images in three splits, and the model that is to be pruned.

    Args:
        script: Which images, and which model.
        training: Everything about the training.
        small_model: Builds the model that is trained where no pretrained one is named, from the side of its images
            and the names of the labels.
        side: The side to which its images are brought; their own, at most 32, if None.

    Returns:
        The task.
    """
    with training.main_process_first():  # so that the others find what `datasets` has cached
        images = three_splits(load_images(script.dataset), script, training.seed)
        labels = images["train"].features["label"].names
        if script.model_name_or_path:
            processor = AutoImageProcessor.from_pretrained(script.model_name_or_path, backend="pil")
        else:
            side = side or min(32, *images["train"][0]["image"].size) // 4 * 4
            processor = ViTImageProcessorPil(size={"height": side, "width": side})

    def make_model() -> PreTrainedModel:
        if not script.model_name_or_path:
            return small_model(processor.size["height"], labels)
        return AutoModelForImageClassification.from_pretrained(
            script.model_name_or_path,
            dtype="float32",
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
            ignore_mismatched_sizes=True,
        )

    compute_metrics, preprocess_logits_for_metrics = accuracy_metrics()
    trainer_kwargs = {
        "train_dataset": images["train"],
        "eval_dataset": images["validation"],
        "data_collator": ImageCollator(processor),
        "processing_class": processor,
        "compute_metrics": compute_metrics,
        "preprocess_logits_for_metrics": preprocess_logits_for_metrics,
    }
    return Task(make_model, False, trainer_kwargs, images["test"])


def prune_classifier(
    load_task: Callable[[ScriptArguments, TrainingArguments], Task],
    defaults: Mapping[str, Any],
    small_model_defaults: Mapping[str, Any],
    pruning_defaults: Mapping[str, Any],
) -> None:
    """Images, dense model, pruning, report: a recipe from its command line to its end."""
    script, pruning, training = parse(ScriptArguments, defaults, small_model_defaults, pruning_defaults)
    set_seed(training.seed)
    task = load_task(script, training)
    model = dense_model(task, script, training)
    training = replace(training)  # Made anew, because with DeepSpeed accelerate takes what was made last.

    dense, callback = DenseTest(task.test), PruningTrainerCallback(pruning)
    trainer = Trainer(model, training, callbacks=[dense, callback], **task.trainer_kwargs)
    dense.predict = trainer.predict
    callback.evaluate = trainer.evaluate
    callback.log = trainer.log

    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    report(trainer, callback, dense)
    end(trainer)
