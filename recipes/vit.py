"""Prunes an image classifier while it trains: by default a small ViT on handwritten digits, nothing to download.

accelerate launch recipes/vit.py
accelerate launch recipes/vit.py --sparsity 0.8 --schedule one_shot
accelerate launch recipes/vit.py --model_name_or_path google/vit-base-patch16-224-in21k \
    --dataset uoft-cs/cifar10 --num_train_epochs 3
"""

from dataclasses import dataclass, field

from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    set_seed,
)

from common.arguments import parse
from common.dense import DenseArguments, dense_model
from common.images import ImageCollator, load_images
from common.report import report
from common.splits import SplitArguments, three_splits
from common.task import Task
from hf_prune import PruningTrainerCallback
from hf_prune.metrics import accuracy_metrics

DEFAULTS = {
    "output_dir": "output/vit",
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
PRUNING = {"sparsity": 0.9}
STUDY = {"dense_steps": 2000, "budget": 75}  # With more steps, one shot loses nothing that 287 test images could show.


@dataclass
class ScriptArguments(SplitArguments, DenseArguments):
    """Which images, which model."""

    dataset: str = field(
        default="digits",
        metadata={"help": "digits, a folder of images or IDX files, or a dataset of the Hub."},
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or Hub name of a pretrained model; a small ViT if left out."}
    )


def small_vit(image_size: int, labels: list[str]) -> ViTForImageClassification:
    """A ViT with about 200,000 random weights that sees 16 to 64 patches of an image."""
    return ViTForImageClassification(
        ViTConfig(
            image_size=image_size,
            patch_size=2 if image_size < 16 else 4,
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=256,
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
        )
    )


def load_task(script: ScriptArguments, training: TrainingArguments) -> Task:
    """Images in three splits, and the model that is to be pruned."""
    with training.main_process_first():  # so that the others find what `datasets` has cached
        images = three_splits(load_images(script.dataset), script, training.seed)
        labels = images["train"].features["label"].names
        if script.model_name_or_path:
            processor = AutoImageProcessor.from_pretrained(script.model_name_or_path, backend="pil")
        else:
            side = min(32, *images["train"][0]["image"].size) // 4 * 4
            processor = ViTImageProcessorPil(size={"height": side, "width": side})

    def make_model() -> PreTrainedModel:
        if not script.model_name_or_path:
            return small_vit(processor.size["height"], labels)
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


def main() -> None:
    """Images, dense model, pruning, report."""
    script, pruning, training = parse(ScriptArguments, DEFAULTS, SMALL_MODEL, PRUNING)
    set_seed(training.seed)
    task = load_task(script, training)
    model = dense_model(task, script, training)

    callback = PruningTrainerCallback(pruning)
    trainer = Trainer(model, training, callbacks=[callback], **task.trainer_kwargs)
    callback.evaluate = trainer.evaluate
    callback.log = trainer.log

    dense_test = trainer.predict(task.test)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    report(trainer, callback, dense_test, trainer.predict(task.test))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
