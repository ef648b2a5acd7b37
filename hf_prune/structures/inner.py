"""Inner models: what Transformers knows inside of a model that is none of its own, and what can be done with it."""

from torch import nn
from transformers import PreTrainedModel


def way_in(model: nn.Module) -> str:
    """What to do with a model that is none of Transformers', in a sentence or two for messages."""
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            return (
                f"Inside of it is model.{path}, a {type(module).__name__}: give that. If a Trainer is to train the "
                f"{type(model).__name__}, prune and shrink model.{path} before."
            )
    return (
        "Nor is one inside of it. Choose granularity unstructured, N:M or block:RxC, which prune weights one by one."
    )
