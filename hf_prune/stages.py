"""Stages: a model's targets in the order in which a forward pass uses them, and passes that go no further than one.

What changes the weights of one layer by the inputs that it gets has to see the inputs that the changed layers before
it give. So every layer needs passes of its own. They are ordinary calls of the model that are left as soon as they
have shown what they were begun for; and blocks (the elements of a `ModuleList`) in which nothing changes any more are
not computed again, but give what they gave.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from .calibration import Batch
from .products import Product, ProductWatch
from .targets import Target


@dataclass(frozen=True)
class Stage:
    """Targets that are multiplied with one and the same input.

    Attributes:
        names: Their parameters. Several only if each is used once in a pass.
        uses: How often the first of them is used in a pass; None if that depends on the data, as it does for experts.
        later: The targets whose first use comes after the last one of these.
    """

    names: tuple[str, ...]
    uses: int | None
    later: frozenset[str]


class Stages:
    """The stages of a model on a few batches, as a context: within it blocks may give what they gave before.

    Args:
        model: The model, unwrapped, in evaluation mode; called as `model(**batch)` without gradients.
        targets: The weights.
        batches: What it is called with, on its device. The first one shows the order.

    Attributes:
        order: The stages, in the order of their first use.
        unused: Targets that the first batch did not use.
    """

    def __init__(self, model: nn.Module, targets: Mapping[str, Target], batches: Sequence[Batch]) -> None:
        self._model, self._targets, self._batches = model, targets, batches
        self._batch = 0  # the one under way
        self._undo = contextlib.ExitStack()
        uses: list[_Use] = []

        def note(product: Product) -> None:
            x = product.source
            uses.append(_Use(product.target, x, (x.data_ptr(), x.shape, x.stride(), x._version)))

        reads = _Reads(_blocks_of(model, targets))
        with torch.no_grad(), reads, ProductWatch(targets, note):
            model(**batches[0])
        self._blocks = {block: names for block, names in reads.blocks.items() if reads.calls[block] == 1}
        self._readers = reads.readers
        self._given: dict[nn.Module, dict[int, Any]] = {}  # What finished blocks gave, by batch.
        self._unread: set[nn.Module] = set()  # Finished blocks whose output only finished ones read.
        self.order = _order_of(uses)
        self._open = {name for stage in self.order for name in stage.names}
        self.unused = [name for name in targets if name not in self._open]

    def __enter__(self) -> "Stages":
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()

    def show(self, stage: Stage, tell: Callable[[Product], None]) -> None:
        """Tells every product of a stage over all batches, with the weights as they are now.

        Args:
            stage: One of `order`.
            tell: Called with each product of the first target of the stage; the others have the same inputs.
        """
        seen = 0

        def see(product: Product) -> None:
            nonlocal seen
            if product.target.name == stage.names[0]:
                tell(product)
                seen += 1
                if stage.uses is not None and seen % stage.uses == 0:
                    raise _Enough
            elif product.target.name in stage.later:
                raise _Enough

        self._pass_all(ProductWatch(self._targets, see))

    def finish(self, stage: Stage) -> None:
        """Says that the weights of a stage change no more."""
        self._open -= set(stage.names)
        if not self._open:
            return
        for block, names in self._blocks.items():
            if block not in self._given and not names & self._open:
                self._give(block)

    def _give(self, block: nn.Module) -> None:
        """Has a block give what it gives now, from here on without computing it."""
        given: dict[int, Any] = {}

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            given[self._batch] = output
            raise _Enough

        hook = block.register_forward_hook(keep)
        self._pass_all(contextlib.nullcontext())
        hook.remove()
        self._given[block] = given
        for other in self._given:
            if other not in self._unread and self._readers[other] <= set(self._given):
                self._unread.add(other)
                self._given[other] = pytree.tree_map_only(torch.Tensor, _stand_in, self._given[other])
        compute, replaced = block.forward, block.__dict__.get("forward")

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._batch not in self._given[block]:
                return compute(*args, **kwargs)  # An expert that the first batch used, and this one does not.
            output = self._given[block][self._batch]
            # A copy: what reads it may change it in place.
            return output if block in self._unread else pytree.tree_map_only(torch.Tensor, torch.clone, output)

        block.forward = forward
        self._undo.callback(_put_back, block, replaced)

    def _pass_all(self, watch: contextlib.AbstractContextManager[Any]) -> None:
        for index, batch in enumerate(self._batches):
            self._batch = index
            with contextlib.suppress(_Enough), torch.no_grad(), watch:
                self._model(**batch)


class _Enough(Exception):
    """Leaves a pass that has shown what it was begun for."""


class _Use(NamedTuple):
    target: Target
    source: torch.Tensor  # Kept, so that nothing else gets its memory.
    identity: tuple[Any, ...]


def _order_of(uses: Sequence[_Use]) -> list[Stage]:
    """The stages, from the products of a pass."""
    count = Counter(use.target.name for use in uses)
    groups: list[list[_Use]] = []
    for use in uses:
        if any(use.target.name == other.target.name for group in groups for other in group):
            continue
        last = groups[-1][-1] if groups else None
        alike = last is not None and use.identity == last.identity
        if alike and all(_is_matrix(u.target) and count[u.target.name] == 1 for u in (use, *groups[-1])):
            groups[-1].append(use)
        else:
            groups.append([use])
    places = {name: [i for i, use in enumerate(uses) if use.target.name == name] for name in count}
    stages = []
    for group in groups:
        names = tuple(use.target.name for use in group)
        end = max(places[name][-1] for name in names)
        known = group[0].target.weight.ndim != 3
        later = frozenset(name for name, (first, *_) in places.items() if first > end)
        stages.append(Stage(names, count[names[0]] if known else None, later))
    return stages


def _is_matrix(target: Target) -> bool:
    return target.weight.ndim == 2


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


class _Reads(TorchFunctionMode):
    """A context that notes how often each block is called, and where its output is read.

    Args:
        blocks: Block → the names of its targets.

    Attributes:
        blocks: As given.
        calls: Block → number of calls.
        readers: Block → the blocks that read what it gave; None among them is anything outside of blocks.
    """

    def __init__(self, blocks: Mapping[nn.Module, frozenset[str]]) -> None:
        super().__init__()
        self.blocks = blocks
        self.calls: Counter[nn.Module] = Counter()
        self.readers: dict[nn.Module, set[nn.Module | None]] = {block: set() for block in blocks}
        self._makers: dict[int, set[nn.Module]] = {}  # Several where one hands on what another gave.
        self._alive: list[Any] = []  # So that no other tensor gets the same id.
        self._within: nn.Module | None = None
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> "_Reads":
        for block in self.blocks:
            self._hooks += [block.register_forward_pre_hook(self._begin), block.register_forward_hook(self._end)]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def _begin(self, block: nn.Module, args: Any) -> None:
        self._within = block

    def _end(self, block: nn.Module, args: Any, output: Any) -> None:
        self._within = None
        self.calls[block] += 1
        self._alive.append(output)
        for value in pytree.tree_leaves(output):
            if torch.is_tensor(value):
                self._makers.setdefault(id(value), set()).add(block)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Notes what is read, and calls the function."""
        for value in pytree.tree_leaves((args, kwargs)):
            for maker in self._makers.get(id(value), ()):
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
