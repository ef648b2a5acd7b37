"""Saved statistics: what a calibration has found out about a model, for several cuts and for another day."""

import os
from collections.abc import Mapping

import torch
from torch import nn

from ..criteria import Statistics
from ..distributed.tensor_files import Tensors

_FORMAT = "hf_prune.statistics"
_BETWEEN = "/"  # A statistic and what it is of; no name of a statistic holds one.


class CalibrationStatistics(Tensors):
    """What criteria need to know of a model beyond its weights, and of which model that is.

    Attributes:
        tensors: `statistic/name` → values, where the name is that of a parameter, or of a module with structures.
        metadata: A digest of the model's parameters and buffers, one of the values, and the number of samples.
    """

    @classmethod
    def of(cls, model: nn.Module, statistics: Statistics, samples: int) -> "CalibrationStatistics":
        """Statistics of a model, over as many samples."""
        tensors = {f"{s}{_BETWEEN}{name}": v.cpu() for s, values in statistics.items() for name, v in values.items()}
        content = Tensors(tensors).digest()
        return cls(
            tensors, {}, {"format": _FORMAT, "model": _digest(model), "content": content, "samples": str(samples)}
        )

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], like: Mapping[str, torch.Tensor] | None = None
    ) -> "CalibrationStatistics":
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is truncated, was changed, or does not hold statistics.
        """
        found = super().load(path, like)
        is_whole = {"model", "content"} <= found.metadata.keys() and found.metadata.get("samples", "").isdecimal()
        if found.metadata.get("format") != _FORMAT or not is_whole:
            raise ValueError(f"{path} does not hold calibration statistics.")
        if found.metadata["content"] != found.digest():
            raise ValueError(f"{path} was changed after it was written. Calibrate anew.")
        return found

    @property
    def samples(self) -> int:
        """Number of samples that were asked for."""
        return int(self.metadata["samples"])

    def of_model(self, model: nn.Module) -> Statistics:
        """The statistics as criteria read them, on the device of the model.

        Raises:
            ValueError: if they are of another model, or of this one with other weights.
        """
        if self.metadata["model"] != _digest(model):
            raise ValueError(
                f"these statistics are not of this {type(model).__name__} with these weights. They hold for the model "
                "that they were collected from, before it is pruned or trained. Calibrate anew."
            )
        found: dict[str, dict[str, torch.Tensor]] = {}
        weights = dict(model.named_parameters())
        for key, values in self.tensors.items():
            statistic, _, name = key.partition(_BETWEEN)
            # What is known of structures stays on the CPU, where these are chosen.
            found.setdefault(statistic, {})[name] = values.to(weights[name].device) if name in weights else values
        return found


def _digest(model: nn.Module) -> str:
    saved = model.state_dict(keep_vars=True)  # Without buffers that a model computes anew.
    held = [*model.named_parameters(), *((name, buffer) for name, buffer in model.named_buffers() if name in saved)]
    return Tensors({name: tensor.detach() for name, tensor in held}).digest()
