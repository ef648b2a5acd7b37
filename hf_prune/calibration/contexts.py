"""Contexts after which a model, its configs and the random states are as they were."""

import contextlib
import logging
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.logging import (
    disable_progress_bar,
    enable_progress_bar,
    get_verbosity,
    is_progress_bar_enabled,
    set_verbosity,
)


@contextlib.contextmanager
def keep_random_state(device: torch.device) -> Iterator[None]:
    """Gives back every random state as it was: that of the CPU, and of the device where the model is."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextlib.contextmanager
def unpartitioned() -> Iterator[None]:
    """Models that are built or loaded are whole, where DeepSpeed's stage 3 would divide them among processes."""
    integration: Any = sys.modules.get("transformers.integrations.deepspeed")
    held = getattr(integration, "_hf_deepspeed_config_weak_ref", None)
    if held is None:
        yield
        return
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = held


@contextlib.contextmanager
def undisturbed(model: nn.Module, weights: Iterable[torch.Tensor] = ()) -> Iterator[None]:
    """Evaluation mode, nothing compiled or cached, and gradients for some weights; afterwards all is as it was."""
    modes = {module: module.training for module in model.modules()}
    wants = {weight: weight.requires_grad for weight in weights}
    states = [_State(module) for module in model.modules() if next(module.buffers(recurse=False), None) is not None]
    model.eval()
    for weight in wants:
        weight.requires_grad_(True)
    torch.clear_autocast_cache()  # It may hold weights as they were before they were changed.
    try:
        device = next(model.parameters()).device
        # A cache would lack keys and values of blocks that are not computed again, and some models, such as RWKV,
        # write in place into what the backward pass reads.
        uncached = configured(model, "use_cache", False)
        with torch.inference_mode(False), keep_random_state(device), _uncompiled(), _unscaled(model), uncached:
            yield
    finally:
        for state in states:
            state.restore_()
        for module, mode in modes.items():
            module.training = mode
        for weight, wanted in wants.items():
            weight.requires_grad_(wanted)


@contextlib.contextmanager
def whole_on_error(model: nn.Module) -> Iterator[None]:
    """If what is done in it fails, the model has the modules, tensors and attributes that it had.

    For what replaces them. What is changed in place stays changed.
    """
    before, done = _attributes_of(model), False
    try:
        yield
        done = True
    finally:
        if not done:
            _put_back(before)


@contextlib.contextmanager
def rolled_back(model: nn.Module) -> Iterator[None]:
    """As `whole_on_error`, whether what is done in it fails or not."""
    before = _attributes_of(model)
    try:
        yield
    finally:
        _put_back(before)


def _attributes_of(model: nn.Module) -> dict[nn.Module, dict[str, Any]]:
    before = {module: dict(vars(module)) for module in model.modules()}
    for attributes in before.values():
        attributes.update({name: dict(attributes[name]) for name in ("_modules", "_parameters", "_buffers")})
    return before


def _put_back(before: Mapping[nn.Module, Mapping[str, Any]]) -> None:
    for module, attributes in before.items():
        vars(module).clear()
        vars(module).update(attributes)


class _State:
    """Buffers of a module, and the attributes that go with them, as the length up to which a rotary embedding is."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._attributes = {name: value for name, value in vars(module).items() if not name.startswith("_")}
        self._buffers = {name: (b, _version_of(b), b.clone()) for name, b in module.named_buffers(recurse=False)}

    def restore_(self) -> None:
        """Everything as it was."""
        vars(self._module).update(self._attributes)
        for name, (buffer, version, before) in self._buffers.items():
            self._module._buffers[name] = buffer
            if _version_of(buffer) != version:
                buffer.copy_(before)


def _version_of(tensor: torch.Tensor) -> int:
    """How often a tensor was changed in place. One of inference mode cannot be."""
    return 0 if tensor.is_inference() else tensor._version


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    """What is compiled runs as it is written, so that it can be watched."""
    if "torch._dynamo" not in sys.modules:  # Nothing is, and importing it takes seconds.
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


@contextlib.contextmanager
def _unscaled(model: nn.Module) -> Iterator[None]:
    """Keeps RWKV from rescaling its weights in place, as it does in evaluation mode."""
    scalable: list[Any] = [
        module for module in model.modules() if getattr(module, "layers_are_rescaled", None) is False
    ]
    try:
        with configured(model, "rescale_every", 0) if scalable else contextlib.nullcontext():
            yield
    finally:
        for module in scalable:
            module.layers_are_rescaled = False


@contextlib.contextmanager
def configured(model: nn.Module, name: str, value: object) -> Iterator[None]:
    """Another value for an entry of all configs of a model that have it; afterwards everything is as it was."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values()
    before = [(config, getattr(config, name)) for config in configs if hasattr(config, name)]
    for config, _ in before:
        setattr(config, name, value)
    try:
        yield
    finally:
        for config, was in before:
            setattr(config, name, was)


def eager_experts(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Experts that multiply slice by slice, as in the model's own code: what fused kernels do cannot be watched."""
    return configured(model, "_experts_implementation_internal", "eager")


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Transformers reports nothing of what it loads, and warns of nothing."""
    verbosity, shows = get_verbosity(), is_progress_bar_enabled()
    set_verbosity(logging.ERROR)
    disable_progress_bar()
    try:
        yield
    finally:
        set_verbosity(verbosity)
        if shows:
            enable_progress_bar()
