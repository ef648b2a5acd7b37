"""A task: a model that is to be pruned, and the data that go with it."""

from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel


@dataclass
class Task:
    """What a recipe prunes.

    Attributes:
        model: The model before any training here: with random weights, or pretrained.
        is_trained: Whether it needs no training before it is pruned.
        parts: What a `Trainer` needs besides model and arguments: datasets that train and steer, collator, metrics,
            tokenizer or image processor.
        test: The dataset that is looked at once, at the end.
    """

    model: PreTrainedModel
    is_trained: bool
    parts: dict[str, Any]
    test: Dataset
