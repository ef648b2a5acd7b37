"""Scopes: which weights compete with which, and how many of them go.

A scope turns one sparsity into pools: names whose groups are ranked together, and the number of groups to drop in all.
One more scope is one more line in `SCOPES`.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .criteria import ScoreInputs, needs_of, wanda

_OUTLIER = 5.0  # What is this many times the layer's mean is an outlier: `M` in the paper, which takes 5 or 7.
OWL_SPREAD = 0.08  # Half of how far apart the sparsities of two layers may be: `λ` in the paper.

SparsityRule = Callable[[float], Mapping[str, float]]
"""A level in `[0, 1]` → the sparsity of each tensor, which rises with it from 0 or less to 1 or more."""


RuleOf = Callable[[Mapping[str, int], Mapping[str, tuple[int, ...]], Mapping[str, float]], SparsityRule]
"""Number of groups of each tensor, its dimensions, and what `Scope.measure` says of it → the rule."""


@dataclass(frozen=True)
class Scope:
    """Which weights compete.

    Attributes:
        name: A key of `SCOPES`.
        pools_tensors: Whether a sparsity holds for all tensors together; else for each by itself.
        within_rows: Whether it holds for each row of a tensor by itself.
        rule: How it is divided among the tensors, each of which is then a pool; None if all of them are one.
        measure: What the rule has to know of each tensor; None if nothing.
        needs: The statistics that `measure` reads.
    """

    name: str
    pools_tensors: bool = True
    within_rows: bool = False
    rule: RuleOf | None = None
    measure: Callable[[ScoreInputs], float] | None = None
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pool:
    """Tensors that compete with each other.

    Attributes:
        names: The tensors.
        drop: The number of their groups to drop, those dropped before included.
    """

    names: tuple[str, ...]
    drop: int


def pools(
    sizes: Mapping[str, int],
    sparsity: float,
    scope: Scope,
    *,
    shapes: Mapping[str, tuple[int, ...]],
    dropped: Mapping[str, int],
    layer_sparsity: Mapping[str, float],
    measured: Mapping[str, float] | None = None,
) -> list[Pool]:
    """Divides the tensors into pools.

    Args:
        sizes: Name → number of groups (of weights, where the granularity is unstructured).
        sparsity: Fraction of the groups to drop, in `[0, 1)`.
        scope: Which of them compete: with a rule each is a pool, and their sparsities are exact in total.
        shapes: Name → dimensions of one layer's weight.
        dropped: Name → number of groups dropped before; a pool never drops fewer.
        layer_sparsity: Name → its own sparsity. These tensors leave the competition; `sparsity` holds for the rest.
        measured: Name → what `scope.measure` says of it.

    Returns:
        Pools that cover all names once.

    Raises:
        ValueError: if more is dropped already than the sparsity allows.
    """
    rest = {name: size for name, size in sizes.items() if name not in layer_sparsity}
    result = [Pool((name,), round(own * sizes[name])) for name, own in layer_sparsity.items()]
    if not scope.pools_tensors:
        result += [Pool((name,), round(sparsity * size)) for name, size in rest.items()]
    elif rest:
        result.append(Pool(tuple(rest), round(sparsity * sum(rest.values()))))
    for pool in result:
        before, size = (sum(counts[name] for name in pool.names) for counts in (dropped, sizes))
        if before > pool.drop:
            where = repr(pool.names[0]) if len(pool.names) == 1 else "the targets"
            raise ValueError(
                f"{before / size:.4f} of {where} is zero already, more than the sparsity {pool.drop / size:.4f} asked "
                "for in this round. What is pruned stays pruned: take fewer rounds or a higher initial_sparsity, or "
                "start without hold_zeros."
            )
    if scope.rule is not None and rest:
        counts = divide(result[-1].drop, scope.rule(rest, shapes, measured or {}), rest, dropped)
        result[-1:] = [Pool((name,), count) for name, count in counts.items()]
    return result


def divide(drop: int, rule: SparsityRule, sizes: Mapping[str, int], dropped: Mapping[str, int]) -> dict[str, int]:
    """Divides a number of groups to drop among tensors, by a rule and exactly.

    Args:
        drop: How many in all; at least those dropped before, at most all.
        rule: A level in `[0, 1]` → the sparsity of each tensor. The level is found at which the numbers add up.
        sizes: Name → number of groups.
        dropped: Name → number of groups dropped before; none drops fewer.

    Returns:
        Name → number of groups to drop.
    """

    def exact_at(level: float) -> dict[str, float]:
        return {n: min(max(sizes[n] * sparsity, dropped[n]), sizes[n]) for n, sparsity in rule(level).items()}

    low, high = 0.0, 1.0
    for _ in range(100):  # Until the interval is a single number.
        middle = (low + high) / 2
        low, high = (low, middle) if sum(exact_at(middle).values()) > drop else (middle, high)
    exact = exact_at(low)
    counts = {name: int(value) for name, value in exact.items()}
    # What rounding down has left goes to the largest remainders.
    for name in sorted(counts, key=lambda name: counts[name] - exact[name])[: drop - sum(counts.values())]:
        counts[name] += 1
    return counts


def outlier_ratio(inputs: ScoreInputs) -> float:
    """The fraction of a tensor's weights that are outliers by `hf_prune.criteria.wanda`: `|w| · ‖x‖₂`.

    It is of those whose score is not zero, so that neither pruned weights nor those of dead inputs count.
    """
    scores = wanda(inputs)
    scores = scores[scores != 0]
    return float((scores > _OUTLIER * scores.mean()).float().mean()) if len(scores) else 0.0


def _erk(sizes: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]], _: Mapping[str, float]) -> SparsityRule:
    """The Erdős–Rényi kernel rule: a layer's density goes with the sum of its dimensions over their product.

    Source: Evci et al. 2020, "Rigging the Lottery", arXiv 1911.11134.
    """
    density = {name: sum(shapes[name]) / max(math.prod(shapes[name]), 1) for name in sizes}
    top = max((1 / value for value in density.values() if value), default=0.0)
    return lambda level: {name: 1 - (1 - level) * top * density[name] for name in sizes}


def _owl(sizes: Mapping[str, int], _: Mapping[str, tuple[int, ...]], ratios: Mapping[str, float]) -> SparsityRule:
    """Outlier weighed layer-wise sparsity: the more outliers a layer has, the denser it stays.

    The tensors of a block are one layer, as in the paper, and equally sparse: those whose names are alike up to the
    last number in them. The sparsities of two layers are at most `2 · OWL_SPREAD` apart.

    Source: Yin et al. 2023, "Outlier Weighed Layerwise Sparsity (OWL)", arXiv 2310.05175.
    """
    found = {name: re.match(r".*\.\d+\.", name) for name in sizes}
    layer_of = {name: match[0] if match else name for name, match in found.items()}
    members = {layer: [name for name in sizes if layer_of[name] == layer] for layer in layer_of.values()}
    ratio_of = {
        layer: sum(ratios[n] * sizes[n] for n in names) / sum(sizes[n] for n in names)
        for layer, names in members.items()
    }
    low, high = min(ratio_of.values()), max(ratio_of.values())
    extra = {n: 2 * OWL_SPREAD * (ratio_of[layer_of[n]] - low) / (high - low or 1) for n in sizes}
    # From all dense to all pruned, with the extra density at every level in between.
    return lambda level: {name: (1 + 2 * OWL_SPREAD) * level - extra[name] for name in sizes}


GLOBAL = Scope("global")
LAYER = Scope("layer", pools_tensors=False)
SCOPES: dict[str, Scope | None] = {
    "auto": None,  # What the criterion says.
    "global": GLOBAL,
    "layer": LAYER,
    "row": Scope("row", pools_tensors=False, within_rows=True),
    "erk": Scope("erk", rule=_erk),
    "owl": Scope("owl", rule=_owl, measure=outlier_ratio, needs=needs_of(wanda)),
}
