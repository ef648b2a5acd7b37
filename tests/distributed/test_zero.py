"""What DeepSpeed keeps in partitions, on partitions made by hand; with DeepSpeed itself in test_processes.py."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_prune import MaskSet, PruningConfig, PruningTrainerCallback
from hf_prune.distributed.zero import (
    forget_,
    has_partitions,
    is_partitioned,
    mask_parts_,
    mask_state_,
    master_of,
    require_maskable,
)
from hf_prune.training.optimizers import cut_state_
from tests.structures.models import build as build_of_structures
from tests.tiny import build
from tests.trainers import trainer_factory

MASK = torch.tensor([[True, False, True], [False, True, False]])


def partitioned(start: int, values: torch.Tensor) -> nn.Parameter:
    """A parameter of 2 x 3, of whose elements this process keeps some, in order, from one on."""
    parameter = nn.Parameter(torch.ones(2, 3))
    state = {"exp_avg": values.clone(), "exp_avg_sq": values.clone()}
    parameter._hp_mapping = SimpleNamespace(
        lp_fragment_address=SimpleNamespace(start=start, numel=len(values)), hp_fragment=values.clone(),
        optim_fragment=state,
    )  # fmt: skip
    return parameter


def test_masters_and_moments_are_masked_where_they_lie():
    parameter = partitioned(1, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    kept = torch.tensor([0.0, 2.0, 0.0, 4.0])
    mask_parts_(parameter, MASK)
    assert torch.equal(parameter._hp_mapping.hp_fragment, kept)
    assert torch.equal(parameter._hp_mapping.optim_fragment["exp_avg"], torch.tensor([1.0, 2.0, 3.0, 4.0]))
    cut_state_(torch.optim.AdamW([parameter]), "mask", {parameter: MASK})
    assert all(torch.equal(value, kept) for value in parameter._hp_mapping.optim_fragment.values())


def test_masters_are_masked_whenever_weights_are():
    model = nn.Module()
    model.weight = partitioned(1, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    MaskSet({"weight": MASK}).apply_(model)
    assert torch.equal(model.weight, MASK.float())
    assert torch.equal(model.weight._hp_mapping.hp_fragment, torch.tensor([0.0, 2.0, 0.0, 4.0]))


def test_moments_that_are_not_finite_are_forgotten():
    parameter = partitioned(0, torch.tensor([1.0, torch.nan]))
    mask_state_(parameter, MASK)
    assert not any(value.any() for value in parameter._hp_mapping.optim_fragment.values())


def test_moments_of_weights_without_a_mask_are_forgotten_only_if_they_are_not_finite():
    diverged, fine = partitioned(0, torch.tensor([1.0, torch.nan])), partitioned(0, torch.ones(2))
    cut_state_(torch.optim.AdamW([diverged, fine]), "mask", {diverged: None, fine: None})
    assert not any(value.any() for value in diverged._hp_mapping.optim_fragment.values())
    assert all(value.all() for value in fine._hp_mapping.optim_fragment.values())


def test_a_process_that_keeps_nothing_and_an_optimizer_that_has_not_stepped():
    elsewhere = partitioned(0, torch.ones(2))
    elsewhere._hp_mapping = None
    fresh = partitioned(0, torch.ones(2))
    fresh._hp_mapping.optim_fragment = None
    for parameter in (elsewhere, fresh):
        mask_state_(parameter, MASK)
        mask_parts_(parameter, MASK)
    assert torch.equal(fresh._hp_mapping.hp_fragment, torch.tensor([1.0, 0.0]))


def test_a_reset_leaves_the_tensors_that_deepspeed_holds():
    moment, step = torch.ones(3), torch.tensor(5.0)
    state = {"exp_avg": moment, "step": step, "count": 7}
    forget_([state])
    assert state["exp_avg"] is moment
    assert (float(moment.sum()), float(step), state["count"]) == (0, 0, 0)


def divided(rank: int, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Parameter, list[torch.Tensor]]:
    """A parameter of 2 x 3 at stage 3, of which each of four processes has two elements, the last one none.

    Returns:
        The parameter; this process's part of it, of its master, and of the optimizer's state.
    """
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: rank)
    parameter = nn.Parameter(torch.empty(0))
    parameter.ds_shape, parameter.ds_process_group = (2, 3), None
    parameter.ds_tensor = torch.full((2,), 5.0)
    flat = torch.full((6,), 7.0)  # in which others lie too
    states = {flat: {"exp_avg": torch.full((6,), 8.0), "step": torch.tensor(1.0)}}
    parameter._z3_optimizer = SimpleNamespace(
        grad_position={0: [0, 3, 2]}, get_param_id=lambda parameter: 0, fp32_partitioned_groups_flat=[flat],
        optimizer=SimpleNamespace(state=states), swap_optimizer=False,
    )  # fmt: skip
    return parameter, [parameter.ds_tensor, flat, states[flat]["exp_avg"]]


@pytest.mark.parametrize(("rank", "kept"), [(0, [1, 0]), (1, [1, 0]), (2, [1, 0]), (3, [1, 1])])
def test_parts_of_divided_parameters_are_masked(rank, kept, monkeypatch):
    parameter, (part, flat, moment) = divided(rank, monkeypatch)
    factor = torch.tensor(kept)
    model = nn.Module()
    model.weight = parameter
    MaskSet({"weight": MASK}).apply_(model)
    assert torch.equal(part, 5.0 * factor)
    assert torch.equal(flat, torch.cat([torch.full((3,), 7.0), 7.0 * factor, torch.full((1,), 7.0)]))
    assert torch.equal(moment, torch.full((6,), 8.0))
    mask_state_(parameter, MASK)
    assert torch.equal(moment, torch.cat([torch.full((3,), 8.0), 8.0 * factor, torch.full((1,), 8.0)]))


def test_a_mask_of_another_shape_than_a_divided_parameter_is_an_error(monkeypatch):
    model = nn.Module()
    model.weight, (part, *_) = divided(0, monkeypatch)
    with pytest.raises(ValueError, match=r"has shape \(3, 2\), the parameter \(2, 3\)"):
        MaskSet({"weight": MASK.reshape(3, 2)}).apply_(model)
    assert part.all()


def on_disk(parameter: nn.Parameter) -> None:
    parameter.ds_tensor.final_location = "nvme"


def swapped(parameter: nn.Parameter) -> None:
    parameter._z3_optimizer.swap_optimizer = True


def copied(parameter: nn.Parameter) -> None:
    parameter.ds_secondary_tensor = parameter.ds_tensor


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (on_disk, "Set the device of offload_optimizer and offload_param to cpu or none"),
        (swapped, "Set the device of offload_optimizer and offload_param to cpu or none"),
        (copied, "each part of 'weight' is on several processes. Leave zero_hpz_partition_size"),
    ],
)
def test_parts_that_are_elsewhere_are_refused(change, message, monkeypatch):
    model = nn.Module()
    model.weight, _ = divided(0, monkeypatch)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 4)
    require_maskable(model)
    change(model.weight)
    with pytest.raises(ValueError, match=message):
        require_maskable(model)


def test_a_master_of_another_parameter_is_refused():
    model = nn.Module()
    model.weight = partitioned(1, torch.ones(3))
    require_maskable(model)
    model.weight._hp_mapping.hp_fragment[2] = 2
    with pytest.raises(ValueError, match=r"gives for 'weight' is that of another parameter.* round_robin_gradients"):
        require_maskable(model)


def test_ordinary_parameters_have_none():
    model = nn.Linear(3, 2)
    assert not has_partitions(model)
    assert not is_partitioned(model.weight)
    assert torch.equal(master_of(model.weight), model.weight)
    before = model.weight.detach().clone()
    mask_parts_(model.weight, MASK)
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (build, {"criterion": "movement", "begin": 2}, "gradients of each step, which DeepSpeed shows to nobody"),
        (build_of_structures, {"granularity": "neuron", "multiple_of": 4}, "Set shrink_at_end=False"),
    ],
)
def test_what_does_not_go_with_deepspeed_is_an_error_before_anything_is_trained(make, options, message, tmp_path):
    model = make("llama")
    for parameter in model.parameters():
        parameter._hp_mapping = None
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = trainer_factory(tmp_path)(model, PruningTrainerCallback(PruningConfig(sparsity=0.5, **options)))
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
