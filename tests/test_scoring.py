import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_prune import PruningConfig
from hf_prune.criteria import magnitude
from hf_prune.resolving import resolve_targets
from hf_prune.scoring import structure_scores, weight_scores
from hf_prune.structures.finding import find_places


@pytest.fixture
def block():
    """Targets, places and the only block of a GPT-2, whose layers have `[in, out]` weights."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=8, n_positions=8, n_embd=12, n_layer=1, n_head=3, n_inner=10)
    model = GPT2LMHeadModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    config = PruningConfig(sparsity=0.5, granularity="head+neuron", multiple_of=1)
    targets = resolve_targets(model, config)
    return targets, find_places(model, config, targets), model.transformer.h[0]


def slices_of(block, kind, number):
    """The weights of one structure, written down by hand."""
    if kind == "neuron":
        return torch.cat([block.mlp.c_fc.weight[:, number], block.mlp.c_proj.weight[number]])
    own = slice(4 * number, 4 * number + 4)
    projections = block.attn.c_attn.weight.split(12, dim=1)
    return torch.cat([*(each[:, own].flatten() for each in projections), block.attn.c_proj.weight[own].flatten()])


POOLED = {"sum": torch.sum, "norm": lambda values: values.square().mean().sqrt()}


@pytest.mark.parametrize("pooling", POOLED)
@pytest.mark.parametrize("kind", ["head", "neuron"])
def test_the_score_of_a_structure_is_that_of_its_weights_alone(block, kind, pooling):
    targets, places, layer = block
    (place,) = (place for place in places.values() if place.kind == kind)

    def scores_of(name):
        return weight_scores(targets[name], magnitude, None, 0) if name in targets else None

    expected = [POOLED[pooling](slices_of(layer, kind, number).double().abs()) for number in range(place.count)]
    torch.testing.assert_close(structure_scores(place, scores_of, pooling), torch.stack(expected))
    assert any(member.name.endswith("bias") for member in place.members)  # Which go with it, and do not count.
