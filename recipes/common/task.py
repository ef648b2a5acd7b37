"""A task: a model that is to be pruned, and the data that go with it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments, default_data_collator


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

    def samples(self, batch_size: int, seed: int) -> DataLoader[Any]:
        """Training data to calibrate with, in an order that a seed decides."""
        return DataLoader(
            self.trainer_kwargs["train_dataset"],
            batch_size=batch_size,
            shuffle=True,
            generator=torch.Generator().manual_seed(seed),
            collate_fn=self.trainer_kwargs.get("data_collator", default_data_collator),
        )
