"""Passes: forward and backward ones over samples, of a model whose weights are whole or sharded.

In a pass each module of FSDP2 gathers its weights from all processes and lets go of them again: so all processes make
every pass together, and what is multiplied are gathered weights, other tensors than the model's parameters.
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers.utils.generic import find_labels

from ..distributed.processes import failing_together, gather_from_processes, rank_and_size
from ..distributed.shards import gathered_parameters, has_shards, own, reshard_
from ..weights.targets import Target
from .batches import IGNORED_LABEL, Batch

_LABELS = ("labels", "label", "label_ids")
_WAY_OUT = (
    "Rename the batch's keys to its arguments. To prune, you can also choose a criterion that looks at no data, such "
    "as magnitude."
)


def targets_in_passes(model: nn.Module, targets: Mapping[str, Target]) -> dict[str, Target]:
    """The targets with the weights that passes compute with: those that FSDP2 gathers, or the model's own."""
    gathered = gathered_parameters(model)
    return {name: dataclasses.replace(t, weight=gathered.get(name, t.weight)) for name, t in targets.items()}


def in_step(model: nn.Module, batches: Iterable[Batch]) -> Iterator[tuple[Batch, bool]]:
    """Batches of this process; and of a sharded model, while other processes have more of them, some of theirs.

    Of such a model all processes make every pass together, so that all of them call this. Reading batches may not wait
    for other processes, and an error in it is raised on all of them.

    Yields:
        A batch on its device, and whether it is of this process: those of others must not count here.
    """
    if not has_shards(model):
        yield from ((batch, True) for batch in batches)
        return
    iterator, (rank, _), device = iter(batches), rank_and_size(), next(model.parameters()).device
    while True:
        with failing_together():
            batch = next(iterator, None)
        have = gather_from_processes(batch is not None)
        if not any(have):
            return
        if not all(have):
            lender = have.index(True)
            lent = gather_from_processes(send_to_device(dict(batch or {}), "cpu") if rank == lender else None)[lender]
        yield (batch, True) if batch is not None else (send_to_device(lent, device), False)


def base_of(model: nn.Module) -> nn.Module:
    """The model without what `torch.compile` and peft have put around it."""
    model = getattr(model, "_orig_mod", model)
    base = getattr(model, "get_base_model", None)
    return base() if callable(base) else model


def call(model: nn.Module, batch: Batch) -> Any:
    """What a model gives for a batch: called by name, or with the batch itself where its forward takes one dict.

    Labels are left out where its forward takes none, as some trainers take them out for a loss of their own.

    Raises:
        ValueError: if its forward takes neither, or fails with the dict.
    """
    try:
        signature = inspect.signature(base_of(model).forward)
    except (TypeError, ValueError):  # Not everything that can be called says how.
        return model(**batch)
    for named in (batch, {name: value for name, value in batch.items() if name not in _LABELS}):
        with contextlib.suppress(TypeError):
            signature.bind(**named)
            break
    else:
        return _call_with_dict(model, signature, batch)
    return model(**named)


def _call_with_dict(model: nn.Module, signature: inspect.Signature, batch: Batch) -> Any:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p for p in signature.parameters.values() if p.default is p.empty and p.kind in positional]
    name, annotation = type(base_of(model)).__name__, str(required[0].annotation).lower() if required else ""
    is_tensor = "tensor" in annotation and "dict" not in annotation and "mapping" not in annotation
    if len(required) != 1 or required[0].name in batch or is_tensor:
        raise ValueError(
            f"{name}.forward takes {', '.join(signature.parameters) or 'nothing'}, and the batch holds "
            f"{', '.join(batch)}. {_WAY_OUT}"
        )
    try:
        return model(dict(batch))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"{name}.forward has no arguments named {', '.join(batch)}. Called with the batch as one dict instead, it "
            f"failed: {error!r}. {_WAY_OUT}"
        ) from error


@contextlib.contextmanager
def explaining_backward_errors(model: nn.Module) -> Iterator[None]:
    """Says what was differentiated, and in which mode, if that fails."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ValueError(
            f"the backward pass of {type(base_of(model)).__name__} failed: {error}. Calibration runs in evaluation "
            "mode, and some models can be differentiated only in training mode. If so, choose a criterion without "
            "gradients, such as magnitude or wanda."
        ) from error


def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The loss of a batch; an error if the model itself gives none."""
    output = call(model, batch)
    if isinstance(output, tuple):  # as Trainer takes it
        loss = output[0] if output and torch.is_tensor(output[0]) and not output[0].ndim else None
    else:
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        keys = [key for key in find_labels(type(base_of(model))) if key not in batch]
        needed = f"They need {' and '.join(map(repr, keys))}"
        lacks = needed if keys else "Its own forward must give it, not a trainer's compute_loss"
        raise ValueError(
            f"{type(model).__name__} gives no loss for calibration batches with {', '.join(batch)}. {lacks} (for "
            "sparsegpt only with scope='global')."
        )
    return loss


@torch.no_grad()
def ignores_first_label(model: nn.Module, batch: Batch) -> bool:
    """Whether a loss does not read the first label of a sequence, because it is that of the next position.

    The model is in evaluation mode. Labels are classes, `[samples, positions]`, of which the first are not all
    ignored.
    """
    without = batch["labels"].clone()
    without[:, 0] = IGNORED_LABEL
    with_it, without_it = (loss_of(model, each) for each in (batch, {**batch, "labels": without}))
    return torch.allclose(with_it, without_it, rtol=1e-6, equal_nan=True)


def gradients_of(model: nn.Module, targets: Mapping[str, Target], batch: Batch) -> dict[str, torch.Tensor]:
    """The gradients of a batch's loss, in float32; `.grad` stays as it is."""
    with torch.enable_grad():
        loss = loss_of(model, batch)
    with explaining_backward_errors(model):
        gradients = torch.autograd.grad(loss, [target.weight for target in targets.values()], allow_unused=True)
    return {n: g.float() for n, g in zip(targets, gradients, strict=True) if g is not None}


def summed_gradients(
    model: nn.Module,
    targets: Mapping[str, Target],
    batch: Batch,
    share: float,
    watched: Mapping[str, Target] | None = None,
) -> dict[str, torch.Tensor]:
    """The gradients of the losses of all processes' batches, summed in float32, for the rows that this process holds.

    FSDP2 averages gradients over the processes while it divides them. `.grad` stays as it is.

    Args:
        model: The model, sharded.
        targets: The weights.
        batch: A batch of this process.
        share: What its loss is multiplied with.
        watched: The targets with the weights that passes compute with, if it is squares that are to be added up: of
            the gradient of each process's loss. They are then made in the dtype of the pass.
    """
    with contextlib.ExitStack() as undo:
        reshard_(model)  # After a forward pass alone some parameters are gathered ones.
        for parameter in model.parameters():
            undo.callback(setattr, parameter, "grad", parameter.grad)
            parameter.grad = None
        for target in (watched or {}).values():
            undo.callback(target.weight.register_hook(torch.square).remove)
        with torch.enable_grad():
            loss = loss_of(model, batch) * share
        with explaining_backward_errors(model):
            loss.backward()
        _, size = rank_and_size()
        found = {name: target.weight.grad for name, target in targets.items()}
        return {name: own(gradient).float() * size for name, gradient in found.items() if gradient is not None}
