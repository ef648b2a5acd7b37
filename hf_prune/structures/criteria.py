"""Criteria of whole structures: what a layer is worth, by what it does rather than by its weights.

One more is one more function here and one more line in `STRUCTURE_CRITERIA`, and its statistic in `statistics.py`.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch

from ..criteria import needs, needs_of


@dataclass(frozen=True)
class StructureInputs:
    """What a criterion sees of the structures of one group.

    Attributes:
        name: The group's name, that of a module.
        kind: One of `hf_prune.structures.groups.KINDS`.
        count: How many there are.
        seed: The run's seed, for criteria that draw random numbers.
        statistics: What the criterion has declared to need: `[count]` each.
    """

    name: str
    kind: str
    count: int
    seed: int = 0
    statistics: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __getitem__(self, statistic: str) -> torch.Tensor:
        """A statistic of the structures.

        Raises:
            ValueError: if it was not gathered.
        """
        if statistic not in self.statistics:
            raise ValueError(
                f"the criterion reads the {statistic!r} of the structures of {self.name!r}, which nobody has "
                f"gathered. Declare it: put @needs({statistic!r}, kinds=({self.kind!r},)) of hf_prune.criteria above "
                "the function."
            )
        return self.statistics[statistic]


StructureCriterion = Callable[[StructureInputs], torch.Tensor]
"""`StructureInputs` → `[count]` scores, higher = keep."""


@needs("block_influence", kinds=("layer",))
def block_influence(inputs: StructureInputs) -> torch.Tensor:
    """Layers that turn what they read matter: `1 − E[cos(x_in, x_out)]` of the residual stream, over tokens.

    Args:
        inputs: `block_influence` is used.

    Returns:
        `[layers]` scores, float64, in `[0, 2]`.

    Source: Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
    arXiv 2403.03853, eq. 1.
    """
    return inputs["block_influence"]


@needs("routed_output", kinds=("expert",))
def reap(inputs: StructureInputs) -> torch.Tensor:
    """Experts that add much to their tokens matter: the mean of `g · ‖f(x)‖₂` over the tokens routed to one.

    `g` is the weight that the router gives the expert, as the model uses it, and `f(x)` the expert's output. An expert
    to which no token is routed scores 0.

    Args:
        inputs: `routed_output` is used.

    Returns:
        `[experts]` scores, float64, `≥ 0`.

    Source: Lasby et al. 2025, "REAP the Experts: Why Pruning Prevails for One-Shot MoE compression",
    arXiv 2510.13999, eq. 9.
    """
    return inputs["routed_output"]


@needs("routed_share", kinds=("expert",))
def frequency(inputs: StructureInputs) -> torch.Tensor:
    """Experts that are chosen often matter: the share of tokens that are routed to one.

    Args:
        inputs: `routed_share` is used.

    Returns:
        `[experts]` scores, float64, in `[0, 1]`.

    Source: Muzio et al. 2024, "SEER-MoE: Sparse Expert Efficiency through Regularization for Mixture-of-Experts",
    arXiv 2404.05089.
    """
    return inputs["routed_share"]


@needs("contribution", kinds=("head", "query", "neuron", "width", "expert"), scope="layer")
def activation(inputs: StructureInputs) -> torch.Tensor:
    """Structures matter that much of what follows is their doing: `√E‖W_s x_s‖²`, over tokens.

    `x_s` is what the structure hands on, and `W_s` the columns of the projections that read it: of a neuron its value
    and one column, of a head or query its values and as many, of a channel of the residual stream all projections that
    read it. Of an expert it is its output, as the router weighs it, over all tokens. It takes passes without labels or
    gradients. What is computed grows from layer to layer, so that by default each place loses the same share.

    Args:
        inputs: `contribution` is used.

    Returns:
        `[structures]` scores, float64, `≥ 0`, in the units of what the projections give.

    Source: after Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge Distillation",
    arXiv 2407.14679, section 2.2, which takes the activations alone.
    """
    return inputs["contribution"]


@needs("gate_fisher", kinds=("head", "query", "neuron"))
def gate_fisher(inputs: StructureInputs) -> torch.Tensor:
    """How much the loss rises without a structure: `E Σ_t (x_s · ∂L/∂x_s)² / 2`, over labels.

    `x_s` is the structure's output at position `t`. This is the second-order estimate of the rise, by the Fisher
    information of a gate on the output at each position. Scores can be compared between layers. It takes labels and
    gradients.

    Args:
        inputs: `gate_fisher` is used.

    Returns:
        `[structures]` scores, float64, `≥ 0`, in the units of the loss.

    Source: Kwon et al. 2022, "A Fast Post-Training Pruning Framework for Transformers", arXiv 2204.09656, eq. 8, whose
    gates are the same at all positions.
    """
    return inputs["gate_fisher"] / 2


_BY_DEFAULT: dict[str, StructureCriterion] = {"layer": block_influence, "expert": reap, "width": activation}


def default_criterion(kinds: Collection[str], *, has_labels: bool) -> StructureCriterion:
    """What scores structures of some kinds by default.

    `block_influence` scores layers, `reap` experts, and `activation` widths. Heads, queries and neurons are scored by
    `gate_fisher` where samples have labels, else by `activation`.
    """
    chosen = {kind: _BY_DEFAULT.get(kind, gate_fisher if has_labels else activation) for kind in kinds}
    criteria = list(dict.fromkeys(chosen.values()))
    if len(criteria) == 1:
        return criteria[0]
    # Widths are ranked among themselves in either scope.
    scope = "layer" if any(chosen[kind] is activation for kind in kinds if kind != "width") else "global"

    @needs(*(name for criterion in criteria for name in needs_of(criterion)), kinds=tuple(kinds), scope=scope)
    def each_by_its_own(inputs: StructureInputs) -> torch.Tensor:
        return chosen[inputs.kind](inputs)

    each_by_its_own.__qualname__ = "+".join(criterion.__qualname__ for criterion in criteria)
    return each_by_its_own


STRUCTURE_CRITERIA: dict[str, StructureCriterion] = {
    "block_influence": block_influence,
    "reap": reap,
    "frequency": frequency,
    "activation": activation,
    "gate_fisher": gate_fisher,
}
