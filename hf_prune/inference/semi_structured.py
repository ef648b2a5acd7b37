"""2:4 on GPUs: weights handed to the kernels that make use of the pattern."""

import logging

import torch
from torch import nn

logger = logging.getLogger(__name__)

_DTYPES = (torch.float16, torch.bfloat16)


@torch.no_grad()
def to_sparse_semi_structured(model: nn.Module) -> nn.Module:
    """Stores the 2:4 weights of a model as `torch.sparse.to_sparse_semi_structured` does, for faster products on GPUs.

    For inference: such weights cannot be trained or saved. How much faster it is depends on shapes and batch; small
    ones become slower, so measure. Converted are the weights of Linear, `[out, in]`, that are 2:4 along `in` and of a
    shape that the kernels take: multiples of 16 or 32 by 16, 32 or 64, depending on them. Those of Conv1D (GPT-2) lie
    the other way round, and stay as they are.

    Args:
        model: The model, unwrapped, on a CUDA device of compute capability 8.0 or later, in float16 or bfloat16;
            changed in place.

    Returns:
        The model.

    Raises:
        ValueError: if a weight is not on such a device or of another dtype, or no Linear has a 2:4 weight of a shape
            that the kernels take. The model is then as it was.
    """
    # Of Linear itself: other classes may do more with a weight than to multiply by it.
    linears = {name: each for name, each in model.named_modules() if type(each) is nn.Linear and _is_2_4(each.weight)}
    if not linears:
        raise ValueError(
            'no Linear of this model has a 2:4 weight that is not all zero. Prune it first, with granularity="2:4".'
        )
    for name, linear in linears.items():
        weight = linear.weight
        if not weight.is_cuda or torch.cuda.get_device_capability(weight.device) < (8, 0):
            raise ValueError(
                f"2:4 products need a CUDA device of compute capability 8.0 or later; {name!r} is on {weight.device}."
            )
        if weight.dtype not in _DTYPES:
            raise ValueError(
                f"2:4 products need float16 or bfloat16; {name!r} is {weight.dtype}. Convert the model first: "
                "model.to(torch.bfloat16)."
            )
    converted, errors = {}, []
    for name, linear in linears.items():
        try:
            converted[name] = torch.sparse.to_sparse_semi_structured(linear.weight.contiguous())
        except RuntimeError as error:  # A shape that the kernels do not take.
            errors.append(f"{name}: {error}")
    if not converted:
        raise ValueError(f"none of the 2:4 weights can be converted: {errors[0]}")
    for name, weight in converted.items():
        linears[name].weight = nn.Parameter(weight, requires_grad=False)
    logger.info("Converted %d weights to semi-structured ones.", len(converted))
    for said in errors:
        logger.warning("Not converted: %s", said)
    return model


def _is_2_4(weight: torch.Tensor) -> bool:
    """Whether at most two of every four weights along the inputs are not zero, and some are."""
    if weight.shape[1] % 4 or not weight.numel():
        return False
    most = int((weight != 0).unflatten(1, (-1, 4)).sum(-1).max())
    return 0 < most <= 2
