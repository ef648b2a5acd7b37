"""What a model takes before and after it is shrunk, as counting says."""

import copy

import pytest
import torch
from torch import nn

from hf_prune import PruningConfig, prune, shrink
from hf_prune.reporting.savings import shrink_measured
from tests.structures.models import build, inputs_of, logits_of


def masked(granularity: str = "head+neuron") -> nn.Module:
    model = build("gpt2")
    prune(model, PruningConfig(sparsity=0.5, granularity=granularity, multiple_of=1))
    return model


def test_a_measured_model_is_the_shrunk_one():
    model, expected = masked(), masked()
    before = expected.num_parameters()
    shrink(expected)
    batch = inputs_of(model)
    costs = shrink_measured(model, batches=lambda: [batch])
    assert torch.equal(logits_of(model), logits_of(expected))
    assert (costs["masked"].parameters, costs["shrunk"].parameters) == (before, expected.num_parameters())
    assert 0 < costs["shrunk"].flops < costs["masked"].flops
    assert costs["shrunk"].seconds > 0


def test_without_batches_parameters_are_counted():
    costs = shrink_measured(masked())
    assert costs["shrunk"].parameters < costs["masked"].parameters
    assert costs["masked"].flops is costs["shrunk"].seconds is None


def test_nothing_to_remove_leaves_the_model_as_it_was():
    model = build("gpt2")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="there is nothing to remove"):
        shrink_measured(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
