"""Prunes an EfficientNet while it trains: by default a small one on digits, nothing to download.

accelerate launch recipes/efficientnet.py
accelerate launch recipes/efficientnet.py --sparsity 0.5 --granularity channel
accelerate launch recipes/efficientnet.py --model_name_or_path google/efficientnet-b0 --dataset uoft-cs/cifar10 \
    --num_train_epochs 3
"""

from transformers import EfficientNetConfig, EfficientNetForImageClassification, TrainingArguments

from common.classification import DEFAULTS as CLASSIFICATION
from common.classification import SMALL_MODEL, ScriptArguments, classification_task, prune_classifier
from common.task import Task

DEFAULTS = {**CLASSIFICATION, "output_dir": "output/efficientnet"}
PRUNING = {"sparsity": 0.9}
STUDY = {"dense_steps": 1000, "budget": 75}


def small_efficientnet(image_size: int, labels: list[str]) -> EfficientNetForImageClassification:
    """An EfficientNet half as wide and half as deep as the smallest of its paper."""
    return EfficientNetForImageClassification(
        EfficientNetConfig(
            image_size=image_size,
            width_coefficient=0.5,
            depth_coefficient=0.5,
            hidden_dim=640,
            # Weights as small as the default's 0.02 give activations that vanish beside the epsilon of batch norms:
            # nothing is learnt. The momentum is the share of the new batch: at 0.99, the default, running statistics
            # would be those of the last batch.
            initializer_range=0.1,
            batch_norm_momentum=0.1,
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
        )
    )


def load_task(script: ScriptArguments, training: TrainingArguments) -> Task:
    """Images in three splits, and the model that is to be pruned."""
    # Larger than digits are, because the network halves them five times.
    return classification_task(script, training, small_efficientnet, side=32)


if __name__ == "__main__":
    prune_classifier(load_task, DEFAULTS, SMALL_MODEL, PRUNING)
