"""What belongs to a structure: the slices of parameters that are pruned, and removed, together."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ..weights.masks import MaskSet
from .norms import Norms

KINDS = {
    "head": "heads",
    "neuron": "neurons",
    "channel": "channels",
    "layer": "layers",
    "query": "queries",
    "width": "widths",
    "expert": "experts",
}
"""The kinds of structures → what several of them are called."""

COMPENSATED = {"head", "query", "neuron"}
"""The kinds that projections read and nothing else: what reads them can be solved anew on those that stay."""

LEAST = "a router chooses so many experts for each token, of each of its groups if it has some"
"""Why several structures have to stay, for messages."""

NOBODY = -1
"""The owner of a position that belongs to no structure."""


@dataclass(frozen=True, eq=False)
class Member:
    """One parameter, or buffer, of which structures own slices.

    Attributes:
        name: The parameter's name in the model.
        parameter: The parameter.
        axes: The axes along which it is sliced, in rising order: one, or two where each expert of a fused weight has
            structures of its own.
        owners: `[lengths of the axes]`, int64: the number of the structure that owns each position, or `NOBODY`.
    """

    name: str
    parameter: torch.Tensor
    axes: tuple[int, ...]
    owners: torch.Tensor

    def pool(self, values: torch.Tensor, count: int) -> torch.Tensor:
        """`values` of the parameter's shape → `[count]` sums over what each structure owns, float64, on the CPU."""
        others = [axis for axis in range(values.ndim) if axis not in self.axes]
        slices = values.sum(others, dtype=torch.float64) if others else values.double()
        # On the CPU: CUDA adds up in an order that changes from call to call.
        sums = torch.zeros(count + 1, dtype=torch.float64)
        return sums.index_add_(0, self.owners.flatten() + 1, slices.cpu().flatten())[1:]

    def sizes(self, count: int) -> torch.Tensor:
        """`[count]`, float64: how many elements of the parameter each structure owns."""
        each = self.parameter.numel() // self.owners.numel()
        return torch.bincount(self.owners.flatten() + 1, minlength=count + 1)[1:].double() * each

    def kept_positions(self, kept: torch.Tensor) -> torch.Tensor:
        """`[count]` bools → `[lengths of the axes]` bools: what is not owned by a structure that goes."""
        return torch.cat([torch.ones(1, dtype=torch.bool), kept])[self.owners + 1]

    def along_axes(self, values: torch.Tensor) -> torch.Tensor:
        """`[lengths of the axes]` values → the same, of a shape that broadcasts with the parameter's."""
        return values.view([n if axis in self.axes else 1 for axis, n in enumerate(self.parameter.shape)])


@dataclass(frozen=True, eq=False)
class StructureGroup:
    """The structures of one kind in one module, such as the heads of a layer. They are numbered from 0.

    Attributes:
        name: The module that they are in.
        kind: One of `KINDS`.
        count: How many there are.
        members: What they own.
        multiple: How many remain, of each run, is a multiple of this, or all.
        stay: The numbers of those that cannot go.
        attributes: `(module, attribute, number for each structure)` of what a module counts by them.
        fields: `(field, number for each structure)` of what the model's config counts by them.
        fixed: `(field, value)` of what has to be written into the config when the `fields` change.
        runs: The structures are so many runs of equally many, one behind the other, of each of which as many go: the
            queries of each key-value head, or the neurons of each expert.
        run_attributes: `(module, attribute)` of what a module counts by the structures of one run.
        run_fields: Fields of the model's config that count them.
        least: How many remain at least; of several runs in all of them together.
        buffers: The same for buffers, which have no masks.
        entries: The list of modules whose entries they are; None if they are in none.
        norms: What normalizes over them, where it has to be scaled when some go.
    """

    name: str
    kind: str
    count: int
    members: tuple[Member, ...]
    multiple: int = 1
    stay: tuple[int, ...] = ()
    attributes: tuple[tuple[str, str, int], ...] = ()
    fields: tuple[tuple[str, int], ...] = ()
    fixed: tuple[tuple[str, int], ...] = ()
    runs: int = 1
    run_attributes: tuple[tuple[str, str], ...] = ()
    run_fields: tuple[str, ...] = ()
    least: int = 1
    buffers: tuple[Member, ...] = ()
    entries: str | None = None
    norms: Norms | None = None

    def counts_that_may_go(self, gone: int = 0) -> list[int]:
        """How many may be gone, in rising order, from a number that is gone already.

        Example:
            >>> StructureGroup("mlp", "neuron", 20, (), multiple=8).counts_that_may_go()
            [0, 4, 12]
            >>> StructureGroup("queries", "query", 6, (), runs=2).counts_that_may_go()
            [0, 2, 4]
        """
        each = self.count // self.runs
        run_of_stay = torch.tensor(self.stay, dtype=torch.int64) // each
        last = each - max(-(-self.least // self.runs), *torch.bincount(run_of_stay, minlength=self.runs).tolist())
        widths = range(each // self.multiple * self.multiple, 0, -self.multiple)
        levels = [self.runs * (each - width) for width in widths if each - width <= last]
        return sorted({gone, *(level for level in levels if level > gone)})

    def without(self, gone: int, first: int = 0) -> torch.Tensor:
        """`[count]` bools: what is kept if some go, as many of each run, one behind the other from its `first`.

        Example:
            >>> StructureGroup("queries", "query", 6, (), runs=2).without(2, first=1).int().tolist()
            [1, 0, 1, 1, 0, 1]
        """
        position = torch.arange(self.count) % (self.count // self.runs)
        return (position < first) | (position >= first + gone // self.runs)

    def entries_that_go(self, kept: torch.Tensor) -> set[str]:
        """The paths of the modules that go, where the structures are entries of a list, each with a dot behind."""
        if self.entries is None:
            return set()
        depth = self.entries.count(".") + 2
        inside = [member for member in self.members if member.name.startswith(f"{self.entries}.")]
        gone = [member for member in inside if not kept[member.owners[0]]]
        return {f"{'.'.join(member.name.split('.')[:depth])}." for member in gone}

    def kept_of(self, masks: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Which structures masks keep something of, `[count]` bools. Of parameters without a mask all is kept.

        Where several runs lose as many, what goes beyond the fewest of any run counts as kept.
        """
        kept = torch.zeros(self.count, dtype=torch.bool)
        for member in self.members:
            if member.name in masks:
                shape = masks[member.name].shape
                if shape != member.parameter.shape:
                    raise ValueError(
                        f"the mask of {member.name!r} has shape {tuple(shape)}, the parameter "
                        f"{tuple(member.parameter.shape)}: has the model been shrunk already?"
                    )
                kept |= member.pool(masks[member.name], self.count) > 0
            else:
                kept[member.owners[member.owners != NOBODY]] = True
        if self.runs == 1:
            return kept
        gone = ~kept.view(self.runs, -1)
        return ~(gone & (gone.cumsum(1) <= gone.sum(1).min())).flatten()


Structures = Mapping[str, StructureGroup]
"""Name → the structures of one kind in one module."""

NO_STRUCTURES: Structures = {}
"""No structures: weights are pruned, not structures."""

WITHOUT_STRUCTURES = "Choose granularity unstructured, N:M or block:RxC."
"""What to do where structures cannot be removed, for messages."""


def kept_in(structures: Structures, masks: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `StructureGroup.kept_of` gives for each group."""
    return {name: group.kept_of(masks) for name, group in structures.items()}


def masks_of(structures: Structures, kept: Mapping[str, torch.Tensor]) -> MaskSet:
    """The masks that keep some structures and prune all that the others own.

    There is one for each parameter of which a structure owns something, on its device.
    """
    masks: dict[str, torch.Tensor] = {}
    for name, group in structures.items():
        for member in group.members:
            if member.name not in masks:
                masks[member.name] = torch.ones_like(member.parameter, dtype=torch.bool)
            mask = masks[member.name]
            mask &= member.along_axes(member.kept_positions(kept[name]).to(mask.device))
    return MaskSet(masks)


def parameters_of(structures: Structures) -> dict[str, torch.Tensor]:
    """The parameters of which structures own something, by name."""
    return {member.name: member.parameter for group in structures.values() for member in group.members}


def require_own_weights(found: Structures) -> None:
    """Requires that no weight is in two groups."""
    names: dict[int, str] = {}
    for name, parameter in parameters_of(found).items():
        if (other := names.setdefault(id(parameter), name)) != name:
            raise ValueError(
                f"{other} and {name} are one tensor; structures of layers that share weights cannot be removed. "
                f"{WITHOUT_STRUCTURES}"
            )


def nonzeros(structures: Structures) -> dict[str, torch.Tensor]:
    """Where the parameters are not zero of which structures own something, by name."""
    return {name: parameter.detach() != 0 for name, parameter in parameters_of(structures).items()}


def kinds_of(structures: Structures) -> list[str]:
    """The kinds, each once."""
    return list(dict.fromkeys(group.kind for group in structures.values()))


def count_gone(structures: Structures, kept: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """How many are not kept, and how many there are."""
    total = sum(group.count for group in structures.values())
    return total - sum(int(kept[name].sum()) for name in structures), total


def in_layers_that_stay(structures: Structures, kept: Mapping[str, torch.Tensor]) -> dict[str, StructureGroup]:
    """The groups that are in no layer and no expert that goes; layers come last."""
    layers = [name for name, group in structures.items() if group.kind == "layer"]
    gone = [f"{stack}.{int(i)}." for stack in layers for i in (~kept[stack]).nonzero()]
    gone += [prefix for name, group in structures.items() for prefix in group.entries_that_go(kept[name])]
    inside = [name for name in structures if name not in layers and not f"{name}.".startswith(tuple(gone))]
    return {name: structures[name] for name in (*inside, *layers)}


def fields_of(structures: Structures, left: Mapping[str, int]) -> dict[str, int]:
    """What the fields of a config are to say, those on which all groups that they count agree.

    Args:
        structures: All of each kind.
        left: Group → how many of its structures are left.
    """
    numbers: dict[str, set[int]] = {}
    for name, group in structures.items():
        for field, each in group.fields:
            numbers.setdefault(field, set()).add(each * left[name])
        for field in group.run_fields:
            numbers.setdefault(field, set()).add(left[name] // group.runs)
        if group.fields:
            for field, value in group.fixed:
                numbers.setdefault(field, set()).add(value)
    return {field: found.pop() for field, found in numbers.items() if len(found) == 1}


def advice_for_wrappers(model: nn.Module) -> str:
    """What to do with a model that is none of Transformers', for messages: it may contain one."""
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            return (
                f"It contains a {type(module).__name__} at model.{path}: pass that one. To train the whole, prune and "
                "shrink that part first."
            )
    return f"It contains no Transformers model. {WITHOUT_STRUCTURES}"
