"""Optimizers: what a cut does to their moments and learning rate, and which have lost their weights by shrinking."""

import functools
import weakref
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ..distributed.processes import sum_over_processes_
from ..distributed.shards import is_sharded, own
from ..distributed.zero import forget_, is_partitioned, mask_state_

# Optimizers whose model was shrunk. For the whole process: another callback may be given one of them.
_RETIRED: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


@torch.no_grad()
def cut_state_(optimizer: torch.optim.Optimizer, how: str, masks: Mapping[torch.Tensor, torch.Tensor | None]) -> None:
    """Does to an optimizer's state what a cut asks for.

    Args:
        optimizer: The optimizer; changed in place.
        how: "mask" zeroes what it remembers of pruned weights (momentum would push them, and averages of weights
            would bring them back), and forgets what a diverged round has made of a parameter: NaN or infinity;
            "reset" forgets everything, as a new optimizer would; "keep" touches nothing.
        masks: Parameter → its mask, None if it has none.
    """
    if any(is_partitioned(parameter) for parameter in masks):
        if how == "reset":
            forget_(optimizer.state.values())
        elif how == "mask":
            for parameter, mask in masks.items():
                mask_state_(parameter, mask)
        return
    if how == "reset":
        optimizer.state.clear()
    if how == "mask":
        for parameter, state in list(optimizer.state.items()):
            mask = masks.get(parameter)
            values = [v for v in state.values() if torch.is_tensor(v) and v.is_floating_point()]
            for value in values:
                if mask is not None and value.shape == mask.shape:
                    own(value).mul_(own(mask))
            broken = torch.tensor(float(not all(torch.isfinite(own(value)).all() for value in values)))
            if is_sharded(parameter):
                broken = sum_over_processes_(broken.to(own(parameter).device))
            if broken:
                del optimizer.state[parameter]


def require_restartable(scheduler: LRScheduler) -> LambdaLR:
    """Requires a learning rate that is a function of the step.

    Returns:
        The scheduler.

    Raises:
        ValueError: if it is not.
    """
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            f"restart_lr needs a learning rate that is a function of the step, and {type(scheduler).__name__} is not. "
            "Take a lr_scheduler_type such as linear or cosine, and none of DeepSpeed's own; or restart_lr=False."
        )
    return scheduler


def restart_lr_(scheduler: LRScheduler, start: int, steps: int, max_steps: int) -> None:
    """Starts the learning-rate schedule of a run anew, warm-up included, compressed to the length of a round.

    `lr(t) = λ((t − start) · max_steps / steps)`, where `λ` is the schedule of the run.

    Args:
        scheduler: The scheduler; changed in place, and with it the learning rate that the optimizer takes next.
        start: `scheduler.last_epoch` at the cut.
        steps: Number of steps until the schedule is at its end, at least 1.
        max_steps: Number of steps of the run, for which the schedule was made.

    Raises:
        ValueError: as `require_restartable` does.
    """
    scheduler = require_restartable(scheduler)
    lambdas = [_of_the_run(function) for function in scheduler.lr_lambdas]
    scheduler.lr_lambdas = [functools.partial(_restarted, f, start, max_steps / steps) for f in lambdas]
    rates = [base * f(scheduler.last_epoch) for base, f in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def undo_restart_lr_(scheduler: LRScheduler) -> None:
    """Undoes `restart_lr_`, so that a scheduler that is used again begins as its owner made it."""
    if isinstance(scheduler, LambdaLR):
        scheduler.lr_lambdas = [_of_the_run(function) for function in scheduler.lr_lambdas]


def retire(optimizer: torch.optim.Optimizer) -> None:
    """Notes that the weights of an optimizer are no longer the model's."""
    _RETIRED.add(_unwrapped(optimizer))


def require_not_retired(optimizer: torch.optim.Optimizer) -> None:
    """Requires an optimizer that was not retired.

    Raises:
        ValueError: if it was.
    """
    if _unwrapped(optimizer) in _RETIRED:
        raise ValueError(
            "the optimizer holds weights from before the model was shrunk at the end of the last train(). Make a new "
            "Trainer for it."
        )


def _unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside of accelerate's, which is another one in each `train()`."""
    return getattr(optimizer, "optimizer", optimizer)


def _restarted(schedule: Callable[[int], float], start: int, stretch: float, step: int) -> float:
    return schedule((step - start) * stretch)  # type: ignore[arg-type]  # between two steps of the run


def _of_the_run(function: Callable[[int], float]) -> Callable[[int], float]:
    if isinstance(function, functools.partial) and function.func is _restarted:
        return cast(Callable[[int], float], function.args[0])
    return function
