"""The granularity of structures: heads, neurons, channels, layers and others go as a whole."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..scopes import LAYER
from ..structures.budgets import fractions_gone
from ..structures.finding import find_structures, require_removable
from ..structures.groups import COMPENSATED, KINDS, Structures, in_layers_that_stay, kept_in, masks_of
from ..structures.ranking import choose, floors_of_structures, pools_of, shortfall_of
from ..weights.masks import MaskSet
from ..weights.targets import Target
from .cuts import Cut
from .granularity import Granularity

MULTIPLE_OF = 8
"""The number of neurons, channels or widths that remain is a multiple of this, unless a config says otherwise."""

COUNTED_IN_MULTIPLES = {"neuron", "channel", "width"}
ONE_POOL = {"layer", "width"}
"""Kinds of which all structures compete, whatever the scope: none has a sparsity of its own."""

_NOT_TOGETHER = {
    ("head", "query"): "with a head go the queries that read it. Prune one of them, shrink, and prune the other",
    **{
        ("channel", kind): "networks with channels have no other structures. Choose granularity channel"
        for kind in KINDS
        if kind != "channel"
    },
}


@dataclass(frozen=True)
class Structural(Granularity):
    """Whole structures: all that belongs to an attention head, a neuron, a channel, a layer or another of `KINDS`.

    Which weights these are, `hf_prune.structures` knows.

    Attributes:
        kinds: The kinds of structures, each of which competes among itself.
        multiple_of: The number of neurons, channels or widths that remain is a multiple of this, or all.
        uniform: Whether as many go everywhere, so that an ordinary config of the family says what is left.
    """

    kinds: tuple[str, ...]
    multiple_of: int = MULTIPLE_OF
    uniform: bool = False
    spelling = f"one or several of {', '.join(KINDS)}, joined by + (such as head+neuron)"
    options = ("multiple_of", "uniform")
    needs_whole_weights = True

    @classmethod
    def read(cls, text: str) -> "Structural | None":
        """Reads kinds that are joined by +."""
        kinds = tuple(text.split("+"))
        if not KINDS.keys() >= set(kinds):
            return None
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"granularity {text!r} names a kind of structures twice. Name each once.")
        for pair, why in _NOT_TOGETHER.items():
            if set(pair) <= set(kinds):
                raise ValueError(f"granularity {text!r} cannot be: {why}.")
        return cls(kinds)

    def __str__(self) -> str:
        return "+".join(self.kinds)

    def require_options(self, asked: Mapping[str, object]) -> None:
        """Structures compete everywhere or within their layer; whole layers, and widths, as one pool."""
        scopes, is_one_pool = ["auto"], set(self.kinds) <= ONE_POOL
        if not is_one_pool:
            scopes += ["layer"] if self.uniform else ["global", "layer"]
        if asked.get("scope", "auto") not in scopes:
            raise ValueError(
                f"scope must be one of {', '.join(scopes)} with granularity {str(self)!r}"
                f"{' and uniform' if self.uniform else ''}; got {asked['scope']!r}."
            )
        if asked.get("layer_sparsity") and self.uniform:
            raise ValueError(
                "layer_sparsity contradicts uniform, which removes the same number everywhere. Leave one of them out."
            )
        if asked.get("layer_sparsity") and is_one_pool:
            all_of = " and ".join(KINDS[kind] for kind in self.kinds)
            raise ValueError(f"layer_sparsity does not apply to granularity {str(self)!r}: all {all_of} are one pool.")
        if "reconstruct" in asked and not COMPENSATED & set(self.kinds):
            read = ", ".join(KINDS[kind] for kind in KINDS if kind in COMPENSATED)
            raise ValueError(
                f"reconstruct is about what a projection reads ({read}), and granularity {str(self)!r} has none of "
                "these. Leave it out."
            )
        if "multiple_of" in asked and not COUNTED_IN_MULTIPLES & set(self.kinds):
            counted = ", ".join(KINDS[kind] for kind in KINDS if kind in COUNTED_IN_MULTIPLES)
            raise ValueError(f"multiple_of is about {counted}, and granularity {str(self)!r} has none. Leave it out.")

    def auto_scope(self, scope: str, reconstructs: bool) -> str:
        """All compete, unless the criterion's scores of different layers say nothing of each other."""
        return "layer" if self.uniform or scope == "layer" else "global"

    def find(self, model: nn.Module, targets: Mapping[str, Target]) -> Structures:
        """The structures of these kinds."""
        return find_structures(model, self.kinds, targets, self.multiple_of)

    def named(self, targets: Mapping[str, Target], structures: Structures) -> tuple[Mapping[str, str], str]:
        """Groups of structures have the names of their modules."""
        return {name: name for name in structures}, "places of structures"

    def require_prunable(self, model: nn.Module, cut: Cut) -> None:
        """Requires that no layer is emptied, and that a config can say what is left where it has to."""
        sparsity, own = cut.sparsity, cut.own_sparsities
        if cut.budget is not None:
            kept: Mapping[str, torch.Tensor] = kept_in(cut.structures, cut.masks)
            if not cut.masks:  # How many go does not depend on which, if each layer loses the same share.
                scores = {name: torch.zeros(group.count) for name, group in cut.structures.items()}
                kept = self._kept(dataclasses.replace(cut, scope=LAYER), scores)
            own = fractions_gone(cut.structures, kept)
        require_removable(model, cut.structures, sparsity, cut.scope.name, own, uniform=self.uniform)

    def mask(self, cut: Cut) -> MaskSet:
        """Drops the lowest structures, and masks all that belongs to one."""
        scores = {name: cut.scorer.of_structures(group, cut.targets) for name, group in cut.structures.items()}
        return masks_of(cut.structures, self._kept(cut, scores))

    def _kept(self, cut: Cut, scores: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """What stays."""
        structures, before = cut.structures, kept_in(cut.structures, cut.masks)
        if cut.budget is None:
            return choose(structures, scores, before, cut.sparsity, cut.scope.name, cut.own_sparsities)

        def stays(sparsity: float, own: Mapping[str, float]) -> Mapping[str, torch.Tensor]:
            return choose(structures, scores, before, sparsity, cut.scope.name, own, clamped=True)

        return cut.budget.reach(1 - cut.sparsity, stays, is_uniform=self.uniform)

    def shortfall(self, cut: Cut, masks: MaskSet) -> str | None:
        """That of the first pool of structures that has one; with a budget, that of the whole model."""
        kept = kept_in(cut.structures, masks)
        if cut.budget is not None:
            return cut.budget.shortfall(1 - cut.sparsity, kept)
        pools = pools_of(in_layers_that_stay(cut.structures, kept), cut.sparsity, cut.scope.name, cut.own_sparsities)
        found = (shortfall_of({name: cut.structures[name] for name in names}, kept, share) for names, share in pools)
        return next((sentence for sentence in found if sentence is not None), None)

    def floors(self, cut: Cut) -> list[float]:
        """For each pool of structures; with a budget, for the whole model."""
        kept = kept_in(cut.structures, cut.masks)
        if cut.budget is not None:
            return [1 - cut.budget.left(kept)]
        return floors_of_structures(cut.structures, kept, cut.sparsity, cut.scope.name, cut.own_sparsities)
