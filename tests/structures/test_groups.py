"""What belongs to structures, against plain loops."""

import itertools

import pytest
import torch
from torch import nn

from hf_prune.structures.groups import NOBODY, Member, StructureGroup, kept_in, masks_of
from hf_prune.structures.removal import _remove_parts_

EXPERTS, HIDDEN, INNER = 3, 2, 4


def fused():
    """Experts in two weights, `[experts, 2·inner, hidden]` and `[experts, hidden, inner]`, whose neurons go."""
    model = nn.Module()
    generator = torch.Generator().manual_seed(0)
    model.gate_up = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, HIDDEN, generator=generator))
    model.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER, generator=generator))
    owners = torch.arange(EXPERTS * INNER).view(EXPERTS, INNER)
    members = (
        Member("gate_up", model.gate_up, (0, 1), owners.repeat(1, 2)),
        Member("down", model.down, (0, 2), owners),
    )
    return model, StructureGroup("experts", "neuron", EXPERTS * INNER, members, runs=EXPERTS)


def test_scores_of_slices_along_two_axes_are_pooled():
    _, group = fused()
    for member in group.members:
        expected = torch.zeros(group.count, dtype=torch.float64)
        sizes = torch.zeros(group.count, dtype=torch.float64)
        for position in itertools.product(*map(range, member.parameter.shape)):
            owner = member.owners[tuple(position[axis] for axis in member.axes)]
            expected[owner] += member.parameter[position].double()
            sizes[owner] += 1
        assert torch.allclose(member.pool(member.parameter.detach(), group.count), expected)
        assert torch.equal(member.sizes(group.count), sizes)


def test_masks_of_slices_along_two_axes_and_back():
    _, group = fused()
    kept = torch.tensor([True, False, True, True] * EXPERTS)
    masks = masks_of({"experts": group}, {"experts": kept})
    assert masks["gate_up"][:, [0, 2, 3, 4, 6, 7]].all()
    assert not masks["gate_up"][:, [1, 5]].any()
    assert not masks["down"][:, :, 1].any()
    assert torch.equal(kept_in({"experts": group}, masks)["experts"], kept)


@pytest.mark.parametrize("whole", [False, True], ids=["neurons", "neurons and experts"])
def test_of_each_expert_other_neurons_are_taken_out(whole):
    model, group = fused()
    gate_up, down = model.gate_up.detach().clone(), model.down.detach().clone()
    stay = [[0, 2], [1, 3], [2, 3]]
    kept = torch.zeros(EXPERTS, INNER, dtype=torch.bool)
    for expert, neurons in enumerate(stay):
        kept[expert, neurons] = True
    structures, of_groups, experts = {"experts": group}, {"experts": kept.flatten()}, [0, 1, 2]
    if whole:
        members = (
            Member("gate_up", model.gate_up, (0,), torch.arange(EXPERTS)),
            Member("down", model.down, (0,), torch.arange(EXPERTS)),
        )
        structures["whole"] = StructureGroup("whole", "expert", EXPERTS, members)
        of_groups["whole"], experts = torch.tensor([True, False, True]), [0, 2]
    _remove_parts_(model, structures, of_groups)
    assert model.gate_up.shape == (len(experts), 4, HIDDEN)
    for new, old in enumerate(experts):
        rows = [*stay[old], *(INNER + i for i in stay[old])]
        assert torch.equal(model.gate_up[new], gate_up[old, rows])
        assert torch.equal(model.down[new], down[old][:, stay[old]])


def test_of_runs_with_unequal_zeros_as_many_count_as_gone():
    weight = nn.Parameter(torch.ones(6, 2))
    group = StructureGroup("q", "query", 6, (Member("q", weight, (0,), torch.arange(6)),), runs=2)
    mask = torch.ones(6, 2, dtype=torch.bool)
    mask[[0, 1, 5]] = False
    assert group.kept_of({"q": mask}).tolist() == [False, True, True, True, True, False]
    mask[[0, 1]] = True
    assert group.kept_of({"q": mask}).all()


def test_positions_of_nobody_stay():
    member = Member("a", nn.Parameter(torch.ones(3)), (0,), torch.tensor([NOBODY, 0, 1]))
    assert member.kept_positions(torch.tensor([False, False])).tolist() == [True, False, False]
