"""Savings: what a model takes before and after its pruned structures are removed."""

from collections.abc import Callable, Iterable, Mapping

import torch
from transformers import PreTrainedModel

from ..calibration.batches import Batch, take_samples
from ..calibration.costs import Cost, measure_cost_or_parameters
from ..structures.shrinking import shrink


def shrink_measured(
    model: PreTrainedModel,
    masks: Mapping[str, torch.Tensor] | None = None,
    batches: Callable[[], Iterable[Batch]] | None = None,
) -> dict[str, Cost]:
    """Removes what is pruned as a whole, and measures what the model takes before ("masked") and after it ("shrunk").

    Args:
        model: The model, unwrapped; changed in place.
        masks: As in `shrink`.
        batches: Gives batches, anew at each call, of which the first is measured; None to count parameters alone.

    Raises:
        ValueError: as `shrink` does. The model is then as it was.
    """
    masked = measure_cost_or_parameters(model, batches)
    # Where a forward pass can be measured, its batch is one with which outputs can be compared.
    batch = None if batches is None or masked.flops is None else next(iter(batches()))
    shrink(model, masks, batch=batch and take_samples(batch, slice(0, 1)))
    return {"masked": masked, "shrunk": measure_cost_or_parameters(model, batches)}
