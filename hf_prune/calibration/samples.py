"""Samples: batches for a calibration, drawn and read."""

import copy
import itertools
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import IterableDatasetShard
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers.utils.logging import tqdm

from ..criteria import Statistics
from ..distributed.processes import rank_and_size, sum_over_processes_
from .batches import Batch, can_cut, is_batch, placeholders_of, size_of, take_samples, unpacked

logger = logging.getLogger(__name__)

DELAY = 5
"""Seconds after which a calibration shows how far it is."""


@dataclass(frozen=True)
class CalibrationData:
    """What a cut may look at.

    Attributes:
        batches: Gives batches of this process, anew at each call; None if there are none.
        known: Statistics that are there already.
        show_progress: Whether a bar shows how far a pass is, if it takes more than a few seconds.
    """

    batches: Callable[[], Iterable[Batch]] | None = None
    known: Statistics = field(default_factory=dict)
    show_progress: bool = False


def repeatable(dataloader: Iterable[Batch] | None) -> Callable[[], Iterable[Batch]] | None:
    """Gives the batches of a dataloader anew at each call; raises if they can be read only once."""
    if isinstance(dataloader, Iterator):
        raise ValueError(
            f"dataloader is a {type(dataloader).__name__}, which can be read once, and a cut may read the samples "
            "several times. Give a DataLoader or a list of batches."
        )
    return None if dataloader is None else lambda: dataloader


def read_samples(
    model: nn.Module, batches: Iterable[Batch], samples: int, *, show_progress: bool = False
) -> Iterator[Batch]:
    """The first samples of this process's batches, on the device of a model, the last batch cut short.

    Their samples lie along the first dimension, however those of the given batches did. The number of samples is that
    of all processes together.
    """
    (rank, size), device, seen = rank_and_size(), next(model.parameters()).device, 0
    placeholders = placeholders_of(model)
    mine = len(range(rank, samples, size))
    with tqdm(total=mine, desc="Calibrating", unit="sample", delay=DELAY, disable=not show_progress) as bar:
        for batch in batches if mine else ():
            if not is_batch(batch):
                raise TypeError(
                    "calibration batches must be dicts of tensors, with which the model is called; got "
                    f"{', '.join(batch) if isinstance(batch, Mapping) else type(batch).__name__}."
                )
            for each in unpacked(send_to_device(batch, device), placeholders):
                part = take_samples(each, slice(0, mine - seen))
                yield part
                seen += size_of(part)
                bar.update(size_of(part))
                if seen >= mine:
                    return


def require_samples(model: nn.Module, seen: int, samples: int) -> None:
    """Requires that samples were read on any process; warns if all processes together read fewer than asked for."""
    seen = int(sum_over_processes_(torch.tensor(seen, device=next(model.parameters()).device)))
    if seen == 0:
        raise ValueError("there are no calibration samples: the dataloader gave no batch.")
    if seen < samples:
        logger.warning("Calibration has %d samples, fewer than the %d asked for.", seen, samples)


def batches_of(dataloader: DataLoader[Any], samples: int, batch_size: int, seed: int) -> Iterator[Batch]:
    """Calibration batches of this process from the data that a dataloader reads, which itself is left alone.

    Samples of a dataset of known length are drawn with the seed, each once and on one process; a stream is read from
    its beginning. The number of samples is that of all processes together. Batches are as the dataloader's collator
    makes them; as the dataset does, where it has no batch size; of one sample each, where they could not be cut.

    Raises:
        ValueError: if the samples cannot be read without taking them from the training.
    """
    if (dataset := getattr(dataloader, "dataset", None)) is None:
        raise ValueError(
            f"the training data come from a {type(dataloader).__name__}, which has no dataset to read calibration "
            "samples from. Let get_train_dataloader return a DataLoader."
        )
    while isinstance(dataset, IterableDatasetShard):  # So accelerate divides a stream; here it is divided below.
        dataset = dataset.dataset
    drawn: Iterator[Any]
    (rank, size), collate = rank_and_size(), _with_own_generators(dataloader.collate_fn)
    if isinstance(dataset, IterableDataset):
        stream = iter(dataset)
        if id(stream) == id(dataset):
            raise ValueError(
                f"the training dataset ({type(dataset).__name__}) is its own iterator, and a calibration would take "
                "its samples from the training. Let its __iter__ return a new iterator."
            )
        drawn = itertools.islice(stream, rank, samples, size)
    else:
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
        drawn = (dataset[int(i)] for i in order[:samples][rank::size])
    if dataloader.batch_size is None and dataloader.batch_sampler is None:
        yield from map(collate, drawn)
    while rows := list(itertools.islice(drawn, batch_size)):
        batch = collate(rows)
        if is_batch(batch) and not can_cut(batch):  # As patches of images, of which it only knows here
            batch_size = 1  # whose they are.
            yield from (collate([row]) for row in rows)
        else:
            yield batch


def _with_own_generators(collate: Any) -> Any:
    """A collator whose random numbers are not those of another one: only its generators are copied, not its models."""
    if isinstance(collate, MethodType):
        return MethodType(collate.__func__, _with_own_generators(collate.__self__))
    if not hasattr(collate, "__dict__") or isinstance(collate, FunctionType):
        return collate
    own = copy.copy(collate)
    for name, value in vars(collate).items():
        if isinstance(value, (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)):
            object.__setattr__(own, name, copy.deepcopy(value))  # also of a frozen dataclass
        elif name == "data_collator":  # inside of the one by which Trainer leaves out columns
            object.__setattr__(own, name, _with_own_generators(value))
    return own
