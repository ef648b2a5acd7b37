"""Stages: a model's targets in the order in which forward passes use them, and passes that go no further than one.

What changes the weights of a layer by its inputs has to see those inputs as the changed layers before it make them, so
every layer needs passes of its own. Each is an ordinary forward call that stops once it has shown a layer's inputs. A
block (an innermost element of a `ModuleList`) whose targets are all final is computed once more for each batch; after
that its cached output is returned. While a block is under way, the same holds for its parts, such as its attention.
What lies between blocks and has no targets is final once a pass comes to it before any target that is not.
"""

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..calibration.activations import Product, ProductWatch
from ..calibration.batches import Batch
from ..calibration.contexts import keep_random_state
from ..calibration.passes import call
from ..distributed.processes import gather_from_processes
from ..weights.targets import Target
from .dependencies import OutputReads, ValueReads


class _Use(NamedTuple):
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


class Stages:
    """A context that runs forward passes stage by stage over a few batches, with cached outputs of what is finished.

    The order of the stages is that of dense passes. Of batches of the same shapes one is looked at, unless values of
    tensors decide what a pass does, as they do for experts.

    Args:
        model: The model, unwrapped, in evaluation mode; called without gradients.
        targets: The weights.
        batches: What it is called with, on its device, on this process.

    Attributes:
        order: The stages, in the order of their first use, the same on all processes.
        unused: Targets of which no process has seen a product.
    """

    def __init__(self, model: nn.Module, targets: Mapping[str, Target], batches: Sequence[Batch]) -> None:
        self._model, self._targets, self._batches = model, targets, batches
        self._batch = 0  # the one under way, for modules whose output is cached
        self._undo = contextlib.ExitStack()
        names = {target.weight: name for name, target in targets.items()}
        blocks, between = _blocks_of(model, names)
        self._parts = {block: _parts_of(block, names) for block in blocks}
        reads = OutputReads({**self._parts, **{module: [] for module in between}})
        passes = self._note_all(reads)
        modules = itertools.chain(self._parts, *self._parts.values())
        self._cacheable = {module: _targets_in(module, names) for module in modules if reads.is_cacheable(module)}
        self._readers = reads.readers
        self._cache: dict[nn.Module, dict[int, Any]] = {}  # Of finished blocks and parts, by batch.
        self._released: set[nn.Module] = set()  # Blocks whose output only finished ones read: placeholders.
        self.order = _stages_of(passes, targets)
        self._unfinished = {name for stage in self.order for name in stage.names}
        self._all_final = True  # Whether the pass under way has used no target that may still change.
        for module in filter(reads.is_cacheable, between):
            self._cache_output(module)
        self.unused = [name for name in targets if name not in self._unfinished]

    def __enter__(self) -> "Stages":
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()

    def run(self, stage: Stage, on_product: Callable[[Product, Batch], None]) -> None:
        """Runs all batches up to a stage of `order`, with the weights as they are now.

        The callback gets each product of the stage's first target, and its batch; the others have the same inputs.
        """
        for index, batch in enumerate(self._batches):
            seen = 0

            def see(product: Product, batch: Batch = batch) -> None:
                nonlocal seen
                self._all_final &= product.target.name not in self._unfinished
                if product.target.name == stage.names[0]:
                    on_product(product, batch)
                    seen += 1
                    if seen == stage.uses:
                        raise _StopForward
                elif product.target.name in stage.later:
                    raise _StopForward

            self._pass(index, ProductWatch(self._targets, see))

    def finish(self, stage: Stage) -> None:
        """Says that the weights of a stage change no more."""
        self._unfinished -= set(stage.names)
        complete = {block for block, given in self._cache.items() if len(given) == len(self._batches)}
        for block, parts in self._parts.items():
            if block in complete:  # Its parts are called no more.
                self._cache.update({part: {} for part in parts})
            for module in (block, *parts):
                is_final = module in self._cacheable and not self._cacheable[module] & self._unfinished
                if is_final and self._cache.keys().isdisjoint((block, module)):
                    self._cache_output(module)
        for block in complete & self._readers.keys() - self._released:
            if self._readers[block] <= complete:
                self._released.add(block)
                self._cache[block] = pytree.tree_map_only(torch.Tensor, _placeholder, self._cache[block])

    def _cache_output(self, module: nn.Module) -> None:
        """Has a module return a cached output, computed once for each batch when all before it is final."""
        self._cache[module] = {}
        compute, replaced = module.forward, module.__dict__.get("forward")

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = self._cache[module]
            if self._batch not in given:
                output = compute(*args, **kwargs)
                if not self._all_final:
                    return output
                given[self._batch] = output
            output = given[self._batch]
            # A copy: what reads it may change it in place.
            return output if module in self._released else pytree.tree_map_only(torch.Tensor, torch.clone, output)

        module.forward = forward
        self._undo.callback(_put_back, module, replaced)

    def _note_all(self, reads: OutputReads) -> list[list[_Use]]:
        """The uses of passes, of all processes: of one pass of each kind, or of all if their kinds cannot be known."""
        begun = [self._values_read_at_first(i) for i in range(len(self._batches))]
        first: dict[object, int] = {}
        for i, batch in enumerate(self._batches):
            first.setdefault((_shapes_of(batch), *begun[i]), i)
        noted: dict[int, list[_Use]] = {}
        for wanted in (first.values(), range(len(self._batches))):
            read_later = False
            for index in sorted(set(wanted) - noted.keys()):
                with reads, ValueReads() as values:
                    noted[index] = self._note(index, reads)
                read_later |= len(values.read) > len(begun[index])
            gathered = gather_from_processes((list(noted.values()), read_later))
            if not any(later for _, later in gathered):
                break
        return [uses for passes, _ in gathered for uses in passes]

    def _values_read_at_first(self, index: int) -> list[object]:
        """The values that the pass of a batch reads before its first product."""

        def stop(product: Product) -> None:
            raise _StopForward

        with ValueReads() as values:
            self._pass(index, ProductWatch(self._targets, stop))
        return values.read

    def _note(self, index: int, reads: OutputReads) -> list[_Use]:
        uses: list[_Use] = []
        last: tuple[torch.Tensor, object] | None = None  # With the tensor, so that nothing else gets its memory.

        def note(product: Product) -> None:
            nonlocal last
            x = product.source
            identity = (x.data_ptr(), x.shape, x.stride(), x._version)
            number = uses[-1].input if uses else 0
            is_same = last is not None and last[1] == identity
            uses.append(_Use(product.target.name, number if is_same else number + 1))
            last = (x, identity)

        reads.begin_pass()
        self._pass(index, ProductWatch(self._targets, note))
        return uses

    def _pass(self, index: int, watch: ProductWatch) -> None:
        self._batch, self._all_final = index, True
        # Autocast caches cast weights and would miss changes; the random state is kept so that passes are alike.
        torch.clear_autocast_cache()
        device = next(self._model.parameters()).device
        with keep_random_state(device), torch.no_grad(), contextlib.suppress(_StopForward), watch:
            call(self._model, self._batches[index])


def _shapes_of(batch: Batch) -> str:
    """Alike for batches that differ only in what their tensors hold."""
    return repr(pytree.tree_map_only(torch.Tensor, lambda tensor: (tensor.dtype, tensor.shape), dict(batch)))


class _StopForward(BaseException):
    """Ends a pass that has shown what it was begun for; not an error, so that no model takes it for one of its own."""


def _stages_of(passes: Sequence[Sequence[_Use]], targets: Mapping[str, Target]) -> list[Stage]:
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


def _merged(passes: Sequence[Sequence[_Use]]) -> list[str]:
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
    passes: Sequence[Sequence[_Use]],
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


def _later(passes: Sequence[Sequence[_Use]]) -> dict[str, frozenset[str]]:
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


def _targets_in(module: nn.Module, names: Mapping[torch.Tensor, str]) -> frozenset[str]:
    return frozenset(names[parameter] for parameter in module.parameters() if parameter in names)


def _blocks_of(model: nn.Module, names: Mapping[torch.Tensor, str]) -> tuple[list[nn.Module], list[nn.Module]]:
    """The innermost elements of module lists that hold targets, and those beside them that hold none."""

    def lists_in(module: nn.Module) -> list[nn.Module]:
        return [m for m in module.modules() if isinstance(m, nn.ModuleList) and _targets_in(m, names)]

    elements = dict.fromkeys(element for modules in lists_in(model) for element in modules.children())
    blocks = [element for element in elements if _targets_in(element, names) and not lists_in(element)]
    return blocks, [element for element in elements if not _targets_in(element, names)]


def _parts_of(block: nn.Module, names: Mapping[torch.Tensor, str]) -> list[nn.Module]:
    """The modules in a block that hold some of its targets, but not all; the outermost of those that hold the same.

    What is itself a target is none: its output is larger, or soon made again.
    """
    parts = {_targets_in(block, names): block}
    for module in block.modules():
        if (held := _targets_in(module, names)) and not any(p in names for p in module.parameters(recurse=False)):
            parts.setdefault(held, module)
    return [module for module in parts.values() if module is not block]


def _placeholder(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape that takes no memory."""
    return tensor.new_zeros(()).expand(tensor.shape)


def _put_back(module: nn.Module, replaced: Any) -> None:
    """Gives a module its own forward again, or what had replaced it before."""
    del module.forward
    if replaced is not None:
        module.forward = replaced
