"""Shards: tensors of which each process holds some rows, as FSDP2 leaves them, and what all rows are together."""

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard, distribute_tensor


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether other processes hold a part of a tensor."""
    return isinstance(tensor, DTensor)


def has_shards(model: nn.Module) -> bool:
    """Whether other processes hold parts of a model's parameters."""
    return any(is_sharded(parameter) for parameter in model.parameters())


def own(tensor: torch.Tensor) -> torch.Tensor:
    """The rows of a tensor that this process holds, not a copy; all of them, if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All rows of a tensor. If it is sharded, all processes call this, and each of them gets a copy."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Whole values, the same on all processes, divided by rows among them as another tensor is; nothing is sent."""
    if not isinstance(like, DTensor):
        return values
    values = values.contiguous()
    return distribute_tensor(values, like.device_mesh, like.placements, src_data_rank=None)


def from_own(rows: torch.Tensor, like: torch.Tensor, shape: torch.Size | None = None) -> torch.Tensor:
    """The tensor, sharded as `like` is, of which this process holds some rows; the rows, if `like` is not sharded.

    If None, the shape of all rows together is that of `like`.
    """
    if not isinstance(like, DTensor):
        return rows
    shape = like.shape if shape is None else shape
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        rows.contiguous(), like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride
    )


def rows_held(tensor: torch.Tensor) -> slice:
    """Which rows of a tensor this process holds."""
    if not isinstance(tensor, DTensor):
        return slice(0, len(tensor))
    start = min(-(-len(tensor) // tensor.device_mesh.size()) * tensor.device_mesh.get_local_rank(), len(tensor))
    return slice(start, start + len(own(tensor)))


def require_by_rows(name: str, tensor: torch.Tensor) -> None:
    """Requires that a tensor is whole, or divided by rows among all processes."""
    if not isinstance(tensor, DTensor):
        return
    size = torch.distributed.get_world_size()
    if tensor.placements != (Shard(0),) or tensor.device_mesh.size() != size:
        raise ValueError(
            f"{name!r} is divided as {tensor.placements} over {tuple(tensor.device_mesh.shape)} processes of {size}; "
            "pruning needs parameters that are whole, or that FSDP2 has divided by rows among all processes. Leave "
            "tensor parallelism and replicas of shards (HSDP) out."
        )


def reshard_(model: nn.Module) -> None:
    """Has the modules of FSDP2 give back the whole weights that they gathered for a pass without a backward one.

    Until then a module's parameters are copies, and what is done to the shards does not reach the next pass.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gathered_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that modules of FSDP2 compute with, by name; all processes call this.

    Their memory comes with a pass and goes again, but they stay the same objects. One module at a time is gathered.
    """
    found = {}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            found.update({name: p for name, p in model.named_parameters() if not is_sharded(p)})
            module.reshard()
    return found
