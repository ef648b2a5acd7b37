"""Scopes: which weights compete with which, and how many of them go.

A scope turns one sparsity into pools: names whose groups are ranked together, and the number of groups to drop in all.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

SCOPES = ("auto", "global", "layer", "row", "erk")


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
) -> list[Pool]:
    """Divides the tensors into pools.

    Args:
        sizes: Name → number of groups (of weights, where the granularity is unstructured).
        sparsity: Fraction of the groups to drop, in `[0, 1)`.
        scope: "global" (one pool), "layer" (a pool for each tensor, all with the same sparsity) or "erk" (a
            pool for each tensor, the sparsity by the Erdős–Rényi kernel rule, exact in total).
        shapes: Name → dimensions of one layer's weight, for "erk".
        dropped: Name → number of groups dropped before; a pool never drops fewer.
        layer_sparsity: Name → its own sparsity. These tensors leave the competition; `sparsity` holds for the rest.

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
        result[-1:] = _erk(rest, result[-1].drop, shapes, dropped)
    return result


def _erk(
    sizes: Mapping[str, int], drop: int, shapes: Mapping[str, tuple[int, ...]], dropped: Mapping[str, int]
) -> list[Pool]:
    """The Erdős–Rényi kernel rule: a layer's density goes with the sum of its dimensions over their product.

    Source: Evci et al. 2020, "Rigging the Lottery", arXiv 1911.11134.
    """
    weight = {name: sum(shapes[name]) / max(math.prod(shapes[name]), 1) for name in sizes}

    def wanted(epsilon: float) -> dict[str, float]:
        # Layers that the rule would give more than all of their weights stay dense, and what is dropped stays so.
        return {n: min(max(size * (1 - epsilon * weight[n]), dropped[n]), size) for n, size in sizes.items()}

    low, high = 0.0, max((1 / value for value in weight.values() if value), default=0.0)
    for _ in range(100):  # Until the interval is a single number.
        middle = (low + high) / 2
        low, high = (middle, high) if sum(wanted(middle).values()) > drop else (low, middle)
    shares = wanted(high)
    counts = {name: int(share) for name, share in shares.items()}
    # What rounding down has left goes to the largest remainders.
    for name in sorted(counts, key=lambda name: counts[name] - shares[name])[: drop - sum(counts.values())]:
        counts[name] += 1
    return [Pool((name,), count) for name, count in counts.items()]
