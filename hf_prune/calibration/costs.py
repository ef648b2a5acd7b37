"""Costs: what a forward pass takes, measured."""

import contextlib
import logging
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .batches import Batch
from .contexts import undisturbed
from .passes import call

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cost:
    """What a forward pass of a model takes.

    Attributes:
        parameters: Number of parameters of the model.
        flops: Number of floating-point operations in matrix products and convolutions, two for each multiplication
            that is added up; None without a batch.
        seconds: Wall-clock time, median of several passes; compare only what was measured in turns. None without a
            batch.
    """

    parameters: int
    flops: int | None = None
    seconds: float | None = None


def measure_costs(models: Mapping[str, nn.Module], batch: Batch | None, turns: int = 10) -> dict[str, Cost]:
    """Measures forward passes over a batch in evaluation mode, in turns: model by model, again and again.

    Each unwrapped model is left as it was, and timed `turns` times, after one pass that is not; with `turns=0` its
    FLOPs are counted alone, and without a batch its parameters.

    Example:
        >>> costs = measure_costs({"dense": nn.Linear(4, 3)}, {"input": torch.ones(2, 4)})
        >>> costs["dense"].parameters, costs["dense"].flops
        (15, 48)
    """
    parameters = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    if batch is None:
        return {name: Cost(count) for name, count in parameters.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    flops: dict[str, int] = {}
    with contextlib.ExitStack() as stack:
        for model in models.values():
            stack.enter_context(undisturbed(model))
        stack.enter_context(torch.no_grad())
        batches = {
            name: send_to_device(dict(batch), next(model.parameters()).device) for name, model in models.items()
        }
        for name, model in models.items():
            flops[name] = _flops_of(model, batches[name])
        for _ in range(turns):
            for name, model in models.items():
                device, start = next(model.parameters()).device, time.perf_counter()
                call(model, batches[name])
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(found) if found else None for name, found in seconds.items()}
    return {name: Cost(parameters[name], flops[name], medians[name]) for name in models}


def _flops_of(model: nn.Module, batch: Batch) -> int:
    """The floating-point operations of a forward pass."""
    # Attention that is one operator is not counted on every device; its products are.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        try:
            call(model, batch)
        except AssertionError:  # The counter needs gradients where a hook asks for them, as checkpointing does.
            counter.flop_counts.clear()
            with torch.enable_grad():
                call(model, batch)
    return int(counter.get_total_flops())


def measure_cost_or_parameters(model: nn.Module, batches: Callable[[], Iterable[Batch]] | None) -> Cost:
    """Measures a forward pass over the first batch, or counts parameters alone, with a warning, where it fails."""
    # A training that is over does not fail because nobody can tell what its model costs, drawing a batch included.
    try:
        batch = None if batches is None else next(iter(batches()), None)
        return measure_costs({"model": model}, batch)["model"]
    except Exception:
        logger.warning("Only parameters are counted, since no forward pass could be measured.", exc_info=True)
        return measure_costs({"model": model}, None)["model"]
