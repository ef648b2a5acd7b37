"""By kind: the structures of a model of Transformers, each kind found in its own way."""

import logging
from collections.abc import Collection, Mapping
from typing import cast

from torch import nn
from transformers import PreTrainedModel

from ..weights.targets import Target
from .expert_neurons import find_expert_neurons
from .experts import find_experts
from .families import FAMILIES, is_described
from .groups import StructureGroup, require_own_weights
from .heads_and_neurons import NothingToPrune, find_in_family
from .widths import find_width

logger = logging.getLogger(__name__)


def find_by_kind(
    model: nn.Module, kinds: Collection[str], targets: Mapping[str, Target], multiple_of: int, *, warns: bool = False
) -> dict[str, StructureGroup]:
    """Finds the structures of some kinds in a model, by name.

    Args:
        model: The model, unwrapped.
        kinds: Some of `KINDS`, no channels.
        targets: The weights that may be pruned.
        multiple_of: The number of neurons that remain in a layer or in each expert, and of widths, is a multiple of
            this.
        warns: Whether to warn of neurons that were found and cannot be removed, beside those of experts that can.

    Raises:
        ValueError: if the model is made of several models, of other kinds than widths; and as `find_in_family`,
            `find_experts` and `find_width` do.
    """
    if any(kind != "width" for kind in kinds):
        _require_not_composite(model)
    found = find_experts(model, targets) if "expert" in kinds else {}
    inside = find_expert_neurons(model, targets, multiple_of) if "neuron" in kinds else {}
    if others := [kind for kind in kinds if kind not in ("expert", "width") and not (kind == "neuron" and inside)]:
        found |= find_in_family(model, others, targets, multiple_of)
    if inside:
        found |= _other_neurons(cast(PreTrainedModel, model), targets, multiple_of, warns)
        found |= inside
    if "width" in kinds:
        found |= find_width(model, targets, multiple_of)
    require_own_weights(found)
    return found


def require_no_adapters(model: nn.Module) -> None:
    """Requires that a model carries no adapters."""
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"this {type(model).__name__} carries adapters, whose matrices are as wide as the layers that they stand "
            "beside. Merge them first (merge_and_unload), or add them to the pruned model."
        )


def _other_neurons(
    model: PreTrainedModel, targets: Mapping[str, Target], multiple_of: int, warns: bool
) -> dict[str, StructureGroup]:
    """The neurons of a mixture that are in none of its fused experts, if it has any."""
    try:
        return find_in_family(model, ["neuron"], targets, multiple_of)
    except NothingToPrune:
        return {}
    except ValueError as error:
        if is_described(model.config.model_type):
            raise
        if warns:
            logger.warning("Of all neurons, only those of experts are pruned: %s", error)
        return {}


def _require_not_composite(model: nn.Module) -> None:
    """Requires that a model is not made of several models, unless its family is in the table."""
    config = getattr(model, "config", None)
    if config is None or config.model_type in FAMILIES or not isinstance(model, PreTrainedModel):
        return
    parts: list[str] = []
    for path, module in model.named_modules():
        is_other = isinstance(module, PreTrainedModel) and type(module.config) is not type(config)
        if is_other and not any(path.startswith(f"{part}.") for part in parts):
            parts.append(path)
    if parts:
        raise ValueError(
            f"{type(model).__name__} is made of several models, of which hf_prune prunes one at a time. Give "
            f"{' or '.join(f'model.{path}' for path in parts[:3])} to prune and to shrink. If a Trainer is to train "
            "the whole, prune that part first, train with hold_zeros=True and granularity 'unstructured', and shrink "
            "it then."
        )
