"""2:4 weights for the kernels of GPUs. What needs one is skipped where there is none."""

import copy

import pytest
import torch
from torch import nn
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from hf_prune import PruningConfig, prune, to_sparse_semi_structured
from tests.tiny import build


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(128, 256), nn.Linear(256, 128)
        self.norm, self.odd, self.head = nn.LayerNorm(128), nn.Linear(128, 7), nn.Linear(128, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.down(torch.relu(self.up(x)))))


def pruned_net(dtype: torch.dtype = torch.bfloat16) -> Net:
    net = Net()
    prune(net, PruningConfig(granularity="2:4", target_modules=["up", "down", "odd"]))
    return net.to(dtype)


@pytest.fixture
def kernels(monkeypatch):
    """What torch converts, without its kernels: packed and unpacked again, on a CPU that is taken for a GPU."""
    seen = []

    def convert(weight: torch.Tensor) -> torch.Tensor:
        assert weight.is_contiguous()
        if weight.shape[0] % 32 or weight.shape[1] % 64:
            raise RuntimeError(f"Error original_tensor.shape {weight.shape} is not supported!")
        seen.append(tuple(weight.shape))
        packed, meta = sparse_semi_structured_from_dense_cutlass(weight)
        assert packed.numel() == weight.numel() // 2
        return sparse_semi_structured_to_dense_cutlass(packed, meta)

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", convert)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return seen


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_that_are_2_4_are_converted(dtype, kernels):
    net = pruned_net(dtype)
    before = copy.deepcopy(net.state_dict())
    assert to_sparse_semi_structured(net) is net
    assert sorted(kernels) == [(128, 256), (256, 128)]  # `head` is dense, and `odd` has a shape that kernels refuse.
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert not net.up.weight.requires_grad
    assert net.head.weight.requires_grad


def test_a_weight_with_another_pattern_is_left_alone(kernels):
    net = pruned_net()
    with torch.no_grad():
        net.up.weight[-1, -4:] = 1
    to_sparse_semi_structured(net)
    assert kernels == [(128, 256)]


def test_if_none_has_the_shape_that_is_an_error(kernels):
    model = build("llama", torch.bfloat16)
    prune(model, PruningConfig(granularity="2:4"))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"none of the 2:4 weights can be converted: .*shape .* is not supported"):
        to_sparse_semi_structured(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_no_2_4_weight_is_an_error():
    zeros = nn.Linear(64, 64)
    nn.init.zeros_(zeros.weight)
    for model in (build("llama"), nn.Linear(6, 4), nn.Linear(8, 0), nn.Linear(0, 8), zeros):
        with pytest.raises(ValueError, match=r'no Linear of this model has a 2:4 weight .*granularity="2:4"'):
            to_sparse_semi_structured(model)


def test_no_such_device_is_an_error():
    net = pruned_net()
    with pytest.raises(ValueError, match=r"2:4 products need a CUDA device of .* 8\.0 or later; 'up' is on cpu"):
        to_sparse_semi_structured(net)


def test_another_dtype_is_an_error(kernels):
    with pytest.raises(ValueError, match=r"2:4 products need float16 or bfloat16; 'up' is torch\.float32"):
        to_sparse_semi_structured(pruned_net(torch.float32))
    assert kernels == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_computes_the_same():
    net = pruned_net(torch.float16).cuda()
    x = torch.randn(64, 128, dtype=torch.float16, device="cuda")
    with torch.no_grad():
        expected = net(x)
        assert torch.allclose(to_sparse_semi_structured(net)(x), expected, atol=1e-2, rtol=1e-2)
    for linear in (net.up, net.down):
        assert isinstance(linear.weight, torch.sparse.SparseSemiStructuredTensor)
