"""A task: a model that is to be pruned, and the data that go with it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel


@dataclass
class Task:
    """What a recipe prunes.

    Attributes:
        make_model: Makes the model before any training here: with random weights, or pretrained.
        is_trained: Whether it needs no training before it is pruned.
        parts: What a `Trainer` needs besides model and arguments: datasets that train and steer, collator, metrics,
            tokenizer or image processor.
        test: The dataset that is looked at once, at the end.
    """

    make_model: Callable[[], PreTrainedModel]
    is_trained: bool
    parts: dict[str, Any]
    test: Dataset
