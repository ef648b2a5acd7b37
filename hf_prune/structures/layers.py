"""Layers: the heads, queries and neurons in them, and the stacks that they are in, where a family has them."""

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .families import HOW_TO_ADD, Family, Heads, Layout, Neurons, Part, Stack, layer_kind
from .groups import KINDS, Member, StructureGroup, require_own_weights
from .names import QUERIES_OF_EACH

PROJECTIONS = (nn.Linear, Conv1D)
"""The modules whose weights are matrices with an axis of inputs and one of outputs."""


@dataclass(frozen=True)
class Layer:
    """One layer of a model, and its name."""

    name: str
    module: nn.Module
    config: PretrainedConfig

    def get(self, *path: str) -> Any:
        """What is at a path from the layer: a module, or one's attribute; None if there is nothing."""
        return _get(self.module, _join(*path))

    def parts_of(self, stack: Stack) -> Iterator[Part]:
        """What the layer has of what a family describes, each of a list by itself (`experts.*`)."""
        for part in stack.parts:
            for module in _expand(self.module, part.module):
                own = dataclasses.replace(part, module=module)
                if self.has(own):
                    yield own

    def has(self, part: Part) -> bool:
        """Whether it has the projections of a part."""
        return all(self.get(part.module, path) is not None for path in (*part.rows, part.columns))

    def tables(self, part: Part) -> list[str]:
        """The paths of the embeddings with a column for each head that the layer has."""
        paths = [_join(part.module, table) for table in part.tables]
        return [path for path in paths if self.get(path) is not None]

    def width(self, part: Part) -> int:
        """How much goes into the output projection."""
        columns = self.projection(part, part.columns)
        return int(columns.weight.shape[input_axis(columns)])

    def height(self, part: Part, path: str) -> int:
        """How much comes out of a projection."""
        row = self.projection(part, path)
        return int(row.weight.shape[1 - input_axis(row)])

    def projection(self, part: Part, path: str) -> nn.Linear | Conv1D:
        """A projection of a part, which has to be of a kind whose axes are known."""
        found = self.get(part.module, path)
        if not isinstance(found, PROJECTIONS):
            raise ValueError(
                f"{_join(self.name, part.module, path)!r} is described as a projection, and is a "
                f"{type(found).__name__}. Name one that is nn.Linear or Conv1D."
            )
        return found

    def count(self, part: Part) -> int:
        """Number of heads (of keys and values, where these are fewer, and divide those of queries), or of neurons."""
        if isinstance(part, Neurons):
            return self.width(part)
        if not part.size:
            return self._said_count(part)
        widths = {part.columns: self.width(part)}
        for path, layout in part.rows.items():
            for width in self.lengths(part, path, layout):
                widths[path] = min(widths.get(path, width), width)
        size = self.get(part.module, part.size)
        if not isinstance(size, int) or size < 1:
            raise ValueError(
                f"{_join(self.name, part.module, part.size)!r} is described as the width of a head, and is {size!r}."
            )
        count = min(widths.values()) // size
        for path, width in widths.items():
            if count == 0 or width % size or width // size % count:
                raise ValueError(
                    f"{_join(self.name, part.module, path)!r} is {width} wide, for {width // size} heads of width "
                    f"{size}, which {count} key-value heads do not divide; whole groups cannot be removed."
                )
        return count

    def _said_count(self, part: Heads) -> int:
        """The number of heads that the attention or its config says."""
        config = self.get(part.module, "config") or self.config
        said = self.get(part.module, part.count)
        count = said if said is not None else getattr(config, part.count, None)
        widths = [width for path, layout in part.rows.items() for width in self.lengths(part, path, layout)]
        if not isinstance(count, int) or count < 1 or any(width % count for width in (*widths, self.width(part))):
            raise ValueError(
                f"{_join(self.name, part.module, part.count)!r} is described as the number of heads, and is {count!r}."
            )
        return count

    def lengths(self, part: Part, path: str, layout: Layout) -> list[int]:
        """How long the parts are into which a layout divides the output of a projection."""
        width = self.height(part, path)
        if layout == "q+k+v":
            rest = (width - self.width(part)) // 2
            return [self.width(part), rest, rest]
        return [width // layout] * layout

    def members(self, part: Part, count: int) -> Iterator[Member]:
        """The outputs of the projections with their biases, the inputs of the projection back, and what is beside."""
        for path, layout in part.rows.items():
            row = self.get(part.module, path)
            axis = 1 - input_axis(row)
            owners = torch.cat([_blocks(width, count) for width in self.lengths(part, path, layout)])
            name = _join(self.name, part.module, path)
            yield Member(f"{name}.weight", row.weight, (axis,), owners)
            if row.bias is not None:
                yield Member(f"{name}.bias", row.bias, (0,), owners)
        columns = self.get(part.module, part.columns)
        name, axis = _join(self.name, part.module, part.columns, "weight"), input_axis(columns)
        yield Member(name, columns.weight, (axis,), _blocks(self.width(part), count))
        for path in self.tables(part):
            weight = self.get(path).weight
            yield Member(_join(self.name, path, "weight"), weight, (1,), _blocks(weight.shape[1], count))
        for path, axis in part.beside.items():
            if (parameter := self.get(part.module, path)) is not None:
                owners = _blocks(parameter.shape[axis], count)
                yield Member(_join(self.name, part.module, path), parameter, (axis,), owners)

    def queries(self, part: Heads) -> StructureGroup | None:
        """The queries of a layer, blocks of rows of own projections; None if key-value heads have one each."""
        if not part.size:
            return None
        count, size, width = self.count(part), self.get(part.module, part.size), self.width(part)
        apart = [path for path, layout in part.rows.items() if layout == 1 and self.height(part, path) == width]
        if (total := width // size) == count or not apart:
            return None
        there = {path: axis for path, axis in part.beside.items() if self.get(part.module, path) is not None}
        beside = {path: axis for path, axis in there.items() if self.get(part.module, path).shape[axis] % total == 0}
        own = dataclasses.replace(part, rows=dict.fromkeys(apart, 1), beside=beside, tables=())
        attention, found = _join(self.name, part.module), self.get(part.module)
        return StructureGroup(
            _join(attention, apart[0]),
            "query",
            total,
            tuple(self.members(own, total)),
            # Others count key-value heads, which stay.
            attributes=tuple(each for each in self.attributes(part, total) if each[2] in (1, size)),
            fields=tuple((field, 1) for field in part.fields[:1]),
            fixed=((part.fixed, size),) if part.fixed is not None else (),
            runs=count,
            run_attributes=tuple((attention, name) for name in QUERIES_OF_EACH if hasattr(found, name)),
        )

    def attributes(self, part: Part, count: int) -> Iterator[tuple[str, str, int]]:
        """The whole numbers that go with the structures: module, attribute, and how much of it each has."""
        for path in part.attributes:
            if (value := self.get(part.module, path)) is not None:
                owner, _, attribute = _join(self.name, part.module, path).rpartition(".")
                yield owner, attribute, value // count


@dataclass(frozen=True)
class LayerStack:
    """The layers of one stack of a model."""

    stack: Stack
    name: str
    layers: Sequence[Layer]
    config: PretrainedConfig
    configs: Sequence[PretrainedConfig]

    def structures(self, kinds: Collection[str], multiple_of: int) -> Iterator[StructureGroup]:
        """The structures of some kinds, of each kind in the order of the layers."""
        if "layer" in kinds:
            yield self._whole()
        if "query" in kinds:
            yield from self._queries()
        places = [(name, part, owners) for name, part, owners in self._places() if part.kind in kinds]
        for kind in sorted({part.kind for part in self.stack.parts if part.kind in kinds}):
            if not any(part.kind == kind for _, part, _ in places):
                raise ValueError(
                    f"{self.name!r} has no {KINDS[kind]} where this family has them; it looks otherwise in the "
                    f"installed version of Transformers. {HOW_TO_ADD.format(self.config.model_type)}"
                )
        for name, part, owners in places:
            yield _of_part(part, owners, multiple_of, name)

    def _places(self) -> Iterator[tuple[str, Part, list[Layer]]]:
        """What layers are made of: a name of its own, the part, and the layers that lose the same structures of it."""
        there = [(layer, part) for layer in self.layers for part in layer.parts_of(self.stack)]
        shared = [(self.name, part, [each for each, own in there if own == part]) for part in self.stack.parts]
        found = [(where, part, owners) for where, part, owners in shared if part.is_shared and owners]
        found += [(layer.name, part, [layer]) for layer, part in there if not part.is_shared]
        taken: set[str] = set()
        for where, part, owners in found:
            name = _join(where, part.module)
            taken.add(name := _join(name, part.columns) if name in taken else name)
            yield name, part, owners

    def _queries(self) -> Iterator[StructureGroup]:
        """The queries of each layer in which several read one key-value head, as many of each."""
        parts = [(layer, part) for layer in self.layers for part in layer.parts_of(self.stack)]
        found = [group for layer, part in parts if isinstance(part, Heads) and (group := layer.queries(part))]
        if not found:
            raise ValueError(
                f"each key-value head in {self.name!r} has one query, or the two are not projected apart, so that no "
                "query can go by itself. Choose granularity head."
            )
        yield from found

    def why_layers_stay(self) -> str | None:
        """Why no layer can be removed; None if layers can."""
        field = self.stack.norm_first_field
        if not (getattr(self.config, field) if field is not None else self.stack.norm_first):
            return "a norm comes behind each sum, so that a layer without outputs still changes what it hands on"
        if getattr(self.config, "scale_attn_by_inverse_layer_idx", False):
            return "attention is scaled by the number of its layer (scale_attn_by_inverse_layer_idx)"
        if getattr(self.config, "use_weighted_layer_sum", False):
            return "a weight goes to each layer (use_weighted_layer_sum)"
        fields = self.stack.fields
        if not any(getattr(config, name, None) == len(self.layers) for config in self.configs for name in fields):
            return f"no config says in {' or '.join(fields)} (Stack.fields) that there are {len(self.layers)}"
        # The last one is what a config of a backbone says by itself.
        if list(getattr(self.config, "out_indices", None) or [len(self.layers)]) != [len(self.layers)]:
            return "the outputs of layers are asked for by their numbers (out_indices)"
        return None

    def _whole(self) -> StructureGroup:
        """The layers as structures; the layer that makes the position bias for the others has to stay."""
        if why := self.why_layers_stay():
            raise ValueError(
                f"layers of {self.name!r} cannot be removed: {why}. Choose granularity head, neuron or head+neuron."
            )
        members = [
            Member(f"{layer.name}.{name}", parameter, (0,), torch.full((len(parameter),), i))
            for i, layer in enumerate(self.layers)
            for name, parameter in layer.module.named_parameters()
        ]
        stay = [
            i
            for i, layer in enumerate(self.layers)
            if any(layer.tables(part) for part in self.stack.parts) or layer_kind(layer.module) in self.stack.stay
        ]
        fields = tuple((name, 1) for name in self.stack.fields)
        return StructureGroup(self.name, "layer", len(self.layers), tuple(members), stay=tuple(stay), fields=fields)


def _of_part(part: Part, layers: Sequence[Layer], multiple_of: int, name: str) -> StructureGroup:
    """The structures of a part of one layer, or of several that lose the same ones."""
    counts = {layer.count(part) for layer in layers}
    if len(counts) > 1:
        raise ValueError(f"the layers of {name!r} share a position bias, and have {sorted(counts)} heads.")
    count, first = counts.pop(), layers[0]
    fields = [(field, 1) for field in part.fields]
    fixed: tuple[tuple[str, int], ...] = ()
    if isinstance(part, Heads):
        size = first.get(part.module, part.size) if part.size else first.width(part) // count
        # The first field counts the heads of queries, of which each structure may have several.
        fields[:1] = [(field, first.width(part) // size // count) for field in part.fields[:1]]
        fixed = ((part.fixed, size),) if part.fixed is not None else ()
    return StructureGroup(
        name,
        part.kind,
        count,
        members=tuple(member for layer in layers for member in layer.members(part, count)),
        multiple=multiple_of if isinstance(part, Neurons) else 1,
        attributes=tuple(each for layer in layers for each in layer.attributes(part, count)),
        fields=tuple(fields),
        fixed=fixed,
    )


def _get(root: nn.Module, path: str) -> Any:
    """What is at a path from a module: a module, or one's attribute; None if there is nothing."""
    found: Any = root
    for name in filter(None, path.split(".")):
        found = getattr(found, name, None)
    return found


def _expand(root: nn.Module, path: str) -> Iterator[str]:
    """The paths that one with wildcards for positions in lists stands for."""
    head, star, tail = path.partition("*")
    if not star:
        yield path
        return
    found = _get(root, head.rstrip("."))
    for i in range(len(found) if isinstance(found, nn.ModuleList) else 0):
        yield from _expand(root, f"{head}{i}{tail}")


def structures_of(
    stacks: Sequence[LayerStack], kinds: Collection[str], multiple_of: int = 1
) -> dict[str, StructureGroup]:
    """The structures of some kinds in some stacks, by name."""
    found = {group.name: group for each in stacks for group in each.structures(kinds, multiple_of)}
    require_own_weights(found)
    return found


def stacks_of(model: PreTrainedModel, family: Family) -> list[LayerStack]:
    """The stacks of a model, where a family has them."""
    config, base = model.config, model.base_model
    prefix = model.base_model_prefix if base is not model else ""
    found = []
    for stack in family:
        for path in _expand(base, stack.layers):
            layers = _get(base, path)
            if isinstance(layers, nn.ModuleList) and len(layers):
                name = _join(prefix, path)
                configs = _configs_around(model, name)
                named = [Layer(f"{name}.{i}", layer, config) for i, layer in enumerate(layers)]
                found.append(LayerStack(stack, name, named, config, configs))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no layers where the family {config.model_type!r} has them "
            f"({', '.join(stack.layers for stack in family)})."
        )
    return found


def _configs_around(model: nn.Module, path: str) -> list[PretrainedConfig]:
    """The configs of a model, of the module at a path in it, and of all that are between them."""
    names = path.split(".")
    around = [model.get_submodule(".".join(names[:depth])) for depth in range(len(names) + 1)]
    configs = [getattr(module, "config", None) for module in around]
    return [config for config in configs if isinstance(config, PretrainedConfig)]


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def input_axis(projection: nn.Module) -> int:
    """Along which axis of its weight the inputs of a projection lie; its outputs lie along the other."""
    return 0 if isinstance(projection, Conv1D) else 1


def _blocks(length: int, count: int) -> torch.Tensor:
    """`[length]` owners, if what structures own lies one behind the other."""
    return torch.arange(length) // (length // count)
