"""Contributions: how much of what is computed behind a structure is its doing, from what it hands on."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..calibration.activations import Product, ProductWatch
from ..calibration.batches import Batch
from ..calibration.contexts import eager_experts
from ..calibration.passes import call, targets_in_passes
from ..calibration.statistics import inputs_under
from ..distributed.processes import sum_over_processes_
from ..weights.targets import Target
from .gatherers import OfRouting, StructureGatherer, token_mask
from .groups import KINDS, Member, StructureGroup, Structures
from .routed import Routed

# How keys and values are called that a decoder makes of the encoder's outputs.
_CROSSES = re.compile(r"(encoder_attn|EncDecAttention|cross_?[aA]tt).*\.((k|v|key|value)(_proj)?|\w*kv\w*)$")


def readers_of(group: StructureGroup, targets: Mapping[str, Target]) -> Iterator[tuple[Member, Target]]:
    """The projections whose inputs are divided among the structures of a group."""
    for member in group.members:
        target = targets.get(member.name)
        if target is not None and target.axes[-1] in member.axes:
            yield member, target


class Contribution(StructureGatherer):
    """`√E‖W_s x_s‖²` of each structure: `x_s` is what it hands on, `W_s` the columns of the projections that read it.

    The mean is over tokens, without padding where that can be told, which it cannot inside of experts. Experts hand on
    their outputs, as the router weighs them; of tokens that are not routed to one it is zero.
    """

    kinds = ("head", "query", "neuron", "width", "expert")

    def __init__(self, model: nn.Module, structures: Structures, targets: Mapping[str, Target]) -> None:
        super().__init__(model, structures, targets)
        experts = {name: group for name, group in self.structures.items() if group.kind == "expert"}
        self._experts = _RoutedEnergy(model, experts, targets) if experts else None
        self._readers: dict[str, list[_Reader]] = {}
        for group in self.structures.values():
            for member, target in readers_of(group, self.targets) if group.name not in experts else ():
                self._readers.setdefault(member.name, []).append(_Reader.of(group, member, target))
        self._in_passes = targets_in_passes(model, {name: self.targets[name] for name in self._readers})

    @torch.no_grad()
    def see(self, batch: Batch, *, is_own: bool) -> None:
        """Adds a batch."""
        if self._experts is not None:
            self._experts.see(batch, is_own=is_own)
        if self._readers:

            def add(product: Product) -> None:
                # The decoder's keys and values may be those of the encoder's tokens.
                module = product.target.module
                mask = None if _CROSSES.search(module) else token_mask(self.model, module, batch)
                inputs = inputs_under(mask, product).float()
                for reader in self._readers[product.target.name]:
                    reader.add_(inputs, product.part_slice)

            with eager_experts(self.model), ProductWatch(self._in_passes if is_own else {}, add):
                call(self.model, batch)

    @torch.no_grad()
    def statistic(self) -> Mapping[str, torch.Tensor]:
        """The roots; raises if nothing was seen of what a group hands on."""
        energies = {name: torch.zeros(group.count, dtype=torch.float64) for name, group in self.structures.items()}
        if self._experts is not None:
            energies |= self._experts.statistic()
        there = set()
        for readers in self._readers.values():
            for reader in readers:
                energies[reader.group.name] += reader.energies()
                if reader.target.weight.any():  # Else an expert of a list is pruned with all that is in it.
                    there.add(reader.group.name)
        if unseen := [name for name in energies if name in there and not energies[name].any()]:
            raise ValueError(
                f"no calibration sample was seen to go through the {KINDS[self.structures[unseen[0]].kind]} of "
                f"{unseen[0]!r}. Give samples that reach them, exclude them (exclude_modules), or choose a criterion "
                "of weights, such as taylor."
            )
        return {name: energy.sqrt() for name, energy in energies.items()}


@dataclass(frozen=True)
class _Reader:
    """A projection, or all of a layer's experts, and the structures whose outputs go into it.

    Attributes:
        group: The structures.
        member: Its weight, and which inputs are whose.
        target: Its weight.
        moments: What is summed up of its inputs: `[structures, width, width]` products where each structure has as
            many, one behind the other, else `[parts, in]` squares.
        positions: Of how many tokens.
    """

    group: StructureGroup
    member: Member
    target: Target
    moments: torch.Tensor
    positions: torch.Tensor

    @classmethod
    def of(cls, group: StructureGroup, member: Member, target: Target) -> "_Reader":
        """A projection of which nothing is seen yet."""
        device, width = target.weight.device, len(member.owners) // group.count
        in_order = torch.arange(group.count).repeat_interleave(width)
        are_blocks = target.parts == 1 and width > 1 and torch.equal(member.owners, in_order)
        shape = (group.count, width, width) if are_blocks else (target.parts, target.fan_in)
        return cls(group, member, target, torch.zeros(shape, device=device), torch.zeros((), device=device))

    def add_(self, inputs: torch.Tensor, parts: slice) -> None:
        """Adds `[parts, positions, in]` inputs of some parts."""
        self.positions.add_(inputs.shape[:2].numel())
        if self.moments.ndim == 3:
            of_each = inputs[0].view(-1, *self.moments.shape[:2])
            self.moments.add_(torch.einsum("psi,psj->sij", of_each, of_each))
        else:
            self.moments[parts] += inputs.square().sum(1)

    def energies(self) -> torch.Tensor:
        """`[structures]` means of `‖W_s x_s‖²` over what all processes have seen, float64, on the CPU."""
        moments = sum_over_processes_(self.moments) / sum_over_processes_(self.positions).clamp_min(1)
        weight = self.target.weight.detach().float()
        if self.moments.ndim < 3:
            return self.member.pool(weight.square() * self.target.per_input(moments), self.group.count)
        columns = weight.permute(self.target.axes).unflatten(-1, moments.shape[:2])
        return torch.einsum("osi,sij,osj->s", columns, moments, columns).double().cpu()


class _RoutedEnergy(OfRouting):
    """`E‖g · f(x)‖²` of each expert over all tokens, of which those that are not routed to it add nothing."""

    def add(self, name: str, experts: nn.Module, routed: Routed, real: torch.Tensor) -> None:
        """Adds the outputs of a call."""
        numbers, owners, values = routed.outputs(experts)
        counted = real[owners]
        self.sums[name].index_add_(0, numbers[counted], values[counted].square())
        self.counts[name] += real.sum()
