"""A task: a model that is to be pruned, and the data that go with it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments


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

    def trainer(
        self, model: nn.Module, args: TrainingArguments, kind: Callable[..., Trainer] = Trainer, **more: Any
    ) -> Trainer:
        """A Trainer of this task that prints nothing.

        Args:
            model: The model.
            args: Its arguments.
            kind: What makes it.
            more: Further arguments of `kind`.
        """
        trainer = kind(model, args, **self.trainer_kwargs, **more)
        trainer.remove_callback(PrinterCallback)
        return trainer
