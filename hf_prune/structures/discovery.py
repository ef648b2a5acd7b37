"""Discovery: heads, neurons and layers of a model that no table describes, found from what depends on what."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .families import Heads, Neurons, Parts, Stack, lists_of_layers_in
from .names import HEAD_COUNT_ATTRIBUTES, HEAD_WIDTH_ATTRIBUTES, LAYER_FIELDS
from .small_models import call_exactly
from .tracing import Owned, alive, inputs_of_projections, trace


def stacks_in(model: PreTrainedModel) -> list[Stack]:
    """The stacks of layers of a small model, with their heads and neurons, but for attributes and fields."""
    lists = lists_of_layers_in(model.base_model)
    layers = {f"{path}.{i}": layer for path, found in lists.items() for i, layer in enumerate(found)}
    with torch.enable_grad(), alive(), inputs_of_projections(layers) as inputs:
        call_exactly(model)
    found: dict[str, list[Heads | Neurons]] = {}
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
    """A path with a wildcard for each position in a list of alike modules."""
    names = path.split(".") if path else []
    holders = [root.get_submodule(".".join(names[:i])) for i in range(len(names))]
    in_list = [isinstance(h, nn.ModuleList) and len({type(each) for each in h}) == 1 for h in holders]
    return ".".join("*" if starred else name for name, starred in zip(names, in_list, strict=True))


def _part(layer: nn.Module, owned: Owned, model_config: Any) -> Heads | Neurons | None:
    rows: dict[str, Parts] = {}
    beside: dict[str, int] = {}
    tables: list[str] = []
    width = owned.count * owned.width
    for (name, axis), owners in owned.owners.items():
        path, _, attribute = name.rpartition(".")
        module = layer.get_submodule(path)
        if isinstance(module, (nn.Linear, Conv1D)) and path != owned.columns:
            output = 0 if isinstance(module, nn.Linear) else 1
            if attribute == "bias":
                continue  # It goes as its weight does; of a bias of keys nothing may depend.
            parts = _layout(owners, owned.count, width)
            if parts is None or (attribute == "weight" and axis != output):
                return None
            if rows.setdefault(path, parts) != parts:
                return None
        elif _layout(owners, owned.count, width) != 1:
            continue
        elif isinstance(module, nn.Embedding) and axis == 1:
            tables.append(path)
        else:
            beside[name] = axis
    if not rows:
        return None
    root = _common([*rows, owned.columns, *tables, *beside])
    own = {path.removeprefix(root).lstrip("."): parts for path, parts in rows.items()}
    columns = owned.columns.removeprefix(root).lstrip(".")
    others = {path.removeprefix(root).lstrip("."): axis for path, axis in beside.items()}
    if owned.width == 1:
        return Neurons(_starred(layer, root), own, columns, beside=others)
    attention = layer.get_submodule(root)
    narrowest = min(_widths(layer, rows, width))
    size = next(
        (n for n in _paths(attention, HEAD_WIDTH_ATTRIBUTES) if _value(attention, n) == narrowest // owned.count), ""
    )
    count = (
        ""
        if size
        else next(
            (
                n
                for n in (*_paths(attention, HEAD_COUNT_ATTRIBUTES), *HEAD_COUNT_ATTRIBUTES)
                if _said(attention, model_config, n) == owned.count
            ),
            None,
        )
    )
    if count is None:
        return None
    return Heads(
        _starred(layer, root),
        own,
        columns,
        size,
        count,
        tables=tuple(path.removeprefix(root).lstrip(".") for path in tables),
        beside=others,
    )


def _widths(layer: nn.Module, rows: Mapping[str, Parts], width: int) -> Iterator[int]:
    yield width
    for path, parts in rows.items():
        module: Any = layer.get_submodule(path)
        total = module.weight.shape[0 if isinstance(module, nn.Linear) else 1]
        yield (total - width) // 2 if parts == "q+k+v" else total // parts


def _paths(module: nn.Module, names: Sequence[str]) -> Iterator[str]:
    """Paths of attributes of these names in a module and below."""
    for name in names:
        for path, inner in module.named_modules():
            if type(vars(inner).get(name)) is int:
                yield f"{path}.{name}" if path else name


def _value(module: nn.Module, path: str) -> Any:
    head, _, name = path.rpartition(".")
    return getattr(module.get_submodule(head), name)


def _said(module: nn.Module, model_config: Any, path: str) -> Any:
    head, _, name = path.rpartition(".")
    return getattr(module.get_submodule(head), name, getattr(model_config, path, None))


def _layout(owners: torch.Tensor, count: int, width: int) -> Parts | None:
    """How the structures lie along an axis; None if in no way that is known."""
    length = len(owners)
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
    """The deepest module that holds all of some."""
    split = [path.split(".")[:-1] for path in paths]
    common = []
    for names in zip(*split, strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    return ".".join(common)


def _layer_fields(model: PreTrainedModel, path: str) -> tuple[str, ...]:
    count = len(list(model.base_model.get_submodule(path).children())) if "*" not in path else -1
    return of_the_same_side(path, [name for name in LAYER_FIELDS if vars(model.config).get(name) == count])


def of_the_same_side(path: str, fields: Sequence[str]) -> tuple[str, ...]:
    """The fields that speak of an encoder or decoder if a path is in one, else those that speak of none."""
    sides = {side: [name for name in fields if side in name] for side in ("encoder", "decoder")}
    own = [name for side, names in sides.items() if side in path for name in names]
    return tuple(own or [name for name in fields if not any(name in names for names in sides.values())])
