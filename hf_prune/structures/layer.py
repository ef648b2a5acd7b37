"""Layer: one layer of a model, and where in it its heads and neurons are."""

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from .entries import LISTS
from .families import Heads, Layout, Neurons, Part, Stack
from .groups import NOBODY, Member

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
        return at(self.module, join(*path))

    def parts_of(self, stack: Stack) -> Iterator[Part]:
        """What the layer has of what a family describes, each of a list by itself (`experts.*`)."""
        for part in stack.parts:
            for module in expand(self.module, part.module):
                own = dataclasses.replace(part, module=module)
                if self.has(own):
                    yield own

    def has(self, part: Part) -> bool:
        """Whether it has the projections of a part."""
        return all(self.get(part.module, path) is not None for path in (*part.rows, part.columns))

    def tables(self, part: Part) -> list[str]:
        """The paths of the embeddings with a column for each head that the layer has."""
        paths = [join(part.module, table) for table in part.tables]
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
                f"{join(self.name, part.module, path)!r} is described as a projection, and is a "
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
                f"{join(self.name, part.module, part.size)!r} is taken for the width of a head, and is {size!r}."
            )
        count = min(widths.values()) // size
        for path, width in widths.items():
            if count == 0 or width % size or width // size % count:
                raise ValueError(
                    f"{join(self.name, part.module, path)!r} is {width} wide, for {width // size} heads of width "
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
                f"{join(self.name, part.module, part.count)!r} is taken for the number of heads, and is {count!r}."
            )
        return count

    def lengths(self, part: Part, path: str, layout: Layout) -> list[int]:
        """How long the parts are into which a layout divides the output of a projection."""
        width = self.height(part, path)
        if isinstance(layout, int):
            return [width // layout] * layout
        if layout not in ("q+k+v", "q"):
            raise ValueError(
                f"the layout of {join(self.name, part.module, path)!r} must be a number of equal parts or 'q+k+v'; "
                f"got {layout!r}."
            )
        queries = self.width(part)
        rest = (width - queries) // 2
        return [queries, rest, rest] if layout == "q+k+v" else [queries]

    def members(self, part: Part, count: int) -> Iterator[Member]:
        """The outputs of the projections with their biases, the inputs of the projection back, and what is beside."""
        for path, layout in part.rows.items():
            row = self.get(part.module, path)
            axis = 1 - input_axis(row)
            owners = torch.full((self.height(part, path),), NOBODY)
            blocks = torch.cat([_blocks(width, count) for width in self.lengths(part, path, layout)])
            owners[: len(blocks)] = blocks
            name = join(self.name, part.module, path)
            yield Member(f"{name}.weight", row.weight, (axis,), owners)
            if row.bias is not None:
                yield Member(f"{name}.bias", row.bias, (0,), owners)
        columns = self.get(part.module, part.columns)
        name, axis = join(self.name, part.module, part.columns, "weight"), input_axis(columns)
        yield Member(name, columns.weight, (axis,), _blocks(self.width(part), count))
        for path in self.tables(part):
            weight = self.get(path).weight
            yield Member(join(self.name, path, "weight"), weight, (1,), _blocks(weight.shape[1], count))
        for path, axis in part.beside.items():
            if (parameter := self.get(part.module, path)) is not None:
                owners = _blocks(parameter.shape[axis], count)
                yield Member(join(self.name, part.module, path), parameter, (axis,), owners)

    def attributes(self, part: Part, count: int) -> Iterator[tuple[str, str, int]]:
        """The whole numbers that go with the structures: module, attribute, and how much of it each has."""
        for path in part.attributes:
            if (value := self.get(part.module, path)) is not None:
                owner, _, attribute = join(self.name, part.module, path).rpartition(".")
                yield owner, attribute, value // count


def layer_kind(layer: nn.Module) -> str:
    """What tells layers apart that are built otherwise: the classes of all modules, lists of alike ones once."""
    named = (f"{name}:{type(module).__name__}" for name, module in layer.named_modules())
    return " ".join(dict.fromkeys(re.sub(r"\b\d+\b", "*", each) for each in named))


def lists_of_layers_in(root: nn.Module) -> dict[str, nn.ModuleList]:
    """The lists of modules that are in no other list, by path."""
    found: dict[str, nn.ModuleList] = {}
    for path, module in root.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and not any(path.startswith(f"{f}.") for f in found):
            found[path] = module
    return found


def at(root: nn.Module, path: str) -> Any:
    """What is at a path from a module: a module, or one's attribute; None if there is nothing."""
    found: Any = root
    for name in filter(None, path.split(".")):
        found = getattr(found, name, None)
    return found


def expand(root: nn.Module, path: str) -> Iterator[str]:
    """The paths that one with wildcards for entries of lists stands for."""
    head, star, tail = path.partition("*")
    if not star:
        yield path
        return
    found = at(root, head.rstrip("."))
    for name in found._modules if isinstance(found, LISTS) else ():
        yield from expand(root, f"{head}{name}{tail}")


def join(*parts: str) -> str:
    """Parts of a path, none of them empty, with dots between them."""
    return ".".join(part for part in parts if part)


def input_axis(projection: nn.Module) -> int:
    """Along which axis of its weight the inputs of a projection lie; its outputs lie along the other."""
    return 0 if isinstance(projection, Conv1D) else 1


def _blocks(length: int, count: int) -> torch.Tensor:
    """`[length]` owners, if what structures own lies one behind the other."""
    return torch.arange(length) // (length // count)
