"""ZeRO: what DeepSpeed divides among processes.

At the stages 1 and 2 parameters themselves are whole, and what is divided is the optimizer's state and a copy of each
parameter in float32, the master, from which each step makes the parameter anew. At stage 3 parameters are divided too,
and whole only while they are gathered. DeepSpeed is imported only where it is in use.
"""

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

_GATHERED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def is_partitioned(parameter: torch.Tensor) -> bool:
    """Whether DeepSpeed keeps something of a parameter in partitions."""
    return hasattr(parameter, "_hp_mapping") or is_divided(parameter)


def has_partitions(model: nn.Module) -> bool:
    """Whether DeepSpeed keeps something of a model's parameters in partitions."""
    return any(is_partitioned(parameter) for parameter in model.parameters())


@torch.no_grad()
def require_maskable(model: nn.Module) -> None:
    """Requires that what DeepSpeed divides is divided among all processes, in their memory, and where it says.

    It may not be swapped to a disk or held several times (hpZ, MiCS), and no part of a master may be said to be of
    another parameter.
    """
    for name, parameter in model.named_parameters():
        if (fragment := getattr(parameter, "_hp_mapping", None)) is not None:
            where, held = fragment.lp_fragment_address, fragment.hp_fragment
            part = parameter.flatten().narrow(0, where.start, where.numel)
            if not torch.equal(held.to(part), part):
                raise ValueError(
                    f"the float32 master that DeepSpeed gives for {name!r} is that of another parameter, so that it "
                    "cannot be masked. Leave round_robin_gradients out."
                )
        location = getattr(getattr(parameter, "ds_tensor", None), "final_location", None)
        if location == "nvme" or getattr(getattr(parameter, "_z3_optimizer", None), "swap_optimizer", False):
            raise ValueError(
                "DeepSpeed swaps weights or the optimizer's state to a disk, where they cannot be masked. Set the "
                "device of offload_optimizer and offload_param to cpu or none."
            )
        if is_divided(parameter) and (
            getattr(parameter, "ds_secondary_tensor", None) is not None
            or torch.distributed.get_world_size(_group_of(parameter)) != torch.distributed.get_world_size()
        ):
            raise ValueError(
                f"each part of {name!r} is on several processes. Leave zero_hpz_partition_size and mics_shard_size "
                "out."
            )


def shape_of(parameter: torch.Tensor) -> torch.Size:
    """The shape of a parameter, or the one that it has while it is gathered."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def is_present(parameter: torch.Tensor) -> bool:
    """Whether a parameter is not divided by stage 3, or gathered."""
    return parameter.shape == shape_of(parameter)


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """A context in which all parameters of a model are whole, also those that stage 3 divides.

    All processes enter it together. What is done to parameters in it lasts if it is done to their parts too, by
    `set_master_` or `mask_parts_`: nothing is sent when it ends. It may be entered again from within, and the model
    may be called: passes leave parameters as they are.
    """
    divided = [parameter for parameter in model.parameters() if is_divided(parameter)]
    if not divided or model in _GATHERED:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    optimizers = {getattr(parameter, "_z3_optimizer", None) for parameter in divided}
    offloads = [optimizer.parameter_offload for optimizer in optimizers if optimizer is not None]
    together = GatheredParameters(divided, modifier_rank=None)
    together.enable_sanity_checks = False  # Which take all changes for ones that will be lost.
    with together:
        for offload in offloads:  # Whose hooks would divide parameters after each module.
            for hook in (*offload.forward_hooks, *offload.backward_hooks):
                hook.remove()
            offload.forward_hooks, offload.backward_hooks = [], []
        _GATHERED.add(model)
        try:
            yield
        finally:
            _GATHERED.discard(model)
            for offload in offloads:
                offload._register_deepspeed_module(offload.module)


def gather_with_(module: nn.Module, parameter: torch.Tensor) -> None:
    """Has stage 3 gather a parameter of another module before a module's passes too, which reads it by itself."""
    if is_divided(parameter):
        from deepspeed.runtime.zero import register_external_parameter

        register_external_parameter(module, parameter)


@torch.no_grad()
def master_of(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter in the precision in which it is trained, whole; all processes call this, while it is gathered."""
    if not (hasattr(parameter, "_hp_mapping") or _is_trained_divided(parameter)):
        return parameter.detach()
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter)


@torch.no_grad()
def set_master_(parameter: torch.Tensor, values: torch.Tensor) -> None:
    """Gives a parameter, while it is gathered, other values, also in the precision in which it is trained."""
    parameter.copy_(values)
    for part, where in _parts(parameter):
        part.copy_(values.flatten()[where])


@torch.no_grad()
def mask_parts_(parameter: torch.Tensor, mask: torch.Tensor) -> None:
    """Zeroes pruned weights in what this process keeps of a parameter: of its master, and at stage 3 of itself."""
    for part, where in _parts(parameter):
        part.mul_(mask.flatten()[where].to(part.device))


@torch.no_grad()
def mask_state_(parameter: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Zeroes what the optimizer remembers of pruned weights on this process; all of it, where it is not finite."""
    for _, remembered, where in _held(parameter):
        are_finite = all(value.isfinite().all() for value in remembered)
        for value in remembered:
            if not are_finite:
                value.zero_()
            elif mask is not None:
                value.mul_(mask.flatten()[where].to(value.device))


@torch.no_grad()
def forget_(states: Iterable[dict[str, Any]]) -> None:
    """Has an optimizer forget everything, in place: DeepSpeed holds on to the tensors."""
    for state in states:
        for key, value in state.items():
            if torch.is_tensor(value):
                value.zero_()
            elif isinstance(value, int):
                state[key] = 0


def is_divided(parameter: torch.Tensor) -> bool:
    """Whether stage 3 divides a parameter among processes."""
    return hasattr(parameter, "ds_tensor")


def _is_trained_divided(parameter: torch.Tensor) -> bool:
    return hasattr(parameter, "_z3_optimizer") and parameter.requires_grad


def _group_of(parameter: torch.Tensor) -> Any:
    return parameter.ds_process_group  # type: ignore[attr-defined]


def _parts(parameter: torch.Tensor) -> Iterator[tuple[torch.Tensor, slice]]:
    """What this process keeps of a parameter's values: a part, flat, and of which elements it is.

    Of the master, and at stage 3 of the parameter itself.
    """
    if is_divided(parameter):
        part = parameter.ds_tensor  # type: ignore[attr-defined]
        where = _elements(parameter, _start_of(parameter), len(part))
        yield part[: where.stop - where.start], where
    for master, _, where in _held(parameter):
        yield master, where


def _held(parameter: torch.Tensor) -> Iterator[tuple[torch.Tensor, list[torch.Tensor], slice]]:
    """What this process keeps of a parameter for its training, if it keeps any.

    That is a part of the master, what the optimizer remembers of it, and of which elements they are.
    """
    optimizer: Any = getattr(parameter, "_z3_optimizer", None)
    fragment: Any = getattr(parameter, "_hp_mapping", None)
    if _is_trained_divided(parameter):
        group, start, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        flat = optimizer.fp32_partitioned_groups_flat[group]
        remembered = [v for v in optimizer.optimizer.state[flat].values() if torch.is_tensor(v) and v.ndim]
        held = [value[start : start + size] for value in (flat.data, *remembered)]
        where = _elements(parameter, _start_of(parameter), size)
    elif fragment is not None:
        held = [fragment.hp_fragment, *(fragment.optim_fragment or {}).values()]
        where = _elements(parameter, fragment.lp_fragment_address.start, len(held[0]))
    else:
        return
    master, *remembered = (value[: where.stop - where.start] for value in held)
    yield master, remembered, where


def _start_of(parameter: torch.Tensor) -> int:
    """Where the part of a divided parameter begins that this process has."""
    rank = torch.distributed.get_rank(_group_of(parameter))
    return int(rank * parameter.ds_tensor.numel())  # type: ignore[attr-defined]


def _elements(parameter: torch.Tensor, start: int, size: int) -> slice:
    """So many elements from one on, as far as a parameter has them: its last part may be longer than what is left."""
    count = shape_of(parameter).numel()
    return slice(min(start, count), min(start + size, count))
