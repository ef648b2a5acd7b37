"""Budgets: how much of what users pay for is left of a model, and how many structures go until it is."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import nn

from ..calibration.batches import Batch
from ..calibration.contexts import rolled_back
from ..calibration.costs import measure_costs
from ..distributed.processes import rank_and_size, sum_over_processes_
from ..distributed.zero import has_partitions
from .groups import Member, Structures, in_layers_that_stay
from .removal import Removal, whole_of
from .routing import unbar_

MEASURES = {"parameters": "parameters", "flops": "FLOPs", "latency": "latency"}
"""What can be paid for → how it is called."""

CLOSE = {"parameters": 0.0, "flops": 0.0, "latency": 0.01}
"""From how near a share of each is taken for the one that was asked for: what is counted is exact, time is not."""

_TURNS = 15  # How often dense and smaller model are timed, in turns.

_CONTAINERS = ("layer", "expert")  # Kinds that others are in.

_INSTEAD_OF = ("sparsity", "sparsities", "layer_sparsity")

Kept = Mapping[str, torch.Tensor]
"""Group → `[count]` bools, False for structures that go."""

Choice = Callable[[float, Mapping[str, float]], Kept]
"""A fraction of the structures, and fractions of some groups by themselves → what stays if so many go."""


def share_to_keep(fields: Mapping[str, object]) -> tuple[str, float] | None:
    """What the fields of a config say is paid for, and the share of it that is to be left; None if they do not.

    Raises:
        ValueError: if they say several things, or the share is not in `(0, 1]`.
    """
    given = [measure for measure in MEASURES if fields[f"keep_{measure}"] is not None]
    if not given:
        return None
    measure, keep = given[0], cast(float, fields[f"keep_{given[0]}"])
    others = [name for name in _INSTEAD_OF if fields[name] is not None] + [f"keep_{other}" for other in given[1:]]
    if others:
        raise ValueError(f"keep_{measure} says how much is pruned; leave out {', '.join(others)}.")
    if not 0 < keep <= 1 or 1 - keep == 1:
        hint = f" Did you mean {keep / 100:g}?" if 1 < keep <= 100 else ""
        raise ValueError(f"keep_{measure} must be in (0, 1], got {keep}.{hint}")
    return measure, keep


@dataclass(frozen=True)
class Remaining:
    """The share of the dense model's parameters, FLOPs or latency that remains after shrinking.

    Attributes:
        measure: One of `MEASURES`.
        asked: The share of the dense model's that was to be left.
        left: The share that is left once what is pruned is removed.
    """

    measure: str
    asked: float
    left: float

    def __str__(self) -> str:
        what = MEASURES[self.measure]
        return f"Once shrunk, {self.left:.4f} of the dense model's {what} are left; asked for {self.asked:.4g}."


@dataclass(frozen=True, eq=False)
class Budget:
    """What users pay for, in one model and its structures.

    Attributes:
        model: The model, unwrapped and dense: what is masked counts in full.
        measure: One of `MEASURES`.
        structures: The structures that may go.
        batch: What FLOPs and latency are measured with, on the device of the model.
    """

    model: nn.Module
    measure: str
    structures: Structures
    batch: Batch | None = None
    _known: dict[tuple[int, ...], float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.measure == "parameters":
            return
        if self.batch is None:
            raise ValueError(f"keep_{self.measure} is measured with a batch. Give a dataloader.")
        if has_partitions(self.model):
            raise ValueError(
                f"keep_{self.measure} is measured on whole models, and DeepSpeed has divided the parameters among "
                "processes. Take keep_parameters, or ZeRO stage 2."
            )

    def left(self, kept: Kept) -> float:
        """The share of the dense model's parameters, FLOPs or latency that is left; the same on all processes."""
        if self.measure == "parameters":
            total = sum(parameter.numel() for parameter in self.model.parameters())
            return 1 - _owned_by_what_goes(self.structures, kept) / total
        # What is left depends on how many go, not on which.
        counts = tuple(int(kept[name].sum()) for name in self.structures)
        if counts not in self._known:
            self._known[counts] = self._measured(kept)
        return self._known[counts]

    def _measured(self, kept: Kept) -> float:
        model, whole = self.model, whole_of(self.model)  # type: ignore[arg-type]
        with rolled_back(whole):
            Removal(model, whole, self.structures, kept).apply_()  # type: ignore[arg-type]
            smaller = copy.deepcopy(model)
        unbar_(smaller)
        turns = _TURNS if self.measure == "latency" else 0
        costs = measure_costs({"dense": model, "smaller": smaller}, self.batch, turns)
        dense, left = costs["dense"], costs["smaller"]
        share = left.flops / dense.flops if self.measure == "flops" else left.seconds / dense.seconds  # type: ignore[operator]
        # Each process has its own batch and clock.
        shares = sum_over_processes_(torch.tensor(share, dtype=torch.float64, device=next(model.parameters()).device))
        return float(shares) / rank_and_size()[1]

    def reach(self, keep: float, choose: Choice, *, is_uniform: bool) -> Kept:
        """Finds how many structures go until a share of the dense model's is left, and which.

        All groups lose the same fraction, as far as their scope has it so, until one step more would be too much; then
        group after group loses one step more, unless all have to lose as many. Where that step is a layer or an
        expert, the others also go on alone, with and without it. What comes nearest counts.

        Args:
            keep: The share.
            choose: Says what stays.
            is_uniform: Whether all groups of a kind lose as many.

        Returns:
            What stays; what stayed before, where that is as little already.

        Raises:
            ValueError: if more is left even without all structures that may go.
        """
        least = self.left(choose(1.0, {}))
        if least > keep + CLOSE[self.measure]:
            raise ValueError(
                f"keep_{self.measure}={keep:g} cannot be reached: with all structures gone that may go, "
                f"{least:.4f} of the {MEASURES[self.measure]} are left. Keep more, or prune more kinds of structures."
            )
        more, less = self._around(keep, choose, {})
        found = [more, less]
        containers = [name for name, group in self.structures.items() if group.kind in _CONTAINERS]
        if any(not torch.equal(more[name], less[name]) for name in containers):
            for kept in (more, less):
                fixed = {name: _fraction_gone(kept[name]) for name in containers}
                found += self._steps_between(keep, choose, *self._around(keep, choose, fixed), is_uniform)
        else:
            found += self._steps_between(keep, choose, more, less, is_uniform)
        return min(found, key=lambda kept: abs(self.left(kept) - keep))

    def _around(self, keep: float, choose: Choice, fixed: Mapping[str, float]) -> tuple[Kept, Kept]:
        """Two choices, one of more and one of less than a share, with the least that one fraction for all can differ.

        Args:
            keep: The share.
            choose: Says what stays.
            fixed: Groups that have their own fraction.
        """
        more, less = choose(0.0, fixed), choose(1.0, fixed)
        if self.left(more) <= keep:
            return more, more
        low, high = 0.0, 1.0
        while high - low > 0.5 / sum(group.count for group in self.structures.values()):
            middle = (low + high) / 2
            kept = choose(middle, fixed)
            if abs(self.left(kept) - keep) <= CLOSE[self.measure]:
                return kept, kept
            if self.left(kept) > keep:
                low, more = middle, kept
            else:
                high, less = middle, kept
        return more, less

    def remaining(self, keep: float, kept: Kept) -> Remaining:
        """What was asked for, and what is left."""
        return Remaining(self.measure, keep, self.left(kept))

    def shortfall(self, keep: float, kept: Kept) -> str | None:
        """A sentence that says by how much a cut missed its share, by more than a twentieth of what goes; or None."""
        left = self.left(kept)
        if abs(left - keep) <= max(0.05 * (1 - keep), CLOSE[self.measure]):
            return None
        return (
            f"Asked for {keep:.4g} of the {MEASURES[self.measure]}, but {left:.4g} are left. Choose another share, or "
            "a lower multiple_of."
        )

    def _steps_between(self, keep: float, choose: Choice, more: Kept, less: Kept, is_uniform: bool) -> list[Kept]:
        """Choices between two others, among them those right above and below a share, one step of one group apart."""
        steps = [name for name in self.structures if not torch.equal(more[name], less[name])]

        def after(count: int) -> Kept:
            taken = set(steps[:count])
            return choose(0.0, {n: _fraction_gone((less if n in taken else more)[n]) for n in self.structures})

        found, low, high = [more, less], 0, len(steps)
        while high - low > 1 and not is_uniform:
            middle = (low + high) // 2
            found.append(after(middle))
            low, high = (middle, high) if self.left(found[-1]) > keep else (low, middle)
        return found


def _fraction_gone(kept: torch.Tensor) -> float:
    return float((~kept).double().mean())


def fractions_gone(structures: Structures, kept: Kept) -> dict[str, float]:
    """Group → the fraction of its structures that goes; of what is in a layer that goes, as of others of its kind."""
    stay = in_layers_that_stay(structures, kept)
    gone = {name: _fraction_gone(kept[name]) for name in structures}
    of_kind = {structures[name].kind: gone[name] for name in stay}
    return {name: gone[name] if name in stay else of_kind.get(group.kind, 0.0) for name, group in structures.items()}


def _owned_by_what_goes(structures: Structures, kept: Kept) -> int:
    """The number of parameters that structures own which go."""
    members: dict[str, list[tuple[Member, torch.Tensor]]] = {}
    for name, group in structures.items():
        for member in group.members:
            members.setdefault(member.name, []).append((member, member.kept_positions(kept[name])))
    gone = 0
    for owned in members.values():
        shape = owned[0][0].parameter.shape
        axes = sorted({axis for member, _ in owned for axis in member.axes})
        stays = torch.ones([shape[axis] if axis in axes else 1 for axis in range(len(shape))], dtype=torch.bool)
        for member, positions in owned:
            stays = stays & member.along_axes(positions)
        gone += int((~stays).sum()) * (shape.numel() // stays.numel())
    return gone
