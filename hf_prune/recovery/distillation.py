"""Distillation: a trainer whose loss also asks for what a teacher says, the dense model for example."""

import copy
import itertools
import logging
import math
import time
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..calibration.batches import IGNORED_LABEL
from ..calibration.passes import base_of, call, ignores_first_label
from ..distributed.zero import has_partitions

logger = logging.getLogger(__name__)

Number = TypeVar("Number", torch.Tensor, float)


class DistillationMixin:
    """Goes before `Trainer`, or a subclass of it, and adds to its loss while it trains; evaluations stay as they are.

    `(1 − w) · L + w · T² · KL(p_teacher ‖ p_student) + h · mean‖s − t‖² / mean‖t‖²`, with the softmax of both at the
    temperature `T`, over the positions that have a label, and with hidden states `s` and `t` of student and teacher.
    Data, collator and labels stay as they are: the teacher reads what the student reads.

    Structures that are pruned change no hidden state's shape. Where layers are gone, those that are left are compared
    with the teacher's at the same relative depth.

    Args:
        teacher: Gives the logits that are asked for. It is put into evaluation mode, and its parameters require no
            gradients any more. It may have other layers, and must have as many logits. If None, a copy of the model
            as it is when the trainer is made, so before `PruningTrainerCallback` cuts.
        temperature: `T`, above 0.
        distillation_weight: `w`, in `[0, 1]`.
        hidden_states_weight: `h`, 0 or more; 0 leaves hidden states out.

    Attributes:
        teacher: The teacher.
        teacher_seconds: Wall-clock time of its forward passes so far, on this process.

    Raises:
        ValueError: if a number is out of its range, the teacher shares parameters with the model, or there is none and
            the model is divided by DeepSpeed; from `train()`, if there are no logits of classes (`[B, C]` or
            `[B, T, C]`), those of the two differ in number, or no hidden states of equal shape can be compared.

    Source: Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531; hidden
    states as in Romero et al. 2015, "FitNets", arXiv 1412.6550.
    """

    def __init__(
        self,
        *args: Any,
        teacher: nn.Module | None = None,
        temperature: float = 2.0,
        distillation_weight: float = 0.5,
        hidden_states_weight: float = 0.0,
        **kwargs: Any,
    ) -> None:
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be above 0 and finite, got {temperature}.")
        if not 0 <= distillation_weight <= 1:
            raise ValueError(f"distillation_weight must be in [0, 1], got {distillation_weight}.")
        if not 0 <= hidden_states_weight < math.inf:
            raise ValueError(f"hidden_states_weight must be 0 or more and finite, got {hidden_states_weight}.")
        if not isinstance(teacher, (nn.Module, type(None))):
            raise TypeError(f"teacher must be a model, got {type(teacher).__name__}. Load it with from_pretrained.")
        super().__init__(*args, **kwargs)
        trainer: Any = self
        if teacher is None:
            if has_partitions(trainer.model):
                raise ValueError("DeepSpeed holds the model in parts, of which no copy can teach: give a teacher.")
            teacher = copy.deepcopy(trainer.model)
        own = {id(parameter) for parameter in trainer.model.parameters()}
        if any(id(parameter) in own for parameter in teacher.parameters()):
            raise ValueError("teacher shares parameters with the model that it is to teach: give a copy of them.")
        self.teacher: nn.Module = teacher.eval().requires_grad_(False)
        self.temperature = temperature
        self.distillation_weight = distillation_weight
        self.hidden_states_weight = hidden_states_weight
        self.teacher_seconds = 0.0
        self._shifts: bool | None = None  # whether the label of a position is that of the next one; None until seen
        self._soft: tuple[torch.Tensor | float, float] = (0.0, 0.0)  # the sum since it was logged, and of how many
        size = sum(parameter.nbytes for parameter in teacher.parameters())
        logger.info("The teacher takes %.1f MB more of memory.", size / 1e6)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """As in `Trainer`, with what is added to the loss while the model is in training mode."""
        trainer: Any = super()
        if not model.training:
            return trainer.compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        if self.hidden_states_weight:
            inputs = {**inputs, "output_hidden_states": True}
        # It may take labels out of what it is given.
        loss, outputs = trainer.compute_loss(
            model, {**inputs}, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        taught = self._ask_teacher(inputs, next(model.parameters()).device)
        if "logits" not in outputs or "logits" not in taught:
            raise ValueError(f"{type(model).__name__} or its teacher gives no logits, which are what is distilled.")
        soft = self._soft_loss(outputs["logits"], taught["logits"], inputs, num_items_in_batch)
        # Where Trainer adds up the losses of a step, each is a share of it.
        self._soft = self._soft[0] + soft.detach(), self._soft[1] + self._share_of_step(1.0, num_items_in_batch)
        loss = (1 - self.distillation_weight) * loss + self.distillation_weight * soft
        if self.hidden_states_weight:
            far = _distance(outputs, taught)
            loss = loss + self.hidden_states_weight * self._share_of_step(far, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`."""
        self._soft = 0.0, 0.0
        trainer: Any = super()
        return trainer.train(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in `Trainer`; where the loss is logged, with the mean of the teacher's part of it, and its time."""
        total, count = self._soft
        if "loss" in logs and count:
            logs["distillation_loss"] = float(total / count)
            logs["teacher_seconds"] = round(self.teacher_seconds, 3)
            self._soft = 0.0, 0.0
        trainer: Any = super()
        trainer.log(logs, *args, **kwargs)

    def _ask_teacher(self, inputs: Mapping[str, Any], device: torch.device) -> Any:
        start = time.perf_counter()
        if any(parameter.device != device for parameter in itertools.islice(self.teacher.parameters(), 1)):
            self.teacher.to(device)
        # Labels are of use only to decoders, which make their inputs of them.
        config = getattr(self.teacher, "config", None)
        needs_labels = getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" not in inputs
        read = {name: value for name, value in inputs.items() if needs_labels or name != "labels"}
        with torch.no_grad():
            outputs = call(self.teacher, read)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.teacher_seconds += time.perf_counter() - start
        return outputs

    def _soft_loss(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        inputs: Mapping[str, Any],
        num_items_in_batch: torch.Tensor | int | None,
    ) -> torch.Tensor:
        if student.shape != teacher.shape:
            raise ValueError(
                f"the student gives logits of shape {list(student.shape)}, the teacher {list(teacher.shape)}: they "
                "must be alike."
            )
        if student.shape[-1] < 2 or student.ndim > 3:
            raise ValueError(
                f"logits of shape {list(student.shape)} are not those of classes along the last of two or three "
                "dimensions, of which soft targets are made."
            )
        labels = inputs.get("labels")
        if labels is not None and self._shifts_labels(inputs):
            student, teacher, labels = student[:, :-1], teacher[:, :-1], labels[:, 1:]
        # Others are values, or a sequence of a length of its own: they leave no position out.
        are_classes = labels is not None and not labels.is_floating_point() and labels.shape == student.shape[:-1]
        if are_classes:
            student, teacher = (logits[labels != IGNORED_LABEL] for logits in (student, teacher))
        log_student, log_teacher = (
            F.log_softmax(logits.flatten(0, -2).float() / self.temperature, -1) for logits in (student, teacher)
        )
        # A class that neither allows counts for nothing, and not for infinity less infinity.
        ratio = (log_teacher - log_student).masked_fill(log_teacher == -math.inf, 0)
        total = self.temperature**2 * (log_teacher.exp() * ratio).sum()
        if num_items_in_batch is None or not are_classes or not self._is_share_of_step(num_items_in_batch):
            return self._share_of_step(total / max(len(log_student), 1), num_items_in_batch)
        # As the loss of labels: over all batches that are accumulated, and on all processes.
        trainer: Any = self
        args: Any = trainer.args
        if args.n_gpu > 1:  # DataParallel, which has gathered the logits, and told each device of the labels.
            items = torch.as_tensor(num_items_in_batch).flatten()[0]
            return total / (items if args.average_tokens_across_devices else items * args.n_gpu)
        if args.average_tokens_across_devices:
            total = total * (trainer.accelerator.num_processes // trainer.get_tp_size())
        return total / num_items_in_batch

    def _shifts_labels(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the label of a position is that of the next token."""
        if self._shifts is None:
            trainer: Any = self
            model = base_of(trainer.accelerator.unwrap_model(trainer.model))
            self._shifts = bool(getattr(trainer, "_loss_shifts_labels", False)) or _is_causal(model)
            if self._shifts and _is_causal(base_of(self.teacher)):
                labelled = {**inputs, "labels": inputs["labels"].clamp(min=0)}
                try:  # Neither Trainer nor the class's name knows it of those that are the decoder of another model.
                    self._shifts = ignores_first_label(self.teacher, labelled)
                except ValueError as error:  # A teacher need not have a loss.
                    logger.info("Labels are taken for those of the next position: %s", error)
        return self._shifts

    def _is_share_of_step(self, num_items_in_batch: torch.Tensor | int | None) -> bool:
        """Whether Trainer adds up the losses of a step, and does not divide each by their number."""
        trainer: Any = self
        said: bool | None = getattr(trainer, "loss_is_scaled_for_ga", None)
        by_model = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        return bool(by_model or trainer.compute_loss_func is not None) if said is None else said

    def _share_of_step(self, mean: Number, num_items_in_batch: torch.Tensor | int | None) -> Number:
        """A mean over a batch as Trainer wants it."""
        if self._is_share_of_step(num_items_in_batch):
            return mean / getattr(self, "current_gradient_accumulation_steps", 1)
        return mean


class DistillationTrainer(DistillationMixin, Trainer):
    """`transformers.Trainer` with a teacher: see `DistillationMixin` for what it takes beyond Trainer's arguments."""


def _is_causal(model: nn.Module) -> bool:
    return any(kind.__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for kind in type(model).__mro__)


def _distance(student: Mapping[str, Any], teacher: Mapping[str, Any]) -> torch.Tensor:
    """Mean over the pairs at the same relative depth of `mean‖s − t‖² / mean‖t‖²`; encoder and decoder apart."""
    losses = []
    for name in ("hidden_states", "encoder_hidden_states", "decoder_hidden_states"):
        states, asked = student.get(name) or (), teacher.get(name) or ()
        depth = (len(asked) - 1) / max(len(states) - 1, 1)
        pairs = [(state, asked[round(i * depth)]) for i, state in enumerate(states) if asked]
        losses += [
            F.mse_loss(s.float(), t.float()) / t.float().square().mean() for s, t in pairs if s.shape == t.shape
        ]
    if not losses:
        raise ValueError("student and teacher have no hidden states of equal shape: set hidden_states_weight=0.")
    return torch.stack(losses).mean()
