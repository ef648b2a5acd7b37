"""Trials: structures that nobody has described, removed from a copy first."""

import copy
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..calibration.contexts import keep_random_state
from ..weights.targets import find_targets
from .comparing import Differs, Reference
from .configs import write_layers_
from .experts import bar_pruned_
from .groups import KINDS, WITHOUT_STRUCTURES, StructureGroup, Structures, kinds_of
from .removal import Removal
from .shrinking import apply_compared_
from .widths import find_width


def require_exact_on_a_copy(model: nn.Module, structures: Structures) -> None:
    """Requires that a copy of a model without half of its structures gives what it gives with zeros for them.

    Networks may count on their widths where no graph shows it: they split channels into parts of fixed lengths, or
    have a norm over a weight. Routers may share tokens out by the number of experts.

    Raises:
        ValueError: if the copy gives other outputs, or cannot be called.
    """
    kept = {name: _half_of(group) for name, group in structures.items()}
    tried = cast(PreTrainedModel, copy.deepcopy(model))
    bar_pruned_(tried, structures)
    removal = Removal(tried, tried, structures, kept)
    try:
        apply_compared_(removal, Reference(tried, removal.masks))
    except (Differs, ValueError) as error:
        kinds = " and ".join(KINDS[kind] for kind in kinds_of(structures))
        raise ValueError(
            f"{kinds} cannot be removed from {type(model).__name__}: a copy without half of them fails ({error}). "
            f"Its code seems to rely on fixed widths. {WITHOUT_STRUCTURES}"
        ) from error


def _half_of(group: StructureGroup) -> torch.Tensor:
    """Which structures stay, if about half may go: the last ones of each run."""
    levels, each = group.counts_that_may_go(), group.count // group.runs
    return torch.arange(group.count) % each >= levels[len(levels) // 2] // group.runs


def require_width_exact_on_a_copy(model: nn.Module) -> None:
    """Requires that a small model of the same class without half of its width gives what it gives with zeros for it.

    A class may use its width where no attribute of a module shows it, as in what it multiplies logits with.

    Raises:
        ValueError: if the small model gives other outputs, or cannot be built or called.
    """
    advice = "Choose granularity head, query, neuron or layer."
    try:
        small = _small_copy(cast(PreTrainedModel, model))
        groups = find_width(small, find_targets(small), 1)
        kept = {name: torch.arange(group.count) % 2 == 0 for name, group in groups.items()}
        removal = Removal(small, small, groups, kept)
        apply_compared_(removal, Reference(small, removal.masks, channels=removal.channels))
    except (Differs, ValueError) as error:
        raise ValueError(
            f"widths cannot be removed from {type(model).__name__}: a small model of this class without half of them "
            f"fails ({error}). {advice}"
        ) from error


def _small_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A narrow model of the same class, of two layers, with random weights."""
    config: Any = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)  # What was recorded of other shapes is of no matter here.
    heads = getattr(config, "num_attention_heads", None) or 4
    if not getattr(config, "head_dim", None):
        config.head_dim = config.hidden_size // heads
    config.hidden_size = 8 * heads
    for field, most in (("intermediate_size", 64), ("vocab_size", 128)):
        if isinstance(getattr(config, field, None), int):
            setattr(config, field, min(getattr(config, field), most))
    for field, value in list(vars(config).items()):
        if field.endswith("_token_id") and isinstance(value, int):
            setattr(config, field, min(value, config.vocab_size - 1))
    field = dict(getattr(config, "attribute_map", {})).get("num_hidden_layers", "num_hidden_layers")
    if (count := getattr(config, field, 0)) > 2:
        layers = StructureGroup("layers", "layer", count, (), fields=((field, 1),))
        write_layers_(config, layers, [0, count - 1])
    with keep_random_state(torch.device("cpu")):
        torch.manual_seed(0)
        small: PreTrainedModel = type(model)(config).double()
        with torch.no_grad():
            for parameter in small.parameters():  # Norms of one and biases of zero would prove less.
                parameter.add_(0.1 * torch.randn_like(parameter))
    return small.eval()
