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
        has_dense_model: Whether that is the dense model as it is.
        trainer_kwargs: What a `Trainer` needs besides model and arguments: datasets that train and steer, collator,
            metrics, tokenizer or image processor.
        test: The dataset that decides nothing; what comes out is measured on it.
    """

    make_model: Callable[[], PreTrainedModel]
    has_dense_model: bool
    trainer_kwargs: dict[str, Any]
    test: Dataset
