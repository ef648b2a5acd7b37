"""Passes: forward and backward ones over samples, of a model whose weights are whole or sharded.

In a pass each module of FSDP2 gathers its weights from all processes and lets go of them again: so all processes make
every pass together, and what is multiplied are gathered weights, other tensors than the model's parameters.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers.utils.generic import find_labels

from ..distributed.processes import failing_together, gather_from_processes, rank_and_size
from ..distributed.shards import gathered_parameters, has_shards, own, reshard_
from ..weights.targets import Target
from .batches import IGNORED_LABEL, Batch


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


def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The loss of a batch; an error if the model gives none."""
    output = model(**batch)
    if isinstance(output, tuple):  # as Trainer takes it
        loss = output[0] if output and torch.is_tensor(output[0]) and not output[0].ndim else None
    else:
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        keys = [key for key in find_labels(type(base_of(model))) if key not in batch] or ["labels"]
        raise ValueError(
            f"{type(model).__name__} gives no loss for calibration batches with {', '.join(batch)}. "
            f"They need {' and '.join(map(repr, keys))} (for sparsegpt only with scope='global')."
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
            (loss_of(model, batch) * share).backward()
        _, size = rank_and_size()
        found = {name: target.weight.grad for name, target in targets.items()}
        return {name: own(gradient).float() * size for name, gradient in found.items() if gradient is not None}
