"""What a plan says, and the sparsities on a cut's way."""

import pytest
import torch
from torch import nn

from hf_prune import MaskSet, PruningConfig, PruningTrainerCallback, prune
from hf_prune.criteria import needs
from hf_prune.plan import Plan, resolve
from hf_prune.structures.groups import NO_STRUCTURES, Member, StructureGroup


def levels(config, sparsity, masks=None, structures=NO_STRUCTURES):
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
    if structures:
        plan = Plan(**vars(resolve(config)), targets={}, structures=structures, own_sparsities={})
    else:
        plan = Plan.of(model, config)
    return plan.steps(MaskSet(masks or {}), sparsity)


def test_a_cut_in_one_step():
    assert levels(PruningConfig(sparsity=0.875), 0.875) == [0.875]


def test_each_step_leaves_the_same_share_of_what_is_left():
    assert levels(PruningConfig(sparsity=0.875, score_steps=3), 0.875) == pytest.approx([0.5, 0.75, 0.875])


def test_it_begins_where_the_masks_are():
    masks = {"0.weight": torch.arange(32).view(4, 8) >= 24, "1.weight": torch.ones(4, 4, dtype=torch.bool)}
    config = {"sparsity": 0.875, "score_steps": 2}
    # 24 of 48 are gone already, and of the first tensor 24 of 32: by itself it can only go on from there.
    assert levels(PruningConfig(**config), 0.875, masks) == pytest.approx([0.75, 0.875])
    expected = [1 - (0.25 * 0.125) ** 0.5, 0.875]
    assert levels(PruningConfig(**config, scope="layer"), 0.875, masks) == pytest.approx(expected)
    # With a sparsity of its own of 0.9375 it is four fifths of its way, and the rest has to be as far: 0.7.
    own = PruningConfig(**config, layer_sparsity={"0": 0.9375})
    assert levels(own, 0.875, masks) == pytest.approx([1 - (0.3 * 0.125) ** 0.5, 0.875])


def test_patterns_come_once_each():
    assert levels(PruningConfig(granularity="1:4", score_steps=8), 0.75) == [0.25, 0.5, 0.75]


def test_of_structures_it_begins_where_the_one_is_that_has_lost_most():
    weight = nn.Parameter(torch.ones(4, 2))
    structures = {
        name: StructureGroup(name, "neuron", 4, (Member(f"{name}.weight", weight, (0,), torch.arange(4)),))
        for name in ("a", "b")
    }
    masks = {"a.weight": torch.tensor([[False], [False], [True], [True]]).expand(4, 2)}
    config = {"sparsity": 0.75, "score_steps": 2, "granularity": "neuron", "criterion": "taylor"}
    first = 1 - (0.75 * 0.25) ** 0.5  # 2 of 8 are gone.
    assert levels(PruningConfig(**config), 0.75, masks, structures) == pytest.approx([first, 0.75])
    first = 1 - (0.5 * 0.25) ** 0.5  # 2 of 4 in the first place.
    assert levels(PruningConfig(**config, scope="layer"), 0.75, masks, structures) == pytest.approx([first, 0.75])


def test_a_criterion_that_declares_a_scope_that_there_is_not():
    @needs(scope="everywhere")
    def mine(inputs):
        return inputs.weight.abs()

    message = r"mine declares the scope 'everywhere'; it must be one of auto, global, layer, row, erk, owl\.$"
    with pytest.raises(ValueError, match=message):
        PruningTrainerCallback(PruningConfig(sparsity=0.5), criterion=mine)
    with pytest.raises(ValueError, match=message):
        prune(nn.Linear(8, 8), PruningConfig(sparsity=0.5), criterion=mine)
    assert prune(nn.Linear(8, 8), PruningConfig(sparsity=0.5, scope="layer"), criterion=mine).sparsity == 0.5


def test_only_what_can_be_chosen_while_it_is_reconstructed_has_quotas():
    model = nn.Sequential(nn.Linear(8, 8))
    plan = Plan.of(model, PruningConfig(sparsity=0.5, granularity="block:2x2"))
    with pytest.raises(NotImplementedError, match="no method that reconstructs chooses by granularity block:2x2"):
        plan.quotas(MaskSet(), 0.5, {})


def test_a_plan_is_made_before_anything_is_cut():
    """Each thing that can be wrong is said by the plan; the weights are as they were."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6))
    before = [parameter.clone() for parameter in model.parameters()]
    for config, message in [
        (PruningConfig(sparsity=0.5, target_modules="no.*"), "matches no prunable module"),
        (PruningConfig(sparsity=0.5, granularity="block:4x4"), "block:4x4 needs out_features divisible by 4"),
        (PruningConfig(sparsity=0.5, layer_sparsity={"mlp": 0.1}), "'mlp' matches none of the targeted modules"),
        (PruningConfig(sparsity=0.5, granularity="head"), "head"),
    ]:
        with pytest.raises(ValueError, match=message):
            Plan.of(model, config)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "scope", "needs"),
    [
        ({}, "global", ()),
        ({"criterion": "wanda"}, "row", ("input_norm",)),
        ({"criterion": "taylor", "scope": "owl"}, "owl", ("gradient", "input_norm")),
        ({"criterion": "sparsegpt"}, "global", ("squared_gradient",)),
        ({"criterion": "sparsegpt", "scope": "layer"}, "layer", ()),
        ({"criterion": "sparsegpt", "scope": "owl"}, "owl", ("input_norm",)),
        ({"criterion": "sparsegpt", "granularity": "2:4"}, "layer", ()),
        ({"criterion": "wanda", "granularity": "2:4"}, "row", ("input_norm",)),
        ({"criterion": "wanda", "granularity": "head"}, "global", ("input_norm",)),
        ({"granularity": "neuron", "uniform": True, "criterion": "magnitude"}, "layer", ()),
        ({"granularity": "head+neuron"}, "global", ("gate_fisher",)),
        ({"granularity": "head+width"}, "global", ("gate_fisher", "contribution")),
        ({"granularity": "layer"}, "global", ("block_influence",)),
        ({"granularity": "expert"}, "global", ("routed_output",)),
        ({"granularity": "neuron+layer+expert"}, "global", ("gate_fisher", "block_influence", "routed_output")),
        ({"granularity": "channel"}, "global", ()),
    ],
)
def test_what_a_config_leaves_open(options, scope, needs):
    settings = resolve(PruningConfig(sparsity=0.5, **options))
    assert (settings.scope.name, settings.needs) == (scope, needs)
    assert settings.reconstructs == (options.get("criterion") == "sparsegpt")


def test_own_sparsities_are_as_far_on_their_way_as_the_rest():
    config = PruningConfig(sparsity=0.8, schedule="constant", rounds=4, layer_sparsity={"0": 0.4, "[01]": 0.9})
    plan = Plan.of(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4), nn.Linear(4, 4)), config)
    assert plan.own_sparsities == {"0.weight": 0.4, "1.weight": 0.9}
    assert plan.cut(MaskSet(), 0.2).own_sparsities == pytest.approx({"0.weight": 0.1, "1.weight": 0.225})


def test_room_for_the_first_round():
    config = PruningConfig(sparsities=[0.25, 0.5], hold_zeros=True)
    model = nn.Linear(8, 8, bias=False)
    with torch.no_grad():
        model.weight[:4] = 0
    plan = Plan.of(model, config)
    with pytest.raises(ValueError, match=r"is zero already, more than the sparsity 0\.2500 asked for in this round"):
        plan.require_room(plan.held_zeros(model))
    plan.require_room(MaskSet())
