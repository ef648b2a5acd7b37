"""Tracing, against what changes when one row of a weight is changed."""

import pytest
import torch
from torch import nn

from hf_prune.structures.groups import NOBODY
from hf_prune.structures.tracing import NoDeadNeurons, inputs_of_projections, trace


class Gated(nn.Module):
    """Neurons behind a fused projection, whose halves are multiplied."""

    def __init__(self, interleaved: bool, activation: nn.Module) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 10), nn.Linear(5, 6)
        self.interleaved, self.activation = interleaved, activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = self.up(self.norm(x))
        gate, value = (wide[..., ::2], wide[..., 1::2]) if self.interleaved else wide.chunk(2, dim=-1)
        return x + self.down(self.activation(gate) * value)


class Attention(nn.Module):
    """Two heads, each with a sink, whose keys share a bias that changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.sinks = nn.Linear(6, 24), nn.Linear(8, 6), nn.Parameter(torch.randn(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (part.view(*x.shape[:2], 2, 4).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        logits = torch.cat([query @ key.mT, self.sinks.view(1, 2, 1, 1).expand(len(x), 2, x.shape[1], 1)], dim=-1)
        weights = logits.softmax(dim=-1)[..., :-1]
        return x + self.out((weights @ value).transpose(1, 2).flatten(2))


def traced(layer, x):
    layer, x = layer.double(), x.double()
    with torch.enable_grad(), NoDeadNeurons(), inputs_of_projections({"layer": layer}) as inputs:
        layer(x)
    return {owned.columns: owned for owned in trace(layer, inputs["layer"])}


def by_changing(layer, x, columns, name, axis):
    """`[inputs, length of the axis]`: which inputs of a projection change with which position of a parameter."""
    seen = []
    layer.get_submodule(columns).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    parameter = layer.get_parameter(name)
    changed = []
    with torch.no_grad():
        layer(x)
        for i in range(parameter.shape[axis]):
            kept = parameter.clone()
            parameter.select(axis, i).mul_(1.5)  # A constant would be lost behind a norm.
            layer(x)
            parameter.copy_(kept)
            changed.append((seen[-1] - seen[0]).abs().flatten(0, -2).amax(0) > 1e-12)
    return torch.stack(changed, dim=1)


@pytest.mark.parametrize("interleaved", [False, True])
def test_neurons(interleaved):
    torch.manual_seed(0)
    layer, x = Gated(interleaved, nn.SiLU()), torch.randn(2, 3, 6)
    owned = traced(layer, x)["down"]
    assert (owned.count, owned.width) == (5, 1)
    owners = owned.owners["up.weight", 0]
    assert owners.tolist() == ([0, 0, 1, 1, 2, 2, 3, 3, 4, 4] if interleaved else [0, 1, 2, 3, 4] * 2)
    changed = by_changing(layer, x.double(), "down", "up.weight", 0)
    assert torch.equal(changed, owners[None] == torch.arange(5)[:, None])


def test_heads():
    torch.manual_seed(0)
    layer, x = Attention(), torch.randn(2, 3, 6)
    owned = traced(layer, x)["out"]
    assert (owned.count, owned.width) == (2, 4)
    assert owned.owners["qkv.weight", 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1] * 3
    assert owned.owners["sinks", 0].tolist() == [0, 1]
    changed = by_changing(layer, x.double(), "out", "qkv.weight", 0).view(2, 4, -1).any(1)
    assert torch.equal(changed, owned.owners["qkv.weight", 0][None] == torch.arange(2)[:, None])
    # With a sink beside them the bias of keys does change something.
    assert (owned.owners["qkv.bias", 0] != NOBODY).all()


def test_what_a_norm_mixes_belongs_to_nobody():
    """The projection up reads what the norm has mixed: nothing is written for one of its inputs alone but the norm."""
    torch.manual_seed(0)
    owned = traced(Gated(False, nn.SiLU()), torch.randn(2, 3, 6))
    assert "up" not in owned


def test_neurons_that_no_token_excites_are_found():
    torch.manual_seed(0)
    layer = Gated(False, nn.ReLU())
    nn.init.constant_(layer.up.bias, -100.0)
    assert traced(layer, torch.randn(2, 3, 6))["down"].count == 5
