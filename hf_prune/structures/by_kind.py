"""By kind: the structures of a model of Transformers, each kind found in its own way."""

import logging
from collections.abc import Collection, Mapping

from torch import nn

from ..weights.targets import Target
from .expert_neurons import find_expert_neurons
from .experts import find_experts
from .groups import StructureGroup, require_own_weights
from .heads_and_neurons import find_in_family
from .widths import find_width

logger = logging.getLogger(__name__)


def find_by_kind(
    model: nn.Module, kinds: Collection[str], targets: Mapping[str, Target], multiple_of: int
) -> dict[str, StructureGroup]:
    """Finds the structures of some kinds in a model, by name.

    Args:
        model: The model, unwrapped.
        kinds: Some of `KINDS`, no channels.
        targets: The weights that may be pruned.
        multiple_of: The number of neurons that remain in a layer or in each expert, and of widths, is a multiple of
            this.

    Raises:
        ValueError: as `find_in_family`, `find_experts` and `find_width` do.
    """
    found = find_experts(model, targets) if "expert" in kinds else {}
    inside = find_expert_neurons(model, targets, multiple_of) if "neuron" in kinds else {}
    if described := [kind for kind in kinds if kind not in ("expert", "width")]:
        try:
            found |= find_in_family(model, described, targets, multiple_of)
        except ValueError as error:
            if not inside:
                raise
            logger.debug("Only neurons of experts are found: %s", error)
            if others := [kind for kind in described if kind != "neuron"]:
                found |= find_in_family(model, others, targets, multiple_of)
    found |= inside
    if "width" in kinds:
        found |= find_width(model, targets, multiple_of)
    require_own_weights(found)
    return found
