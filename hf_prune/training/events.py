"""Events: what Trainer hands to them, and what users lend."""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..calibration.batches import Batch
from ..calibration.samples import batches_of
from ..distributed.processes import failing_together
from ..distributed.shards import has_shards
from ..distributed.zero import has_partitions, require_maskable

logger = logging.getLogger(__name__)


class Event(NamedTuple):
    """What Trainer hands to a callback, and what users lend.

    Attributes:
        args: The training arguments.
        state: The trainer's state.
        control: What the trainer is to do next.
        model: The model, unwrapped.
        optimizer: The optimizer.
        scheduler: The learning rate's schedule.
        dataloader: The training data of this process; None where Trainer does not hand them out.
        evaluate: `trainer.evaluate`; None if nobody has lent it.
        log: `trainer.log`; None likewise.
    """

    args: TrainingArguments
    state: TrainerState
    control: TrainerControl
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    dataloader: DataLoader[Any] | None
    evaluate: Callable[..., Mapping[str, float]] | None = None
    log: Callable[[dict[str, float]], None] | None = None

    @classmethod
    def of(
        cls, args: TrainingArguments, state: TrainerState, control: TrainerControl, given: Mapping[str, Any]
    ) -> "Event":
        """From the arguments of an event."""
        model, optimizer, scheduler = given["model"], given["optimizer"], given["lr_scheduler"]
        return cls(args, state, control, model, optimizer, scheduler, given.get("train_dataloader"))

    def say(self, sentence: str | None) -> None:
        """Says what every process knows, once."""
        if sentence is not None:
            logger.log(logging.INFO if self.state.is_world_process_zero else logging.DEBUG, "%s", sentence)

    def note(self, entry: dict[str, float]) -> None:
        """Has numbers in the logs of the training; without `log` in the trainer's state alone."""
        if self.log is not None:
            self.log(entry)
        else:
            self.state.log_history.append({**entry, "epoch": self.state.epoch, "step": self.state.global_step})

    def batches(self, samples: int) -> Callable[[], Iterator[Batch]] | None:
        """What draws `samples` training samples, of all processes together, in batches; None where there are none."""
        if self.dataloader is None:
            return None
        return functools.partial(batches_of, self.dataloader, samples, self.args.train_batch_size, self.args.seed)

    def require_supported(self) -> None:
        """Requires a training whose masks hold.

        Raises:
            ValueError: if its parameters are sharded otherwise than by FSDP2 or by DeepSpeed's ZeRO in memory, or its
                gradients will not be averaged over the processes.
        """
        if has_shards(self.model):
            return  # By FSDP2, which also averages gradients; `find_targets` looks at how.
        distributed = PartialState().distributed_type
        if distributed == DistributedType.DEEPSPEED and has_partitions(self.model):
            with failing_together():
                require_maskable(self.model)
            return
        if distributed in (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM):
            raise ValueError(
                f"the model's parameters are sharded ({distributed.value}) in a way that PruningTrainerCallback does "
                "not know. Take FSDP with fsdp_version 2, DeepSpeed with ZeRO stage 1, 2 or 3, "
                "DistributedDataParallel, or one process."
            )
        # accelerate marks what it hands out: with several processes the wrapper, and the model itself only if it was
        # prepared for evaluation alone. Then it finds it marked, and wraps it no more.
        if self.args.world_size > 1 and getattr(self.model, "_is_accelerate_prepared", False):
            raise ValueError(
                f"evaluate() or predict() came before train(): accelerate takes this {type(self.model).__name__} for "
                f"prepared, and would train it on each of the {self.args.world_size} processes apart. Evaluate a copy "
                "of the model with a Trainer of its own, or load the model again."
            )
