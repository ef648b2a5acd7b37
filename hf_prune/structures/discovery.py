"""Discovery: heads, neurons and layers of a model that no table describes, found from what depends on what."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .entries import LISTS
from .families import Heads, Layout, Neurons, Part, Stack
from .layer import PROJECTIONS, input_axis, layer_kind, lists_of_layers_in
from .names import HEAD_COUNT_ATTRIBUTES, HEAD_WIDTH_ATTRIBUTES, LAYER_FIELDS
from .small_models import call_exactly
from .tracing import NoDeadNeurons, Owned, inputs_of_projections, trace


def stacks_in(model: PreTrainedModel) -> list[Stack]:
    """The stacks of layers of a small model, with their heads and neurons, which no field or attribute counts yet."""
    lists = lists_of_layers_in(model.base_model)
    layers: dict[str, nn.Module] = {}
    for path, alike in lists.items():
        kinds = [layer_kind(layer) for layer in alike]
        # One of each kind: the others look the same, and proofs take all of them.
        layers |= {f"{path}.{kinds.index(kind)}": alike[kinds.index(kind)] for kind in dict.fromkeys(kinds)}
    with torch.enable_grad(), NoDeadNeurons(), inputs_of_projections(layers) as inputs:
        call_exactly(model)
    found: dict[str, list[Part]] = {}
    for name, layer in layers.items():
        parts = found.setdefault(_starred(model.base_model, name.rpartition(".")[0]), [])
        for owned in trace(layer, inputs[name]):
            part = _part(layer, owned, model.config)
            if part is not None and part not in parts:
                parts.append(part)
    return [
        Stack(path, tuple(parts), _layer_fields(model, path), norm_first=True)
        for path, parts in found.items()
        if parts
    ]


def _starred(root: nn.Module, path: str) -> str:
    """A path with a wildcard for each entry of a list of alike modules."""
    names = path.split(".") if path else []
    holders = [root.get_submodule(".".join(names[:i])) for i in range(len(names))]
    in_list = [isinstance(h, LISTS) and len({type(each) for each in h.children()}) == 1 for h in holders]
    return ".".join("*" if starred else name for name, starred in zip(names, in_list, strict=True))


def _part(layer: nn.Module, owned: Owned, model_config: Any) -> Part | None:
    """What the inputs of a projection are structures of: heads, or neurons if each is one; None if of neither."""
    rows, columns = _rows_of(layer, owned), owned.columns
    if not rows:
        return None
    tables, beside = _beside(layer, owned)
    root = _common([*rows, columns, *tables, *beside])

    def inside(path: str) -> str:
        return path.removeprefix(root).lstrip(".")

    module, columns = _starred(layer, root), inside(columns)
    own = {inside(path): layout for path, layout in rows.items()}
    others = {inside(path): axis for path, axis in beside.items()}
    if owned.width == 1:
        return Neurons(module, own, columns, beside=others)
    named = _size_or_count(layer.get_submodule(root), model_config, min(_widths(layer, rows, owned)), owned.count)
    if named is None:
        return None
    return Heads(module, own, columns, *named, tables=tuple(map(inside, tables)), beside=others)


def _rows_of(layer: nn.Module, owned: Owned) -> dict[str, Layout]:
    """The projections whose outputs structures own, and how these lie in them; empty if one is not divided by them."""
    rows: dict[str, Layout] = {}
    for (name, axis), owners in owned.owners.items():
        path, _, attribute = name.rpartition(".")
        module = layer.get_submodule(path)
        # A bias goes as its weight does; of a bias of keys nothing may depend.
        if not isinstance(module, PROJECTIONS) or path == owned.columns or attribute == "bias":
            continue
        layout = _layout(owners, owned)
        if layout is None or (attribute == "weight" and axis == input_axis(module)):
            return {}
        if rows.setdefault(path, layout) != layout:
            return {}
    return rows


def _beside(layer: nn.Module, owned: Owned) -> tuple[list[str], dict[str, int]]:
    """The embeddings with a column for each structure; and other parameters with something for each → its axis."""
    tables: list[str] = []
    beside: dict[str, int] = {}
    for (name, axis), owners in owned.owners.items():
        path = name.rpartition(".")[0]
        module = layer.get_submodule(path)
        is_row = isinstance(module, PROJECTIONS) and path != owned.columns
        if is_row or _layout(owners, owned) != 1:
            continue
        if isinstance(module, nn.Embedding) and axis == 1:
            tables.append(path)
        else:
            beside[name] = axis
    return tables, beside


def _size_or_count(attention: nn.Module, model_config: Any, narrowest: int, count: int) -> tuple[str, str] | None:
    """`Heads.size`, or else `Heads.count`, the other one empty; None if nothing says either.

    Args:
        attention: The module that the heads are in.
        model_config: The config that counts them where the module does not.
        narrowest: The width of the narrowest projection, of all heads together.
        count: How many heads there are.
    """
    for path in _paths(attention, HEAD_WIDTH_ATTRIBUTES):
        if _value(attention, path) == narrowest // count:
            return path, ""
    for path in (*_paths(attention, HEAD_COUNT_ATTRIBUTES), *HEAD_COUNT_ATTRIBUTES):
        if _value(attention, path, getattr(model_config, path, None)) == count:
            return "", path
    return None


def _widths(layer: nn.Module, rows: Mapping[str, Layout], owned: Owned) -> Iterator[int]:
    """The widths of the projection back, and of the parts of those to the structures."""
    width = owned.count * owned.width
    yield width
    for path, layout in rows.items():
        module: Any = layer.get_submodule(path)
        total = module.weight.shape[1 - input_axis(module)]
        yield (total - width) // 2 if layout == "q+k+v" else total // layout


def _paths(module: nn.Module, names: Sequence[str]) -> Iterator[str]:
    """Paths of attributes of these names in a module and below."""
    for name in names:
        for path, inner in module.named_modules():
            if type(vars(inner).get(name)) is int:
                yield f"{path}.{name}" if path else name


def _value(module: nn.Module, path: str, default: Any = None) -> Any:
    """The attribute at a path from a module."""
    head, _, name = path.rpartition(".")
    return getattr(module.get_submodule(head), name, default)


def _layout(owners: torch.Tensor, owned: Owned) -> Layout | None:
    """How the structures lie along an axis; None if in no way that is known."""
    length, count, width = len(owners), owned.count, owned.count * owned.width
    for parts in (1, 2, 3, 4):
        if length % (parts * count) == 0:
            block = torch.arange(length // parts) // (length // parts // count)
            if torch.equal(owners, block.repeat(parts)):
                return parts
    rest, odd = divmod(length - width, 2)
    if rest > 0 and not odd and rest % count == 0 and width % count == 0:
        blocks = [torch.arange(each) // (each // count) for each in (width, rest, rest)]
        if torch.equal(owners, torch.cat(blocks)):
            return "q+k+v"
    return None


def _common(paths: Sequence[str]) -> str:
    """The path of the deepest module that holds everything at some paths."""
    split = [path.split(".")[:-1] for path in paths]
    common = []
    for names in zip(*split, strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    return ".".join(common)


def _layer_fields(model: PreTrainedModel, path: str) -> tuple[str, ...]:
    """The fields of the config that say how many layers are in a list."""
    count = len(list(model.base_model.get_submodule(path).children())) if "*" not in path else -1
    return of_the_same_side(path, [name for name in LAYER_FIELDS if vars(model.config).get(name) == count])


def of_the_same_side(path: str, fields: Sequence[str]) -> tuple[str, ...]:
    """The fields that speak of an encoder or decoder if a path is in one, else those that speak of none."""
    sides = {side: [name for name in fields if side in name] for side in ("encoder", "decoder")}
    own = [name for side, names in sides.items() if side in path for name in names]
    return tuple(own or [name for name in fields if not any(name in names for names in sides.values())])
