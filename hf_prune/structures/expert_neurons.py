"""Neurons of experts whose weights are fused: as many go of each expert of a layer."""

import math
import re
from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from ..weights.targets import Target
from .experts import Mixture, find_mixtures
from .groups import Member, StructureGroup
from .names import EXPERT_WIDTHS

_IS_BACK = re.compile(r"down|output|w2|fc2")  # How projections back to the residual stream are called.
_IS_ATTENTION = re.compile(r"(^|\.)(self_)?att(n|ention)\.")


def find_expert_neurons(
    model: nn.Module, targets: Mapping[str, Target], multiple_of: int
) -> dict[str, StructureGroup]:
    """Finds the neurons of fused experts, by the weight that leads back from them; none where there are none.

    Experts of attention have no neurons, and experts that are modules of their own are networks as others are.

    Args:
        model: The model, unwrapped.
        targets: The weights that may be pruned; neurons stay of which a matrix is none of them.
        multiple_of: The number of neurons that remain in each expert is a multiple of this.
    """
    found: dict[str, StructureGroup] = {}
    if isinstance(model, PreTrainedModel):
        for mixture in find_mixtures(model):
            group = _group_of(model, mixture, targets, multiple_of)
            if group is not None:
                found[group.name] = group
    return found


def _group_of(
    model: PreTrainedModel, mixture: Mixture, targets: Mapping[str, Target], multiple_of: int
) -> StructureGroup | None:
    matrices = [name for name in mixture.parameters if model.get_parameter(name).ndim == 3]
    back = [name for name in matrices if _IS_BACK.search(name.removeprefix(mixture.name))]
    are_networks = mixture.entries is None and not _IS_ATTENTION.search(mixture.name)
    if not are_networks or len(back) != 1 or not all(name in targets for name in matrices):
        return None
    count, width, last = mixture.count, targets[back[0]].in_features, targets[back[0]]
    members = [Member(last.name, model.get_parameter(last.name), (0, last.axes[-1]), _owners(count, width, 1, True))]
    for name in matrices:
        target = targets[name]
        if name == last.name:
            continue
        if target.out_features % width or target.in_features != last.out_features:
            return None
        # Experts that transformers fuses say whether gates lie beside each other, or each beside what it gates.
        holder = model.get_submodule(name.rpartition(".")[0])
        owners = _owners(count, width, target.out_features // width, getattr(holder, "is_concatenated", True))
        members.append(Member(name, model.get_parameter(name), (0, target.axes[-2]), owners))
        if (bias := f"{name.removesuffix('.weight')}_bias") in mixture.parameters:
            members.append(Member(bias, model.get_parameter(bias), (0, 1), owners))
    config = model.config.get_text_config()
    fields = [name for name in EXPERT_WIDTHS if getattr(config, name, None) == width]
    holders = sorted({name.rpartition(".")[0] for name in matrices})
    return StructureGroup(
        last.module,
        "neuron",
        count * width,
        tuple(members),
        multiple=math.lcm(multiple_of, least_multiple(model, last.weight.dtype)),
        runs=count,
        run_attributes=tuple(
            (path, name)
            for path in holders
            for name in EXPERT_WIDTHS
            if vars(model.get_submodule(path)).get(name) == width
        ),
        run_fields=tuple(fields[:1]),
    )


def least_multiple(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """What widths of fused experts have to be multiples of: their kernels read rows 16 bytes at a time."""
    is_eager = getattr(model.config, "_experts_implementation", None) == "eager"
    return 1 if is_eager or dtype.itemsize > 4 else 16 // dtype.itemsize


def _owners(count: int, width: int, parts: int, are_apart: bool) -> torch.Tensor:
    """`[count, parts · width]`: the neuron that owns each position, of all that there are in the layer."""
    of_one = torch.arange(width)
    of_one = of_one.repeat(parts) if are_apart else of_one.repeat_interleave(parts)
    return torch.arange(count).unsqueeze(1) * width + of_one
