"""Scopes: which weights compete with which, and how many of them go.

A scope turns one sparsity into pools: names whose groups are ranked together, and the number of groups to drop in all.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

SCOPES = ("auto", "global", "layer", "row", "erk", "owl")
OWL_FACTOR = 5.0  # What is this many times the layer's mean is an outlier: `M` in the paper, which takes 5 or 7.
OWL_SPREAD = 0.08  # Half of how far apart the sparsities of two layers may be: `λ` in the paper.

Wanted = Callable[[float], Mapping[str, float]]
"""A share in `[0, 1]` → the sparsity of each tensor, which rises with it from 0 or less to 1 or more."""


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
    scope: str,
    *,
    shapes: Mapping[str, tuple[int, ...]],
    dropped: Mapping[str, int],
    layer_sparsity: Mapping[str, float],
    outliers: Mapping[str, float] | None = None,
) -> list[Pool]:
    """Divides the tensors into pools.

    Args:
        sizes: Name → number of groups (of weights, where the granularity is unstructured).
        sparsity: Fraction of the groups to drop, in `[0, 1)`.
        scope: "global" (one pool), "layer" (a pool for each tensor, all with the same sparsity), or "erk" and "owl" (a
            pool for each tensor, the sparsity by the Erdős–Rényi kernel rule or by outliers, exact in total).
        shapes: Name → dimensions of one layer's weight, for "erk".
        dropped: Name → number of groups dropped before; a pool never drops fewer.
        layer_sparsity: Name → its own sparsity. These tensors leave the competition; `sparsity` holds for the rest.
        outliers: Name → fraction of its weights that are outliers, for "owl".

    Returns:
        Pools that cover all names once.

    Raises:
        ValueError: if more is dropped already than the sparsity allows.
    """
    rest = {name: size for name, size in sizes.items() if name not in layer_sparsity}
    result = [Pool((name,), round(own * sizes[name])) for name, own in layer_sparsity.items()]
    if scope == "layer":
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
    if scope == "erk" and rest:
        result[-1:] = _shares(_erk(rest, shapes), rest, result[-1].drop, dropped)
    if scope == "owl" and rest:
        result[-1:] = _shares(_owl(rest, outliers or {}), rest, result[-1].drop, dropped)
    return result


def _erk(sizes: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> Wanted:
    """The Erdős–Rényi kernel rule: a layer's density goes with the sum of its dimensions over their product.

    Source: Evci et al. 2020, "Rigging the Lottery", arXiv 1911.11134.
    """
    weight = {name: sum(shapes[name]) / max(math.prod(shapes[name]), 1) for name in sizes}
    top = max((1 / value for value in weight.values() if value), default=0.0)
    return lambda share: {name: 1 - (1 - share) * top * weight[name] for name in sizes}


def _owl(sizes: Mapping[str, int], outliers: Mapping[str, float]) -> Wanted:
    """Outlier weighed layer-wise sparsity: the more outliers a layer has, the denser it stays.

    The tensors of a block are one layer, as in the paper, and equally sparse: those whose names are alike up to the
    last number in them. The sparsities of two layers are at most `2 · OWL_SPREAD` apart.

    Source: Yin et al. 2023, "Outlier Weighed Layerwise Sparsity (OWL)", arXiv 2310.05175.
    """
    layer_of = {name: re.match(r"(.*\.\d+\.|)", name)[0] or name for name in sizes}  # type: ignore[index]
    counts: dict[str, float] = dict.fromkeys(layer_of.values(), 0.0)
    totals = dict(counts)
    for name, layer in layer_of.items():
        counts[layer] += outliers[name] * sizes[name]
        totals[layer] += sizes[name]
    share_of = {layer: counts[layer] / totals[layer] for layer in totals}
    low, high = min(share_of.values()), max(share_of.values())
    lean = {n: 2 * OWL_SPREAD * (share_of[layer_of[n]] - low) / (high - low or 1) for n in sizes}
    # From all dense to all pruned, at some share in between with the mean that is asked for.
    return lambda share: {n: (1 + 2 * OWL_SPREAD) * share - lean[n] for n in sizes}


def _shares(wanted: Wanted, sizes: Mapping[str, int], drop: int, dropped: Mapping[str, int]) -> list[Pool]:
    """A pool for each tensor, with exactly `drop` in all, at the share for which that is what is wanted."""

    def counts_at(share: float) -> dict[str, float]:
        # No layer loses more than all of its weights, and what is dropped stays so.
        return {n: min(max(sizes[n] * sparsity, dropped[n]), sizes[n]) for n, sparsity in wanted(share).items()}

    low, high = 0.0, 1.0
    for _ in range(100):  # Until the interval is a single number.
        middle = (low + high) / 2
        low, high = (low, middle) if sum(counts_at(middle).values()) > drop else (middle, high)
    shares = counts_at(low)
    counts = {name: int(share) for name, share in shares.items()}
    # What rounding down has left goes to the largest remainders.
    for name in sorted(counts, key=lambda name: counts[name] - shares[name])[: drop - sum(counts.values())]:
        counts[name] += 1
    return [Pool((name,), count) for name, count in counts.items()]
