"""Decompression: how Transformers makes a weight of what stands for it in a file."""

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps

from ..weights.compression import BITMASK, decompress


class Decompress(ConversionOps):
    """Makes a weight of the two tensors that stand for it in a file.

    Args:
        shape: The weight's shape, as it was recorded.
    """

    def __init__(self, shape: list[int]) -> None:
        self.shape = shape

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, list[torch.Tensor]], *, full_layer_name: str, model: PreTrainedModel, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """The weight, of its bits and its values: both have to be there, and to fit each other.

        It has the shape in which it was saved. If the model's is another one, Transformers says so, or ignores it.
        """
        found = {pattern.endswith(BITMASK): tensor for pattern, (tensor,) in input_dict.items()}
        if True not in found and False in found and self._is_whole(found[False], full_layer_name, model):
            return {full_layer_name: found[False]}  # The model was saved anew, with a config from before.
        if len(found) < 2:
            what = "values" if True in found else "bits"
            raise ValueError(f"{full_layer_name!r} is compressed, and its {what} are missing.")
        return {full_layer_name: decompress(full_layer_name, found[True], found[False], self.shape)}

    def _is_whole(self, tensor: torch.Tensor, name: str, model: PreTrainedModel) -> bool:
        """Whether a tensor in a file is the weight, and not the values of one that is compressed."""
        return tensor.ndim > 1 or list(tensor.shape) in (self.shape, list(model.get_parameter_or_buffer(name).shape))
