"""Savings: what a model takes before and after its pruned structures are removed."""

from collections.abc import Callable, Iterable, Mapping

import torch
from transformers import PreTrainedModel

from ..calibration.batches import Batch
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
        ValueError, RuntimeError: if they cannot be removed, or the model could be called before and cannot be called
            without them. It is then as it was.
    """
    masked = measure_cost_or_parameters(model, batches)
    with whole_on_error(model):
        shrink(model, masks)
        shrunk = measure_cost_or_parameters(model, batches)
        if masked.flops is not None and shrunk.flops is None:
            raise ValueError(
                f"without them {type(model).__name__} cannot be called any more. Does describe_family name all that "
                "goes with a head or a neuron?"
            )
    return {"masked": masked, "shrunk": shrunk}
