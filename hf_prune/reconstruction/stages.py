"""Stages: a model's targets in the order in which forward passes use them, and passes that go no further than one.

What changes the weights of a layer by its inputs has to see those inputs as the changed layers before it make them, so
every layer needs passes of its own. Each is an ordinary forward call that stops once it has shown a layer's inputs.
The output of a block (an innermost element of a `ModuleList`, or what lies beside it) is cached once a pass has used
no target for it that may still change. While a block is under way, so are the outputs of its parts, such as its
attention.

Beside these passes, others can go through the dense model, to show by how much the residual stream has moved.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..calibration.activations import Product, ProductWatch
from ..calibration.batches import Batch
from ..calibration.contexts import keep_random_state
from ..calibration.passes import call
from ..distributed.processes import gather_from_processes
from ..weights.targets import Target, bias_of
from .dependencies import OutputReads, ValueReads
from .order import Stage, Use, stages_of
from .sums import SumWatch


class Stages:
    """A context that runs forward passes stage by stage over a few batches, with cached outputs of what is finished.

    The order of the stages is that of dense passes. Of batches of the same shapes one is looked at, unless values of
    tensors decide what a pass does, as they do for experts.

    Args:
        model: The model, unwrapped, in evaluation mode; called without gradients.
        targets: The weights.
        batches: What it is called with, on its device, on this process.
        with_dense: Whether `run_beside_dense` is called, and not `run`.

    Attributes:
        order: The stages, in the order of their first use, the same on all processes.
        unused: Targets of which no process has seen a product.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Mapping[str, Target],
        batches: Sequence[Batch],
        *,
        with_dense: bool = False,
    ) -> None:
        self._model, self._targets, self._batches = model, targets, batches
        self._with_dense = with_dense
        self._is_dense = False  # Whether the pass under way is one of the dense model.
        self._dense: dict[torch.Tensor, torch.Tensor] = {}  # Parameters that have changed, as they were.
        self._batch = 0  # the one under way, for modules whose output is cached
        self._undo = contextlib.ExitStack()
        names = {target.weight: name for name, target in targets.items()}
        blocks, between = _blocks_of(model, names)
        self._parts = {block: _parts_of(block, names) for block in blocks}
        reads = OutputReads({**self._parts, **{module: [] for module in between}})
        noted = self._note_all(reads)
        passes = [uses for uses, _ in noted]
        self._readers = reads.readers
        self._cache: dict[nn.Module, dict[tuple[bool, int], Any]] = {}  # Of finished blocks and parts, by pass.
        self._released: set[nn.Module] = set()  # Blocks whose output only finished ones read: placeholders.
        self.order = stages_of(passes, targets)
        # Targets whose output is added to something, in every pass that uses them.
        self._summed = set(targets) - {use.name for uses, summed in noted for use in uses if use.name not in summed}
        self._unfinished = {name for stage in self.order for name in stage.names}
        self._under_way: frozenset[str] = frozenset()  # Targets of the stage that runs beside the dense model.
        self._all_final = True  # Whether the pass under way has used no target that may still change.
        for module in filter(reads.is_cacheable, itertools.chain(self._parts, *self._parts.values(), between)):
            self._cache_output(module, _targets_in(module, names))
        self.unused = [name for name in targets if name not in self._unfinished]

    def __enter__(self) -> "Stages":
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()

    def run(self, stage: Stage, on_product: Callable[[Product, Batch], object]) -> None:
        """Runs all batches up to a stage of `order`, with the weights as they are now.

        The callback gets each product of the stage's first target, and its batch; the others have the same inputs.
        """
        for index, batch in enumerate(self._batches):

            def see(product: Product, batch: Batch = batch) -> None:
                on_product(product, batch)

            self._show(index, stage, see)

    def run_beside_dense(
        self, stage: Stage, on_product: Callable[[Product, Batch], Callable[[torch.Tensor | None], None]]
    ) -> None:
        """Runs all batches up to a stage of `order`, with the weights as they are now and as they were.

        The callback gets each product as that of `run` does. What it gives is called with the dense model's residual
        stream minus the current one, right behind the addition of the output, in its shape; or with None, if it is
        added to nothing. Of the parameters only those of the stage, and biases beside them, may change before it is
        finished.
        """
        has_sum = self._has_sum(stage)
        self._under_way = frozenset(stage.names)
        for index, batch in enumerate(self._batches):
            shown: list[tuple[torch.Size, Callable[[torch.Tensor | None], None]]] = []

            def see(product: Product, batch: Batch = batch, shown: list[Any] = shown) -> None:
                shown.append((product.output.shape, on_product(product, batch)))

            now, dense = self._show(index, stage, see, to_sum=has_sum), None
            if has_sum:
                with self._dense_weights():
                    dense = self._show(index, stage, lambda _: None, to_sum=True)
            for shape, take in shown:
                take(None if now is None or dense is None else (dense - now).reshape(shape))
        for name in stage.names if self._will_pass_dense() else ():
            target = self._targets[name]
            for parameter in (target.weight, bias_of(self._model, target)):
                if parameter is not None:
                    self._dense.setdefault(parameter, parameter.detach().clone())

    def _has_sum(self, stage: Stage) -> bool:
        """Whether the output of a stage is added to something; what is used several times goes to several places."""
        return stage.uses == 1 and len(stage.names) == 1 and stage.names[0] in self._summed

    def _will_pass_dense(self) -> bool:
        """Whether the dense model is passed for stages that are not finished."""
        left = (stage for stage in self.order if not self._unfinished.isdisjoint(stage.names))
        return self._with_dense and any(map(self._has_sum, left))

    def _show(
        self, index: int, stage: Stage, on_product: Callable[[Product], None], *, to_sum: bool = False
    ) -> torch.Tensor | None:
        """Runs a batch up to a stage, or on to the sum that its output goes into, which is returned."""
        seen, sums = 0, SumWatch(_stop)

        def see(product: Product) -> None:
            nonlocal seen
            self._all_final &= product.target.name not in self._unfinished
            if product.target.name == stage.names[0]:
                on_product(product)
                seen += 1
                if to_sum:
                    sums.follow(product.target.name, product.output)
                elif seen == stage.uses:
                    _stop()
            elif product.target.name in stage.later and not sums.is_open:
                _stop()

        self._pass(index, ProductWatch(self._targets, see), sums)
        return sums.take().get(stage.names[0])

    @contextlib.contextmanager
    @torch.no_grad()
    def _dense_weights(self) -> Iterator[None]:
        """Passes are those of the dense model."""
        now = {parameter: parameter.detach().clone() for parameter in self._dense}
        try:
            self._is_dense = True
            for parameter, dense in self._dense.items():
                parameter.copy_(dense)
            yield
        finally:
            self._is_dense = False
            for parameter, values in now.items():
                parameter.copy_(values)

    def finish(self, stage: Stage) -> None:
        """Says that the weights of a stage change no more."""
        self._unfinished -= set(stage.names)
        streams = [False, True]
        if not self._will_pass_dense():
            streams = [False]
            self._dense.clear()
        keys = {(is_dense, index) for is_dense in streams for index in range(len(self._batches))}
        complete = {block for block, given in self._cache.items() if keys <= given.keys()}
        for block, parts in self._parts.items():
            if block in complete:  # Its parts are called no more.
                self._cache.update({part: {} for part in parts})
                for parameter in block.parameters():
                    self._dense.pop(parameter, None)
        for block in complete & self._readers.keys() - self._released:
            if self._readers[block] <= complete:
                self._released.add(block)
                self._cache[block] = pytree.tree_map_only(torch.Tensor, _placeholder, self._cache[block])

    def _cache_output(self, module: nn.Module, held: frozenset[str]) -> None:
        """Has a module return a cached output, which it gave when no target that may still change was used before.

        What it gives in a pass of the dense model never changes; it is cached with the last stage of its targets,
        whose products would not be seen again.
        """
        self._cache[module] = {}
        compute, replaced = module.forward, module.__dict__.get("forward")

        def forward(*args: Any, **kwargs: Any) -> Any:
            given, key = self._cache[module], (self._is_dense, self._batch)
            if key not in given:
                output = compute(*args, **kwargs)
                if held & self._unfinished <= self._under_way if self._is_dense else self._all_final:
                    given[key] = pytree.tree_map_only(torch.Tensor, torch.clone, output)
                return output
            output = given[key]
            # A copy: what reads it may change it in place.
            return output if module in self._released else pytree.tree_map_only(torch.Tensor, torch.clone, output)

        module.forward = forward
        self._undo.callback(_put_back, module, replaced)

    def _note_all(self, reads: OutputReads) -> list[tuple[list[Use], set[str]]]:
        """The uses of passes, of all processes: of one pass of each kind, or of all if their kinds cannot be known.

        Beside them stand the targets whose output is added to something.
        """
        begun = [self._values_read_at_first(i) for i in range(len(self._batches))]
        first: dict[object, int] = {}
        for i, batch in enumerate(self._batches):
            first.setdefault((_shapes_of(batch), *begun[i]), i)
        noted: dict[int, tuple[list[Use], set[str]]] = {}
        for wanted in (first.values(), range(len(self._batches))):
            read_later = False
            for index in sorted(set(wanted) - noted.keys()):
                with reads, ValueReads() as values:
                    noted[index] = self._note(index, reads)
                read_later |= len(values.read) > len(begun[index])
            gathered = gather_from_processes((list(noted.values()), read_later))
            if not any(later for _, later in gathered):
                break
        return [each for passes, _ in gathered for each in passes]

    def _values_read_at_first(self, index: int) -> list[object]:
        """The values that the pass of a batch reads before its first product."""
        with ValueReads() as values:
            self._pass(index, ProductWatch(self._targets, lambda _: _stop()))
        return values.read

    def _note(self, index: int, reads: OutputReads) -> tuple[list[Use], set[str]]:
        uses: list[Use] = []
        sums = SumWatch()
        last: tuple[torch.Tensor, object] | None = None  # With the tensor, so that nothing else gets its memory.

        def note(product: Product) -> None:
            nonlocal last
            x = product.source
            identity = (x.data_ptr(), x.shape, x.stride(), x._version)
            number = uses[-1].input if uses else 0
            is_same = last is not None and last[1] == identity
            uses.append(Use(product.target.name, number if is_same else number + 1))
            last = (x, identity)
            if self._with_dense:
                sums.follow(product.target.name, product.output)

        reads.begin_pass()
        self._pass(index, ProductWatch(self._targets, note), sums)
        return uses, set(sums.take())

    def _pass(self, index: int, *watches: TorchFunctionMode) -> None:
        self._batch, self._all_final = index, True
        # Autocast caches cast weights and would miss changes; the random state is kept so that passes are alike.
        torch.clear_autocast_cache()
        device = next(self._model.parameters()).device
        with contextlib.ExitStack() as stack:
            stack.enter_context(keep_random_state(device))
            stack.enter_context(torch.no_grad())
            stack.enter_context(contextlib.suppress(_StopForward))
            for watch in watches:
                stack.enter_context(watch)
            call(self._model, self._batches[index])


def _shapes_of(batch: Batch) -> str:
    """Alike for batches that differ only in what their tensors hold."""
    return repr(pytree.tree_map_only(torch.Tensor, lambda tensor: (tensor.dtype, tensor.shape), dict(batch)))


class _StopForward(BaseException):
    """Ends a pass that has shown what it was begun for; not an error, so that no model takes it for one of its own."""


def _stop() -> None:
    raise _StopForward


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
