"""Dependencies: what a forward pass depends on, seen while it runs: outputs of blocks, and values of tensors."""

import itertools
from collections import Counter
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import Cache

# Reading these needs no data, so that a placeholder can answer.
METADATA = {
    getattr(torch.Tensor, name).__get__ for name in ("dtype", "shape", "device", "ndim", "requires_grad", "layout")
} | {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.is_floating_point, torch.Tensor._base.__get__}  # type: ignore[union-attr]


class OutputReads(TorchFunctionMode):
    """A context that notes how often each block is called, and each part of it, and where a block's output is read.

    Args:
        parts: Block → its parts.

    Attributes:
        readers: Block → the blocks that read what it gave; None among them is anything outside of blocks.
    """

    def __init__(self, parts: Mapping[nn.Module, Sequence[nn.Module]]) -> None:
        super().__init__()
        self._parts = parts
        self.readers: dict[nn.Module, set[nn.Module | None]] = {block: set() for block in parts}
        self._calls: list[Counter[nn.Module]] = []  # of each pass
        self._stateful: set[nn.Module] = set()
        # Tensor → the modules that gave it as an output, and those in which it was made.
        self._givers: MutableMapping[torch.Tensor, set[nn.Module]] = WeakTensorKeyDictionary()
        self._makers: MutableMapping[torch.Tensor, tuple[nn.Module, ...]] = WeakTensorKeyDictionary()
        self._under_way: list[nn.Module] = []
        self._within: nn.Module | None = None
        self._before: dict[nn.Module, Any] = {}
        self._hooks: list[RemovableHandle] = []

    def begin_pass(self) -> None:
        """Says that what follows belongs to another pass."""
        self._calls.append(Counter())
        self._under_way.clear()
        self._within = None

    def is_cacheable(self, module: nn.Module) -> bool:
        """Whether a block, or a part of one, does nothing but give an output, once a pass."""
        return module not in self._stateful and all(calls[module] == 1 for calls in self._calls)

    def __enter__(self) -> "OutputReads":
        for module in itertools.chain(self._parts, *self._parts.values()):
            begin = module.register_forward_pre_hook(self._begin, with_kwargs=True)
            self._hooks += [begin, module.register_forward_hook(self._end, with_kwargs=True)]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._under_way.append(module)
        if module in self._parts:
            self._within = module
        # Into these it may write what others read.
        if any(isinstance(value, (MutableMapping, list, Cache)) for value in (*args, *kwargs.values())):
            self._stateful.add(module)
        self._before[module] = _state_of(module, args, kwargs)

    def _end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._calls[-1][module] += 1
        self._under_way.pop()
        leaves = pytree.tree_leaves(output)
        is_plain = all(value is None or isinstance(value, (torch.Tensor, int, float, str)) for value in leaves)
        if not is_plain or self._before.pop(module) != _state_of(module, args, kwargs):
            self._stateful.add(module)
        for value in leaves:
            if torch.is_tensor(value):  # It may be what another module gave, and this one hands on.
                self._givers[value] = self._givers.get(value, set()) | {module}
        if module in self._parts:
            self._within = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Notes what is read, and calls the function."""
        given = [value for value in pytree.tree_leaves((args, kwargs)) if torch.is_tensor(value)]
        if func not in METADATA:
            for value in given:
                givers = self._givers.get(value, set())
                for block in givers & self._parts.keys():
                    self.readers[block].add(self._within)
                # Read outside of where it was made, without having been given as an output.
                self._stateful.update({*self._makers.get(value, ())} - givers - {*self._under_way})
        output = func(*args, **(kwargs or {}))
        if self._under_way and func not in METADATA:
            for value in pytree.tree_leaves(output):
                if torch.is_tensor(value) and all(value is not other for other in given):
                    self._makers.setdefault(value, tuple(self._under_way))
        return output


def _state_of(module: nn.Module, args: Any, kwargs: Any) -> object:
    """What a call of a module may change beside its output: attributes, what they hold, and tensors it was given."""
    given = [value for value in pytree.tree_leaves((args, kwargs)) if torch.is_tensor(value)]
    versions = [tensor._version for tensor in (*given, *module.buffers())]
    return versions, [pytree.tree_map(id, vars(m)) for m in module.modules()]


class ValueReads(TorchFunctionMode):
    """A context that notes what Python reads of tensors: passes that read the same do the same.

    Attributes:
        read: The values, or shapes that were made from values. What equals nothing stands for whole tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read: list[object] = []
        self._within = _ShapesAndScalars(self.read)

    def __enter__(self) -> "ValueReads":
        self._within.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._within.__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function, and notes whether it hands a whole tensor to Python."""
        if func in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__):
            self.read.append(object())
        return func(*args, **(kwargs or {}))


class _ShapesAndScalars(TorchDispatchMode):
    def __init__(self, read: list[object]) -> None:
        super().__init__()
        self._read = read

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            self._read += [value.shape if torch.is_tensor(value) else value for value in pytree.tree_leaves(output)]
        return output
