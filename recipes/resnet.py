"""Prunes a ResNet while it trains: by default a small one on handwritten digits, nothing to download.

accelerate launch recipes/resnet.py
accelerate launch recipes/resnet.py --sparsity 0.5 --granularity channel
accelerate launch recipes/resnet.py --model_name_or_path microsoft/resnet-50 --dataset uoft-cs/cifar10 \
    --num_train_epochs 3
"""

from transformers import ResNetConfig, ResNetForImageClassification, TrainingArguments

from common.classification import DEFAULTS as CLASSIFICATION
from common.classification import SMALL_MODEL, ScriptArguments, classification_task, prune_classifier
from common.task import Task

DEFAULTS = {**CLASSIFICATION, "output_dir": "output/resnet"}
PRUNING = {"sparsity": 0.9}
STUDY = {"dense_steps": 1000, "budget": 75}


def small_resnet(image_size: int, labels: list[str]) -> ResNetForImageClassification:
    """A ResNet with about 180,000 random weights in six blocks."""
    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=16,
            hidden_sizes=[16, 32, 64],
            depths=[2, 2, 2],
            layer_type="basic",
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
        )
    )


def load_task(script: ScriptArguments, training: TrainingArguments) -> Task:
    """Images in three splits, and the model that is to be pruned."""
    # Larger than digits are, because the network makes them eight times smaller before its last stage.
    return classification_task(script, training, small_resnet, side=32)


if __name__ == "__main__":
    prune_classifier(load_task, DEFAULTS, SMALL_MODEL, PRUNING)
