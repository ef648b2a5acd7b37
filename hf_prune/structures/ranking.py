"""Ranking: which structures go, so many of each kind, by their scores."""

import itertools
from collections.abc import Mapping

import torch

from .groups import KINDS, LEAST, StructureGroup, Structures, count_gone, in_layers_that_stay, kinds_of


def choose(
    structures: Structures,
    scores: Mapping[str, torch.Tensor],
    kept: Mapping[str, torch.Tensor],
    sparsity: float,
    scope: str,
    own: Mapping[str, float],
    *,
    clamped: bool = False,
) -> dict[str, torch.Tensor]:
    """Drops the structures with the lowest scores: of each kind the same share, each kind among itself.

    Where the number that remains has to be a multiple of something, structures go in steps, the lowest of a group
    first, and the steps of different groups compete by the means of their scores. The number that goes is the one
    nearest to what was asked for that can be reached in this order. Layers are chosen first, with all that is in them,
    and then experts; of other kinds it is a share of those in layers and experts that stay.

    Args:
        structures: Where they are.
        scores: Group → `[count]` scores, higher = keep.
        kept: Group → `[count]` bools; what is False there is gone already, and counts.
        sparsity: Fraction of the structures of each kind that are to be gone, in `[0, 1)`.
        scope: "global" (all groups compete) or "layer" (the same share of each group).
        own: Group → its own sparsity. These leave the competition.
        clamped: Whether as many go as may, and none comes back, where a sparsity cannot be; else that is an error.

    Returns:
        Group → `[count]` bools, True = kept.
    """
    for name in structures:
        if nan := int(scores[name].isnan().sum()):
            raise ValueError(f"{nan} of the {structures[name].count} scores of {name!r} are NaN.")
    result: dict[str, torch.Tensor] = {}
    staying = structures
    for turn in ("layer", "expert", ""):
        some = {name: group for name, group in staying.items() if _turn_of(group) == turn}
        for names, share in pools_of(some, sparsity, scope, own):
            pool = {name: structures[name] for name in names}
            gone = {name: int((~kept[name]).sum()) for name in names}
            # Where groups are gone, shares were others: as near as can be.
            if not clamped and len(staying) == len(structures):
                require_attainable(pool, share, gone)
            orders = {name: _order(pool[name], scores[name], kept[name]) for name in names}
            asked = round(share * sum(group.count for group in pool.values()))
            for name, quota in _quotas(pool, asked, gone, scores, orders).items():
                result[name] = torch.ones_like(kept[name]).scatter_(0, orders[name][:quota], False)
        staying = in_layers_that_stay(structures, {**kept, **result})
    return {name: result.get(name, torch.zeros_like(kept[name])) for name in structures}


def _turn_of(group: StructureGroup) -> str:
    """When structures are chosen: those first that others are in."""
    return group.kind if group.kind in ("layer", "expert") else ""


def pools_of(
    structures: Structures, sparsity: float, scope: str, own: Mapping[str, float]
) -> list[tuple[list[str], float]]:
    """Divides groups into pools, whose structures compete with each other: names, and the fraction that is to be gone.

    With the scope "global" each kind is a pool, with "layer" each group, but for whole layers, which are one all the
    same. Groups with an `own` sparsity have a pool each.
    """
    result = [([name], own[name]) for name in structures if name in own]
    for kind in kinds_of(structures):
        names = [name for name, group in structures.items() if group.kind == kind and name not in own]
        if scope == "layer" and kind != "layer":  # Layers are one pool.
            result += [([name], sparsity) for name in names]
        elif names:
            result.append((names, sparsity))
    return result


def floors_of_structures(
    structures: Structures, kept: Mapping[str, torch.Tensor], final: float, scope: str, own: Mapping[str, float]
) -> list[float]:
    """The lowest sparsities that are still possible on the way to a final one, by each pool of structures."""
    floors = []
    for names, share in pools_of(in_layers_that_stay(structures, kept), final, scope, own):
        gone, total = count_gone({name: structures[name] for name in names}, kept)
        if share:
            floors.append(gone / total * final / share)  # A pool is at `share` when the cut is at `final`.
    return floors


def require_attainable(structures: Structures, sparsity: float, gone: Mapping[str, int]) -> None:
    """Requires that a sparsity of groups that compete can be reached, up to half a step, without emptying a group.

    Of groups that `gone` lacks nothing is gone already; of all together, no more may be than is asked for.
    """
    total = sum(group.count for group in structures.values())
    asked, least = round(sparsity * total), sum(gone.values())
    most = sum(group.counts_that_may_go(gone.get(name, 0))[-1] for name, group in structures.items())
    multiple = max(group.multiple for group in structures.values())
    step = max(group.multiple * group.runs for group in structures.values())
    kind = next(iter(structures.values())).kind
    kinds = KINDS[kind]
    where = repr(next(iter(structures))) if len(structures) == 1 else f"{len(structures)} places"
    if asked > most + step / 2:
        stays = f"a multiple of {step} {kinds}" if step > 1 else f"one {kind}"
        if (fewest := max(group.least for group in structures.values())) > 1:
            stays = f"{fewest} {kinds} ({LEAST})"
        raise ValueError(
            f"a sparsity of {sparsity:g} would remove {asked} of the {total} {kinds} in {where}, and at most {most} "
            f"can go: at least {stays} must stay in each place. Take a lower sparsity"
            f"{' or multiple_of' if multiple > 1 else ''}."
        )
    if least > asked + step / 2:
        raise ValueError(
            f"{least} of the {total} {kinds} in {where} are zero already, more than the {asked} asked for in this "
            "round. What is pruned stays pruned: take fewer rounds or a higher initial_sparsity, or start without "
            "hold_zeros."
        )


def shortfall_of(structures: Structures, kept: Mapping[str, torch.Tensor], sparsity: float) -> str | None:
    """A sentence that says by how much a pool missed its sparsity, and what can be had; None if it did not.

    It did if nothing is gone, or if more than one structure too many or too few is, and more than 5 % of all: where
    structures go several at a time, as `multiple_of` makes them, it is always a few beside.
    """
    gone, total = count_gone(structures, kept)
    if not sparsity or (gone and abs(gone - sparsity * total) <= max(1, total / 20)):
        return None
    first = next(iter(structures.values()))
    where = repr(first.name) if len(structures) == 1 else f"{len(structures)} places"
    if len(structures) == 1:
        levels = [level / total for level in first.counts_that_may_go()]
        near = [max(x for x in levels if x <= sparsity), *(x for x in levels if x > sparsity)][:2]
        possible = f"Nearest possible: {' and '.join(f'{level:.4g}' for level in near)}."
    else:
        step = min(level for group in structures.values() for level in group.counts_that_may_go()[1:])
        possible = f"The smallest step is {step} of them, a sparsity of {step / total:.4g}."
    advice = " Choose another sparsity, or a lower multiple_of." if first.multiple > 1 else " Choose another sparsity."
    return (
        f"Asked for sparsity {sparsity:g}, but {gone} of the {total} {KINDS[first.kind]} in {where} are pruned "
        f"({gone / total:.4g}). {possible}{advice}"
    )


def count_left(group: StructureGroup, sparsity: float) -> int:
    """How many of a group's structures are left at a sparsity, if it competes with no other."""
    asked = round(sparsity * group.count)
    return group.count - min(group.counts_that_may_go(), key=lambda gone: (abs(gone - asked), -gone))


def _order(group: StructureGroup, scores: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The numbers of the structures, those first that go first: what is gone, then by score; what stays is last.

    Of several runs the first of each come first, then the second of each.
    """
    rank = kept.int()
    rank[list(group.stay)] = 2
    runs = torch.arange(group.count).view(group.runs, -1)
    by_score = runs.gather(1, scores[runs].argsort(dim=1, stable=True))
    return by_score.gather(1, rank[by_score].argsort(dim=1, stable=True)).T.flatten()


def _quotas(
    structures: Structures,
    asked: int,
    gone: Mapping[str, int],
    scores: Mapping[str, torch.Tensor],
    orders: Mapping[str, torch.Tensor],
) -> dict[str, int]:
    """How many go of each group, what is gone included."""
    quotas, total = dict(gone), sum(gone.values())
    steps = []
    for name, group in structures.items():
        ranked, levels = scores[name][orders[name]], group.counts_that_may_go(gone[name])
        steps += [(float(ranked[a:b].mean()), name, b) for a, b in itertools.pairwise(levels)]
    # Python sorts stably: of equal scores the first group goes first.
    for _, name, level in sorted(steps, key=lambda step: step[0]):
        size = level - quotas[name]
        if total + size / 2 > asked:
            break
        quotas[name], total = level, total + size
    return quotas
