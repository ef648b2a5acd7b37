"""By kind: the structures of a model of Transformers, each kind found in its own way."""

import logging
from collections.abc import Collection, Mapping

from torch import nn

from ..weights.targets import Target
from .expert_neurons import find_expert_neurons
from .experts import find_experts
from .groups import StructureGroup
from .heads_and_neurons import find_in_family, require_own_weights

logger = logging.getLogger(__name__)


def find_by_kind(
    model: nn.Module, kinds: Collection[str], targets: Mapping[str, Target], multiple_of: int
) -> dict[str, StructureGroup]:
    """Finds the structures of some kinds in a model, by name.

    Args:
        model: The model, unwrapped.
        kinds: Some of `KINDS`, no channels.
        targets: The weights that may be pruned.
        multiple_of: The number of neurons that remain in a layer, or in each expert, is a multiple of this.

    Raises:
        ValueError: as `find_in_family` and `find_experts` do.
    """
    found: dict[str, StructureGroup] = {}
    if "width" in kinds:
        raise ValueError(f"{type(model).__name__} has no width that is known.")
    if of_family := [kind for kind in kinds if kind not in ("expert", "neuron")]:
        found |= find_in_family(model, of_family, targets, multiple_of)
    if "expert" in kinds:
        found |= find_experts(model, targets)
    if "neuron" in kinds:
        inside = find_expert_neurons(model, targets, multiple_of)
        try:
            found |= find_in_family(model, ("neuron",), targets, multiple_of)
        except ValueError as error:
            if not inside:
                raise
            logger.debug("Only neurons of experts are found: %s", error)
        found |= inside
    require_own_weights(found)
    return found
