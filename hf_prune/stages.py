"""Stages: a model's targets in the order in which forward passes use them, and passes that go no further than one.

What changes the weights of one layer by the inputs that it gets has to see the inputs that the changed layers before
it give. So every layer needs passes of its own. They are ordinary calls of the model that are left as soon as they
have shown what they were begun for; and blocks (the innermost elements of a `ModuleList`) in which nothing changes any
more are computed once again, and from then on give what they gave.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import Cache

from .contexts import keep_random_state
from .processes import gather_from_processes
from .products import Product, ProductWatch
from .samples import Batch
from .targets import Target

_Uses = list[tuple[str, int]]
"""The targets in the order in which a pass used them, each with a number that it shares with the use before if both
had the same input."""


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
    """The stages of a model on a few batches, as a context: within it blocks may give what they gave before.

    Args:
        model: The model, unwrapped, in evaluation mode; called as `model(**batch)` without gradients.
        targets: The weights.
        batches: What it is called with, on its device, on this process.

    Attributes:
        order: The stages, in the order of their first use, the same on all processes.
        unused: Targets of which no process has seen a product.
    """

    def __init__(self, model: nn.Module, targets: Mapping[str, Target], batches: Sequence[Batch]) -> None:
        self._model, self._targets, self._batches = model, targets, batches
        self._batch = 0  # the one under way
        self._undo = contextlib.ExitStack()
        reads = _Reads(_blocks_of(model, targets))
        passes: list[_Uses] = []
        with reads:
            for self._batch in range(len(batches)):
                passes.append(self._note(reads))
        self._blocks = {block: names for block, names in reads.blocks.items() if reads.can_be_kept(block)}
        self._readers = reads.readers
        self._given: dict[nn.Module, dict[int, Any]] = {}  # What finished blocks gave, by batch.
        self._unread: set[nn.Module] = set()  # Finished blocks whose output only finished ones read.
        self.order = _order_of([uses for each in gather_from_processes(passes) for uses in each], targets)
        self._open = {name for stage in self.order for name in stage.names}
        self.unused = [name for name in targets if name not in self._open]

    def __enter__(self) -> "Stages":
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()

    def show(self, stage: Stage, tell: Callable[[Product, Batch], None]) -> None:
        """Tells every product of a stage over all batches, with the weights as they are now.

        Args:
            stage: One of `order`.
            tell: Called with each product of the first target of the stage, and its batch; the others have the same
                inputs.
        """
        for index, batch in enumerate(self._batches):
            self._batch, seen = index, 0

            def see(product: Product, batch: Batch = batch) -> None:
                nonlocal seen
                if product.target.name == stage.names[0]:
                    tell(product, batch)
                    seen += 1
                    if seen == stage.uses:
                        raise _Enough
                elif product.target.name in stage.later:
                    raise _Enough

            self._pass(ProductWatch(self._targets, see))

    def finish(self, stage: Stage) -> None:
        """Says that the weights of a stage change no more."""
        self._open -= set(stage.names)
        for block, names in self._blocks.items():
            if block not in self._given and not names & self._open:
                self._keep(block)
        complete = {block for block, given in self._given.items() if len(given) == len(self._batches)}
        for block in complete - self._unread:
            if self._readers[block] <= complete:
                self._unread.add(block)
                self._given[block] = pytree.tree_map_only(torch.Tensor, _stand_in, self._given[block])

    def _keep(self, block: nn.Module) -> None:
        """Has a block give what it gives now, computed once for each batch."""
        self._given[block] = {}
        compute, replaced = block.forward, block.__dict__.get("forward")

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = self._given[block]
            if self._batch not in given:
                given[self._batch] = compute(*args, **kwargs)
            output = given[self._batch]
            # A copy: what reads it may change it in place.
            return output if block in self._unread else pytree.tree_map_only(torch.Tensor, torch.clone, output)

        block.forward = forward
        self._undo.callback(_put_back, block, replaced)

    def _note(self, reads: "_Reads") -> _Uses:
        uses: _Uses = []
        last: tuple[Any, ...] = ()

        def note(product: Product) -> None:
            nonlocal last
            x = product.source
            identity = (x.data_ptr(), x.shape, x.stride(), x._version)
            number = uses[-1][1] if uses else 0
            uses.append((product.target.name, number if identity == last[1:] else number + 1))
            last = (x, *identity)  # With the tensor, so that nothing else gets its memory.

        reads.begin_pass()
        self._pass(ProductWatch(self._targets, note))
        return uses

    def _pass(self, watch: ProductWatch) -> None:
        # In what autocast remembers, weights would stay as they were; and passes of a batch are to be alike.
        torch.clear_autocast_cache()
        device = next(self._model.parameters()).device
        with keep_random_state(device), torch.no_grad(), contextlib.suppress(_Enough), watch:
            self._model(**self._batches[self._batch])


class _Enough(Exception):
    """Leaves a pass that has shown what it was begun for."""


def _order_of(passes: Sequence[_Uses], targets: Mapping[str, Target]) -> list[Stage]:
    """The stages, from what all passes have used."""
    order: list[str] = []
    known: set[str] = set()
    for uses in passes:
        before = -1
        for name, _ in uses:
            if name not in known:  # What only some passes use comes after what they have used before it.
                order.insert(before + 1, name)
                known.add(name)
                before += 1
            else:
                before = order.index(name)
    counts = [Counter(name for name, _ in uses) for uses in passes]
    inputs = [dict(uses) for uses in passes]  # of the last use, which is the only one where it matters

    def are_alike(name: str, other: str) -> bool:
        return targets[name].weight.ndim == targets[other].weight.ndim == 2 and all(
            count[name] == count[other] and count[name] <= 1 and number.get(name) == number.get(other)
            for count, number in zip(counts, inputs, strict=True)
        )

    groups: list[list[str]] = []
    for name in order:
        if groups and are_alike(groups[-1][-1], name):
            groups[-1].append(name)
        else:
            groups.append([name])
    earlier: dict[str, set[str]] = {name: set() for name in order}
    later: dict[str, set[str]] = {name: set() for name in order}
    for uses in passes:
        names, begun = [name for name, _ in uses], set()
        last = {name: i for i, name in enumerate(names)}
        for i, name in enumerate(names):
            begun.add(name)
            if last[name] == i:
                earlier[name] |= begun
                later[name] |= last.keys() - begun
    stages = []
    for group in groups:
        often = {count[group[0]] for count in counts}
        known_uses = often.pop() if len(often) == 1 and targets[group[0]].weight.ndim != 3 else None
        behind = set.intersection(*(later[name] - earlier[name] for name in group))
        stages.append(Stage(tuple(group), known_uses, frozenset(behind)))
    return stages


def _blocks_of(model: nn.Module, targets: Mapping[str, Target]) -> dict[nn.Module, frozenset[str]]:
    """The innermost elements of module lists that hold targets → which."""
    blocks: dict[nn.Module, frozenset[str]] = {}
    inside = {id(target.weight): name for name, target in targets.items()}
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                names = frozenset(inside[id(p)] for p in block.parameters() if id(p) in inside)
                lists = [m for m in block.modules() if isinstance(m, nn.ModuleList)]
                if names and not any(id(p) in inside for m in lists for p in m.parameters()):
                    blocks[block] = names
    return blocks


# What these say of a tensor they say of its stand-in.
_METADATA = {
    getattr(torch.Tensor, name).__get__ for name in ("dtype", "shape", "device", "ndim", "requires_grad", "layout")
} | {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.is_floating_point}


class _Reads(TorchFunctionMode):
    """A context that notes how often each block is called, and where its output is read.

    Args:
        blocks: Block → the names of its targets.

    Attributes:
        blocks: As given.
        readers: Block → the blocks that read what it gave; None among them is anything outside of blocks.
    """

    def __init__(self, blocks: Mapping[nn.Module, frozenset[str]]) -> None:
        super().__init__()
        self.blocks = blocks
        self.readers: dict[nn.Module, set[nn.Module | None]] = {block: set() for block in blocks}
        self._calls: list[Counter[nn.Module]] = []  # of each pass
        self._talking: set[nn.Module] = set()
        self._makers: MutableMapping[torch.Tensor, set[nn.Module]] = WeakTensorKeyDictionary()
        self._within: nn.Module | None = None
        self._hooks: list[RemovableHandle] = []

    def begin_pass(self) -> None:
        """Says that what follows belongs to another pass."""
        self._calls.append(Counter())
        self._within = None

    def can_be_kept(self, block: nn.Module) -> bool:
        """Whether a block does nothing but give an output, once a pass."""
        return block not in self._talking and all(calls[block] == 1 for calls in self._calls)

    def __enter__(self) -> "_Reads":
        for block in self.blocks:
            begin = block.register_forward_pre_hook(self._begin, with_kwargs=True)
            self._hooks += [begin, block.register_forward_hook(self._end)]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def _begin(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        self._within = block
        # Into these it may write what other blocks read.
        if any(isinstance(value, (MutableMapping, Cache)) for value in (*args, *kwargs.values())):
            self._talking.add(block)

    def _end(self, block: nn.Module, args: Any, output: Any) -> None:
        self._within = None
        self._calls[-1][block] += 1
        for value in pytree.tree_leaves(output):
            if torch.is_tensor(value):  # It may be what another block gave, and this one hands on.
                self._makers[value] = self._makers.get(value, set()) | {block}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Notes what is read, and calls the function."""
        if func not in _METADATA:
            for value in pytree.tree_leaves((args, kwargs)):
                for maker in self._makers.get(value, ()) if torch.is_tensor(value) else ():
                    self.readers[maker].add(self._within)
        return func(*args, **(kwargs or {}))


def _stand_in(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape that takes no memory."""
    return tensor.new_zeros(()).expand(tensor.shape)


def _put_back(block: nn.Module, replaced: Any) -> None:
    """Gives a block its own forward again, or what had replaced it before."""
    del block.forward
    if replaced is not None:
        block.forward = replaced
