"""Savings: what a model takes before and after its pruned structures are removed."""

from collections.abc import Callable, Iterable, Mapping

import torch
from transformers import PreTrainedModel

from ..calibration.batches import Batch, take_samples
from ..calibration.contexts import whole_on_error
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
        ValueError: as `shrink` does, or if the model can no longer be called. It is then as it was.
    """
    masked = measure_cost_or_parameters(model, batches)
    # Where a forward pass can be measured, its batch is one with which outputs can be compared.
    batch = None if batches is None or masked.flops is None else next(iter(batches()))
    with whole_on_error(model):
        shrink(model, masks, batch=batch and take_samples(batch, slice(0, 1)))
        shrunk = measure_cost_or_parameters(model, batches)
        if masked.flops is not None and shrunk.flops is None:
            raise ValueError(f"without what was pruned, {type(model).__name__} can no longer be called.")
    return {"masked": masked, "shrunk": shrunk}
