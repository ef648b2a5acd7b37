import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_prune import PruningConfig
from hf_prune.criteria import POOLINGS, needs
from hf_prune.plan import Plan
from hf_prune.selection.scoring import Scorer

POOLED = {"sum": torch.sum, "norm": lambda values: values.square().mean().sqrt()}


@pytest.fixture
def model():
    """A GPT-2 with one block, whose layers have `[in, out]` weights."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=8, n_embd=12, n_layer=1, n_head=3, n_inner=10))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def weights_of(model, kind, number):
    """The weights of one structure, written down by hand."""
    block = model.transformer.h[0]
    if kind == "neuron":
        return torch.cat([block.mlp.c_fc.weight[:, number], block.mlp.c_proj.weight[number]])
    own = slice(4 * number, 4 * number + 4)
    projections = block.attn.c_attn.weight.split(12, dim=1)
    return torch.cat([*(each[:, own].flatten() for each in projections), block.attn.c_proj.weight[own].flatten()])


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", ["head", "neuron"])
def test_the_score_of_a_structure_is_that_of_its_weights_alone(model, kind, pooling):
    @needs(pooling=pooling)
    def size(inputs):
        return inputs.weight.abs()

    config = PruningConfig(sparsity=0.5, granularity=kind)
    plan = Plan.of(model, config)
    (group,) = plan.structures.values()
    expected = [POOLED[pooling](weights_of(model, kind, number).double().abs()) for number in range(group.count)]
    torch.testing.assert_close(Scorer(size).of_structures(group, plan.targets), torch.stack(expected))
    assert any(member.name.endswith("bias") for member in group.members)  # These go with it, but are no targets.
