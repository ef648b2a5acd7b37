import pytest
import torch
from torch import nn

from hf_prune import MaskSet, PruningConfig
from hf_prune.plan import Plan, resolve
from hf_prune.structures.groups import NO_STRUCTURES, Member, StructureGroup


def levels(config, sparsity, masks=None, structures=NO_STRUCTURES):
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
    if structures:
        plan = Plan(**vars(resolve(config)), targets={}, structures=structures, own_sparsities={})
    else:
        plan = Plan.of(model, config)
    return plan.levels(MaskSet(masks or {}), sparsity)


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
        name: StructureGroup(name, "neuron", 4, (Member(f"{name}.weight", weight, 0, torch.arange(4)),))
        for name in ("a", "b")
    }
    masks = {"a.weight": torch.tensor([[False], [False], [True], [True]]).expand(4, 2)}
    config = {"sparsity": 0.75, "score_steps": 2, "granularity": "neuron"}
    first = 1 - (0.75 * 0.25) ** 0.5  # 2 of 8 are gone.
    assert levels(PruningConfig(**config), 0.75, masks, structures) == pytest.approx([first, 0.75])
    first = 1 - (0.5 * 0.25) ** 0.5  # 2 of 4 in the first place.
    assert levels(PruningConfig(**config, scope="layer"), 0.75, masks, structures) == pytest.approx([first, 0.75])
