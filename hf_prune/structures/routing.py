"""Routing: hooks that keep a router from choosing experts that are pruned.

A pruned expert is all zeros, and so is its row of the router; but a logit of zero may well be among the highest. So an
expert whose row is zero is barred: its logit is −∞ before any softmax, sigmoid or top-k, in every forward pass, and so
is the correction that is added to its score. What is barred is read from the weights themselves. There is nothing to
keep in step with them: a model whose weights are loaded anew, copied or brought back bars what they prune.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..distributed.zero import is_divided, is_present

SAVED_UNBARRED = (
    "Pruned experts are zeros, and no router of this model chooses them as long as it is in memory. What is saved of "
    "it cannot say so: loaded anew, it computes something else until it is shrunk. Call shrink before it is saved."
)


@dataclass(frozen=True)
class Router:
    """What gives the logits by which experts are chosen.

    Attributes:
        module: The module with the `weight`, a row for each expert; rows behind them belong to none.
        block: The module that holds it and the experts.
        corrections: What is added to the scores of experts before they are chosen, by name from the block.
    """

    module: str
    block: str
    corrections: tuple[str, ...] = ()


def bar_(model: nn.Module, routers: Iterable[Router]) -> None:
    """Bars experts whose row of the router is zero, from now on; a second call changes nothing.

    Copies of the model bar them too. In what is saved there is nothing of it.

    Raises:
        ValueError: if scores are corrected in a block that does not see the router's weight, because DeepSpeed has
            divided it.
    """
    for router in routers:
        module, block = model.get_submodule(router.module), model.get_submodule(router.block)
        if router.corrections and is_divided(_own(module, "weight")):
            raise ValueError(
                f"DeepSpeed's stage 3 divides the weight of the router {router.module!r}, whose scores are corrected "
                "elsewhere, so that pruned experts cannot be barred. Train with stage 2, or with "
                "DistributedDataParallel."
            )
        if type(module).forward is nn.Linear.forward:
            if not _has(module._forward_hooks, _BarLogits):
                module.register_forward_hook(_BarLogits())
        elif not _has(module._forward_hooks, _Unshadow):
            module.register_forward_pre_hook(_ShadowWeight())
            module.register_forward_hook(_Unshadow(("weight",)), always_call=True)
        if router.corrections and not _has(block._forward_hooks, _Unshadow):
            source = router.module.removeprefix(router.block).removeprefix(".")
            block.register_forward_pre_hook(_ShadowCorrections(source, router.corrections))
            block.register_forward_hook(_Unshadow(router.corrections), always_call=True)


def bar_like_(model: nn.Module, other: nn.Module) -> None:
    """Bars in a model what another one bars that has the same modules."""
    for name, module in other.named_modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, _BEFORE):
                model.get_submodule(name).register_forward_pre_hook(hook)
        for key, hook in module._forward_hooks.items():
            if isinstance(hook, _AFTER):
                always = key in module._forward_hooks_always_called
                model.get_submodule(name).register_forward_hook(hook, always_call=always)


def bars_any(model: nn.Module) -> bool:
    """Whether a router of a model is kept from choosing an expert, which what is saved of it cannot say."""
    return any(
        bool(_barred(module).any())
        for module in model.modules()
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        if isinstance(hook, (_BarLogits, _ShadowWeight)) and is_present(_own(module, "weight"))
    )


def unbar_(model: nn.Module) -> None:
    """Takes the hooks away again."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, (*_BEFORE, *_AFTER))]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)


def _has(hooks: Mapping[int, Any], kind: type) -> bool:
    return any(isinstance(hook, kind) for hook in hooks.values())


@dataclass(frozen=True)
class _BarLogits:
    """After a Linear: the logits of barred experts are −∞."""

    def __call__(self, module: nn.Module, args: object, logits: torch.Tensor) -> torch.Tensor:
        return logits.masked_fill(_barred(module), -math.inf)


@dataclass(frozen=True)
class _ShadowWeight:
    """Before a module that multiplies its weight itself: it finds one in its place whose products are barred."""

    def __call__(self, module: nn.Module, args: object) -> None:
        vars(module)["weight"] = _Barring.of(_own(module, "weight"), _barred(module), False)


@dataclass(frozen=True)
class _ShadowCorrections:
    """Before a block: corrections of barred experts are −∞, since sigmoids of −∞ are zero like others."""

    source: str
    corrections: tuple[str, ...]

    def __call__(self, block: nn.Module, args: object) -> None:
        barred = _barred(block.get_submodule(self.source))
        for name in self.corrections:
            path, _, attribute = name.rpartition(".")
            module = block.get_submodule(path)
            value = _own(module, attribute)
            # A correction may have no entry for the rows that belong to no expert.
            vars(module)[attribute] = value.masked_fill(barred[: value.numel()].view(value.shape), -math.inf)


@dataclass(frozen=True)
class _Unshadow:
    """After a module, whether it failed or not: it has its own tensors again."""

    names: tuple[str, ...]

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        for name in self.names:
            path, _, attribute = name.rpartition(".")
            holder = module.get_submodule(path)
            if attribute in holder._parameters or attribute in holder._buffers:  # Replicas have it as an attribute.
                vars(holder).pop(attribute, None)


_BEFORE, _AFTER = (_ShadowWeight, _ShadowCorrections), (_BarLogits, _Unshadow)


def _own(module: nn.Module, name: str) -> torch.Tensor:
    """A parameter or buffer of a module, whatever shadows it; of a replica of `nn.DataParallel`, what it has."""
    found = {**module._parameters, **module._buffers}.get(name)
    return vars(module)[name] if found is None else found


def _barred(module: nn.Module) -> torch.Tensor:
    """`[rows]` bools: which rows of a router, with its bias, are zero; none, if all are, as before training."""
    zero = (_own(module, "weight").detach() == 0).all(1)
    bias = getattr(module, "bias", None)
    if torch.is_tensor(bias) and bias.shape == zero.shape:
        zero = zero & (bias.detach() == 0)
    return zero & ~zero.all()


class _Barring(torch.Tensor):
    """A router's weight whose products are −∞ for barred experts, whatever it was cast to before."""

    barred: torch.Tensor
    is_transposed: bool

    @classmethod
    def of(cls, weight: torch.Tensor, barred: torch.Tensor, is_transposed: bool) -> "_Barring":
        made = weight.as_subclass(cls)
        made.barred, made.is_transposed = barred, is_transposed
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            output = func(*args, **kwargs)
        first, second = args[0] if args else None, kwargs.get("weight", args[1] if len(args) > 1 else None)
        if isinstance(second, cls) and (func is F.linear if not second.is_transposed else func in _PRODUCTS):
            return output.masked_fill(second.barred, -math.inf)
        if isinstance(first, cls) and func in _CASTS | _TRANSPOSITIONS:
            return cls.of(output, first.barred, first.is_transposed ^ (func in _TRANSPOSITIONS))
        return output


_T = torch.Tensor
_PRODUCTS = {torch.mm, torch.matmul, _T.mm, _T.matmul, _T.__matmul__}
_CASTS = {_T.float, _T.double, _T.half, _T.bfloat16, _T.to, _T.type, _T.type_as, _T.contiguous}
_TRANSPOSITIONS = {_T.t, torch.t, _T.T.__get__, _T.mT.__get__, _T.transpose, torch.transpose}  # type: ignore[attr-defined]
