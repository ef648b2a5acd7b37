"""Prunes a ViT while it trains: by default a small ViT on handwritten digits, nothing to download.

accelerate launch recipes/vit.py
accelerate launch recipes/vit.py --sparsity 0.8 --schedule one_shot
accelerate launch recipes/vit.py --sparsity 0.5 --granularity head+neuron
accelerate launch recipes/vit.py --model_name_or_path google/vit-base-patch16-224-in21k \
    --dataset uoft-cs/cifar10 --num_train_epochs 3
"""

from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

from common.classification import DEFAULTS as CLASSIFICATION
from common.classification import SMALL_MODEL, ScriptArguments, classification_task, prune_classifier
from common.task import Task

DEFAULTS = {**CLASSIFICATION, "output_dir": "output/vit"}
PRUNING = {"sparsity": 0.9}
STUDY = {"dense_steps": 2000, "budget": 75}  # With more steps, one shot loses nothing that 287 test images could show.


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
    return classification_task(script, training, small_vit)


if __name__ == "__main__":
    prune_classifier(load_task, DEFAULTS, SMALL_MODEL, PRUNING)
