"""Comparing: what a model gives with pruned structures at zero, without them, and after it was loaded again."""

import contextlib
import itertools
import logging
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ..calibration.contexts import configured, eager_experts, keep_random_state, silent, undisturbed
from ..calibration.passes import call
from .example_inputs import example_batch
from .routing import bar_like_

logger = logging.getLogger(__name__)

Outputs = dict[str, torch.Tensor]

_LARGEST_DOUBLE = 2**28  # Parameters of the largest model that is called in float64: larger ones take too long.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}  # Of the norm.


class Reference:
    """The outputs of a model on one small batch, computed in float64, or in float32 where it is large.

    Args:
        model: The model.
        masks: Parameter → bool mask: what is False counts as zero.
        batch: What the model is called with where it cannot be called with one that is made from its config.
        channels: `[width]` bools, where channels of the residual stream go: of outputs as wide as it, those that stay
            are compared, and since norms are scaled, weights in half precision are rounded once more.

    Raises:
        ValueError: if it can be called with neither, or gives nothing that could be compared.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        masks: Mapping[str, torch.Tensor],
        batch: Mapping[str, Any] | None = None,
        channels: torch.Tensor | None = None,
    ) -> None:
        self._channels = channels
        is_small = sum(parameter.numel() for parameter in model.parameters()) <= _LARGEST_DOUBLE
        # Of a large model one module at a time is cast; some of them read the dtype of another.
        first = (torch.float64, False) if is_small else (torch.float32, True)
        why, ways = "no batch is known", (first, (torch.float32, False))
        for given, way in itertools.product(filter(None, (example_batch(model), batch)), ways):
            self._batch, (self._dtype, self._one_by_one) = given, way
            try:
                self._outputs = self._call(model, masks)
                return
            except Exception as error:  # Models ask for all kinds of inputs, and each tells it in its own way.
                why = f"{type(error).__name__}: {error}"
        raise ValueError(f"{type(model).__name__} cannot be called to compare its outputs ({why})")

    def require_same(self, model: PreTrainedModel, saved: PreTrainedModel | None) -> None:
        """Requires that another model has the same outputs, as it is and as it would be loaded.

        Args:
            model: The model.
            saved: What is saved and loaded: the model, or the one that it is a part of; None not to load it.

        Raises:
            Differs: if it has others; the message says which of both, and how.
        """
        if why := self._difference(model):
            raise Differs(why)
        if saved is None or len({parameter.device for parameter in saved.parameters()}) > 1:
            return  # What is loaded anew is on one device.
        try:
            loaded = _part_loaded_again(model, saved)
        except Exception as error:
            raise Differs(f"it could not be loaded from its config ({type(error).__name__}: {error})") from error
        if why := self._difference(loaded):
            raise Differs(f"what its config builds, and from_pretrained would load, is another model: {why}")

    def is_what_its_config_builds(
        self, model: PreTrainedModel, saved: PreTrainedModel, masks: Mapping[str, torch.Tensor]
    ) -> bool:
        """Whether a model is so before anything is removed; not if it has hooks or modules of its owner."""
        try:
            return self._difference(_part_loaded_again(model, saved), masks) is None
        except Exception:
            return False

    def _difference(self, model: PreTrainedModel, masks: Mapping[str, torch.Tensor] | None = None) -> str | None:
        """How the outputs of another model differ; None if they are equal up to rounding."""
        try:
            found = self._call(model, masks or {})
        except Exception as error:
            return f"it can no longer be called ({type(error).__name__}: {error})"
        for name, expected in self._outputs.items():
            got = found.get(name)
            is_of_stream = self._channels is not None and expected.shape[-1:] == self._channels.shape
            if self._channels is not None and is_of_stream and got is not None and got.shape != expected.shape:
                expected = expected[..., self._channels.to(expected.device)]
            if got is None or got.shape != expected.shape:
                return f"{name} has shape {None if got is None else list(got.shape)}, not {list(expected.shape)}"
            finite = expected.isfinite()
            gap = (got - expected)[finite].norm() / expected[finite].norm().clamp(min=torch.finfo(torch.float32).tiny)
            allowed = _TOLERANCE[self._dtype]
            if self._channels is not None:
                allowed = max(allowed, 4 * torch.finfo(model.dtype).eps)
            if not torch.equal(got.isfinite(), finite) or gap > allowed:
                return f"relative difference of {name}: {gap:.2g} (allowed: {allowed:.0e})"
        return None

    def _call(self, model: PreTrainedModel, masks: Mapping[str, torch.Tensor]) -> Outputs:
        # A loss for balance among experts depends on how many there are.
        unbalanced = configured(model, "output_router_logits", False)
        computing = _computing_in(model, self._dtype, masks, self._one_by_one)
        with computing_exactly(model, self._dtype), unbalanced, torch.no_grad(), computing:
            torch.manual_seed(0)  # Some models draw random numbers in evaluation too.
            output = call(model, {name: _cast(value, self._dtype) for name, value in self._batch.items()})
        named = dict(output) if isinstance(output, Mapping) else dict(enumerate(output))
        found = {str(name): value for name, value in named.items() if torch.is_tensor(value)}
        found |= {f"feature_maps[{i}]": each for i, each in enumerate(named.get("feature_maps", ()))}
        outputs = {name: value.double() for name, value in found.items() if value.is_floating_point()}
        if not any(value.isfinite().any() for value in outputs.values()):
            raise ValueError("it gives no finite outputs")
        return outputs


class Differs(Exception):
    """Outputs of a model differ from those expected."""


def why_not_generated(model: PreTrainedModel, **options: Any) -> str | None:
    """The error with which a model fails to generate two tokens; None if it does not."""
    batch = example_batch(model) or {}
    batch.pop("decoder_input_ids", None)
    try:
        with undisturbed(model), silent():
            model.generate(**batch, max_new_tokens=2, do_sample=False, **options)  # type: ignore[operator]
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _part_loaded_again(model: PreTrainedModel, saved: PreTrainedModel) -> PreTrainedModel:
    """A model, or a part of another one, after what holds it was loaded again."""
    path = next(name for name, module in saved.named_modules() if module is model)
    loaded = cast(PreTrainedModel, _load_again(saved).get_submodule(path))
    bar_like_(loaded, model)  # Experts that are zeros in both.
    return loaded


def _load_again(model: PreTrainedModel) -> PreTrainedModel:
    """What `from_pretrained` makes of a model's config, with the model's own weights.

    Heads that the model's owner has put there, which the class does not build, are those of the model.

    Raises:
        ValueError: if its config builds other modules than it has.
    """
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    with silent(), keep_random_state(torch.device("cpu")):
        with tempfile.TemporaryDirectory() as folder:
            model.config.save_pretrained(folder)
            saved_config = type(model.config).from_pretrained(folder)
        loaded: PreTrainedModel = type(model).from_pretrained(
            None, config=saved_config, state_dict=state, dtype=model.dtype, ignore_mismatched_sizes=True
        )
    built = dict(loaded.named_modules(remove_duplicate=False))
    listed = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    for path, module in model.named_modules(remove_duplicate=False):
        parent, _, name = path.rpartition(".")
        if (own := built.get(path)) is not None and isinstance(module, type(own)):
            own._parameters.update(module._parameters)  # They need no memory, and have lost no precision.
            own._buffers.update({n: b for n, b in module._buffers.items() if _is_rounded(own._buffers.get(n), b)})
        elif parent in built:
            if path.startswith(listed):
                raise ValueError(f"there is no {type(module).__name__} at {path!r}")
            setattr(built[parent], name, module)
            built |= {f"{path}.{inner}": each for inner, each in module.named_modules() if inner}
    nn.Module.to(loaded, next(model.parameters()).device)
    return loaded


def _is_rounded(built: torch.Tensor | None, buffer: torch.Tensor | None) -> bool:
    """Whether a buffer is what its class builds, but for the precision that `.to(dtype)` has left of it."""
    if built is None or buffer is None or built.shape != buffer.shape or not buffer.is_floating_point():
        return False
    eps = max(torch.finfo(dtype).eps for dtype in (buffer.dtype, torch.float32))  # Models compute many in float32.
    return torch.allclose(built.to(buffer), buffer, rtol=eps)


@contextlib.contextmanager
def _computing_in(
    model: nn.Module, dtype: torch.dtype, masks: Mapping[str, torch.Tensor], one_by_one: bool
) -> Iterator[None]:
    """Parameters and buffers in a dtype, with what masks prune at zero; afterwards the model has its own again.

    Copies are made of all modules, or `one_by_one` of each while it is called, which takes little memory.
    """
    masked = {id(model.get_parameter(name)): mask for name, mask in masks.items()}
    holders = [module for module in model.modules() if module._parameters or module._buffers]
    before = [(module, dict(module._parameters), dict(module._buffers)) for module in holders]
    own = {module: parameters for module, parameters, _ in before if parameters}

    def copied(parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or (parameter.dtype == dtype and id(parameter) not in masked):
            return parameter
        values = _cast(parameter.detach(), dtype)
        if (mask := masked.get(id(parameter))) is not None:
            values = values * mask.to(values.device)
        return nn.Parameter(values, requires_grad=False)

    def enter(module: nn.Module, *_: Any) -> None:
        module._parameters.update({name: copied(parameter) for name, parameter in own[module].items()})

    def leave(module: nn.Module, *_: Any) -> None:
        module._parameters.update(own[module])

    # Fused kernels of attention take half precision alone.
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    fused = any("flash" in str(config._attn_implementation) for config in configs)
    # Under mixed precision Accelerate replaces a model's own forward pass by one that computes in it.
    forward = vars(model).pop("forward", None) if hasattr(model, "_original_forward") else None
    with contextlib.ExitStack() as undo:
        for module, parameters, buffers in before:
            undo.callback(module._parameters.update, parameters)
            undo.callback(module._buffers.update, buffers)
            module._buffers.update({n: b if b is None else _cast(b, dtype) for n, b in buffers.items()})
        for module in own:
            if one_by_one:
                undo.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
                undo.callback(module.register_forward_hook(leave, always_call=True).remove)
            else:
                enter(module)
        if forward is not None:
            undo.callback(vars(model).update, forward=forward)
        if fused:
            undo.enter_context(configured(model, "_attn_implementation_internal", "sdpa"))
        yield


class _Double(TorchFunctionMode):
    """A context in which what asks for float32 gets float64: many models compute parts in it, whatever they are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        named = kwargs or {}
        if _FLOAT32 in map(id, args):  # `in` alone would compare tensors.
            args = tuple(torch.float64 if each is torch.float32 else each for each in args)
        if _FLOAT32 in map(id, named.values()):
            named = {name: torch.float64 if each is torch.float32 else each for name, each in named.items()}
        return func(*args, **named)


_FLOAT32 = id(torch.float32)


@contextlib.contextmanager
def computing_exactly(model: nn.Module, dtype: torch.dtype = torch.float64) -> Iterator[None]:
    """Evaluation of a model that nothing disturbs; in float64 no part of it computes in float32."""
    double = _Double() if dtype == torch.float64 else contextlib.nullcontext()
    with undisturbed(model), eager_experts(model), double:  # Fused kernels of experts know no float64.
        yield


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
