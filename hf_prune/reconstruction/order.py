"""The order of stages: a model's targets in the order in which forward passes use them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..weights.targets import Target


class Use(NamedTuple):
    """A product of a pass.

    Attributes:
        name: The target.
        input: A number, the same as that of the use before if both have the same input.
    """

    name: str
    input: int


@dataclass(frozen=True)
class Stage:
    """Targets that are multiplied with one and the same input.

    Attributes:
        names: Their parameters. Several only if each is used once in a pass.
        uses: How often the first of them is used in a pass; None if that depends on the data, as it does for experts.
        later: Targets that passes use after they have used these for the last time, and never before.
    """

    names: tuple[str, ...]
    uses: int | None
    later: frozenset[str]


def stages_of(passes: Sequence[Sequence[Use]], targets: Mapping[str, Target]) -> list[Stage]:
    """The stages, from what all passes have used."""
    counts = [Counter(use.name for use in uses) for uses in passes]
    later = _later(passes)
    stages = []
    for names in _grouped(_merged(passes), passes, counts, targets):
        uses = {count[names[0]] for count in counts}
        is_known = len(uses) == 1 and targets[names[0]].weight.ndim != 3
        behind = frozenset.intersection(*(later[name] for name in names))
        stages.append(Stage(tuple(names), uses.pop() if is_known else None, behind))
    return stages


def _merged(passes: Sequence[Sequence[Use]]) -> list[str]:
    """The order of first use; what only some passes use comes right behind what they have used before it."""
    order: list[str] = []
    for uses in passes:
        before = -1
        for name in dict.fromkeys(use.name for use in uses):
            if name not in order:
                order.insert(before + 1, name)
            before = order.index(name)
    return order


def _grouped(
    order: Sequence[str],
    passes: Sequence[Sequence[Use]],
    counts: Sequence[Counter[str]],
    targets: Mapping[str, Target],
) -> list[list[str]]:
    """Neighbours with the same input in every pass, together."""
    inputs = [{use.name: use.input for use in uses} for uses in passes]  # Read only for names with one use.

    def are_alike(name: str, other: str) -> bool:
        return targets[name].weight.ndim == targets[other].weight.ndim == 2 and all(
            count[name] == count[other] <= 1 and number.get(name) == number.get(other)
            for count, number in zip(counts, inputs, strict=True)
        )

    groups: list[list[str]] = []
    for name in order:
        if groups and are_alike(groups[-1][-1], name):
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


def _later(passes: Sequence[Sequence[Use]]) -> dict[str, frozenset[str]]:
    """For each target those that passes use after its last use, and never before."""
    before: dict[str, set[str]] = {}
    after: dict[str, set[str]] = {}
    for uses in passes:
        last = {use.name: i for i, use in enumerate(uses)}
        begun: set[str] = set()
        for i, (name, _) in enumerate(uses):
            begun.add(name)
            if last[name] == i:
                before.setdefault(name, set()).update(begun)
                after.setdefault(name, set()).update(last.keys() - begun)
    return {name: frozenset(after[name] - before[name]) for name in after}
