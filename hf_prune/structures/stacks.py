"""Stacks: the layers of a model, and the heads, queries and neurons in them, where a family has them."""

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .families import HOW_TO_ADD, Family, Heads, Layout, Neurons, Part, Stack
from .groups import KINDS, Member, StructureGroup, require_own_weights
from .layer import Layer, at, expand, join, layer_kind
from .names import QUERIES_OF_EACH


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
            name = join(where, part.module)
            taken.add(name := join(name, part.columns) if name in taken else name)
            yield name, part, owners

    def _queries(self) -> Iterator[StructureGroup]:
        """The queries of layers in which several read one key-value head, as many of each."""
        heads = [(name, part, owners) for name, part, owners in self._places() if isinstance(part, Heads)]
        found = [group for name, part, owners in heads if (group := _queries_of(part, owners, name)) is not None]
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
            return f"no config says in {' or '.join(fields) or 'any field'} that there are {len(self.layers)}"
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
    count, first = _count_in(layers, part, name), layers[0]
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


def _queries_of(part: Heads, layers: Sequence[Layer], name: str) -> StructureGroup | None:
    """The queries of one layer, or of several that lose the same ones; None if none can go by itself."""
    count, first = _count_in(layers, part, name), layers[0]
    size, width = first.get(part.module, part.size) if part.size else 0, first.width(part)
    alone: dict[str, Layout] = {
        path: 1 for path, layout in part.rows.items() if layout == 1 and first.height(part, path) == width
    }
    rows = alone or {path: "q" for path, layout in part.rows.items() if layout == "q+k+v"}
    if not size or (total := width // size) == count or not rows:
        return None
    lengths = {path: _length(first.get(part.module, path), axis) for path, axis in part.beside.items()}
    # What is as long as the keys goes with these.
    beside = {path: part.beside[path] for path, n in lengths.items() if n and n % total == 0 and n != count * size}
    own = dataclasses.replace(part, rows=rows, beside=beside, tables=())
    return StructureGroup(
        join(name, next(iter(rows))),
        "query",
        total,
        tuple(member for layer in layers for member in layer.members(own, total)),
        # Others count key-value heads, which stay.
        attributes=tuple(each for layer in layers for each in layer.attributes(part, total) if each[2] in (1, size)),
        fields=tuple((field, 1) for field in part.fields[:1]),
        fixed=((part.fixed, size),) if part.fixed is not None else (),
        runs=count,
        run_attributes=tuple(
            (join(layer.name, part.module), attribute)
            for layer in layers
            for attribute in QUERIES_OF_EACH
            if layer.get(part.module, attribute) is not None
        ),
    )


def _length(parameter: torch.Tensor | None, axis: int) -> int:
    """How long a parameter is along an axis; 0 if there is none."""
    return 0 if parameter is None else parameter.shape[axis]


def _count_in(layers: Sequence[Layer], part: Part, name: str) -> int:
    """How many structures of a part each of some layers has."""
    counts = {layer.count(part) for layer in layers}
    if len(counts) > 1:
        raise ValueError(f"the layers of {name!r} share a position bias, and have {sorted(counts)} heads.")
    return counts.pop()


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
        for path in expand(base, stack.layers):
            layers = at(base, path)
            if isinstance(layers, nn.ModuleList) and len(layers):
                name = join(prefix, path)
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
