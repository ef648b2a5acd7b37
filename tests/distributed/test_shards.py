"""Shards: of weights that FSDP2 has divided goes what goes of whole ones, to the last bit."""

import signal
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers.pytorch_utils import Conv1D

from hf_prune import MaskSet, PruningConfig, ScoreInputs, prune
from hf_prune.criteria import CRITERIA, RECONSTRUCTIONS, Criterion, needs, needs_of
from hf_prune.distributed.shards import from_own, own, require_by_rows, rows_held, shard, whole
from hf_prune.scopes import SCOPES
from hf_prune.weights.targets import find_targets
from tests.processes import on_processes, on_two_processes
from tests.tiny import FAMILIES, build


class PairExperts(nn.Module):
    """Fused experts, three of them: of four processes the last one has none."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 8, 4))


class Uneven(nn.Module):
    """Layers whose rows no number of processes divides, of each kind that is pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 7)
        self.few = nn.Linear(8, 2)  # Of four processes two have nothing of it.
        self.transposed = Conv1D(8, 10)
        self.conv = nn.Conv2d(8, 6, 3, groups=2)
        self.experts = PairExperts()


def uneven() -> nn.Module:
    torch.manual_seed(0)
    return Uneven()


@needs(elementwise=True)
def steps(inputs: ScoreInputs) -> torch.Tensor:
    """Magnitude in steps so wide that hundreds of weights are as good as each other."""
    return (inputs.weight.abs() * 8).round()


def by_row(inputs: ScoreInputs) -> torch.Tensor:
    """What only a whole tensor says: a weight beside the largest of its column."""
    return inputs.weight.abs() / inputs.weight.abs().amax(0, keepdim=True).clamp_min(1e-9)


CRITERIA_WITHOUT_DATA: dict[str, Criterion] = {
    **{name: criterion for name, criterion in CRITERIA.items() if not needs_of(criterion)},
    "steps": steps,
    "by_row": by_row,
}
SCOPES_WITHOUT_DATA = [scope for scope in SCOPES if scope != "owl"]  # Those that look at data: test_passes.py.
GRANULARITIES = ["unstructured", "2:4", "block:1x4", "block:2x1"]


Found = tuple[str, int, int, float]


def twice(model: nn.Module, criterion: Criterion, granularity: str, scope: str = "auto") -> Found:
    """Two cuts of a model, the second on top of the first: the digest of its masks, and what the report counts."""
    rows, columns = {"block:1x4": (1, 4), "block:2x1": (2, 1), "2:4": (1, 4)}.get(granularity, (1, 1))
    targets = find_targets(model, ".*")
    fitting = [t.module for t in targets.values() if t.out_features % rows == 0 and t.in_features % columns == 0]
    assert fitting
    first = {"granularity": "3:4"} if granularity == "2:4" else {"granularity": granularity, "sparsity": 0.3}
    last = {"granularity": "2:4"} if granularity == "2:4" else {"granularity": granularity, "sparsity": 0.6}
    options = {"scope": scope, "target_modules": fitting}
    prune(model, PruningConfig(**first, **options), criterion=criterion)
    report = prune(model, PruningConfig(**last, **options, hold_zeros=True), criterion=criterion)
    names = [name for name, target in targets.items() if target.module in fitting]
    return MaskSet.from_zeros(model, names).digest(), report.zeros, report.masked, report.model_sparsity


def of_all_cells(make: Callable[[nn.Module], nn.Module], size: int) -> dict[str, Found]:
    """Every granularity of weights and scope: by magnitude; on two processes by every criterion, in every family."""
    found = {}
    criteria = CRITERIA_WITHOUT_DATA if size == 2 else {"magnitude": CRITERIA["magnitude"], "steps": steps}
    for name, criterion in criteria.items():
        for granularity in GRANULARITIES:
            for scope in SCOPES_WITHOUT_DATA if granularity != "2:4" else ["auto"]:
                found[f"{name}, {granularity}, {scope}"] = twice(make(uneven()), criterion, granularity, scope)
    for family in FAMILIES if size == 2 else ():
        for granularity in GRANULARITIES:
            found[f"{family}, {granularity}"] = twice(make(build(family)), steps, granularity)
    return found


def sharded(model: nn.Module) -> nn.Module:
    """The model as FSDP2 leaves it."""
    fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return model


def of_sharded(rank: int) -> dict[str, Found]:
    few = sharded(uneven()).few.weight
    assert len(own(few)) == {1: [2], 2: [1, 1], 4: [1, 1, 0, 0]}[torch.distributed.get_world_size()][rank]
    return of_all_cells(sharded, torch.distributed.get_world_size())


@pytest.mark.multiprocess
@pytest.mark.parametrize("size", [1, 2, 4])
def test_of_shards_goes_what_goes_of_whole_weights(size, tmp_path):
    expected = of_all_cells(lambda model: model, size)
    for found in on_processes(size, of_sharded, tmp_path):
        assert found.keys() == expected.keys()
        for cell, values in expected.items():
            assert found[cell] == values, cell


def errors_of_one_shard(rank: int) -> list[str]:
    """What all processes say if something is wrong with rows that one of them has."""
    messages = []

    def note(model: nn.Module, criterion: Criterion | None = None, **options) -> None:
        with pytest.raises(ValueError, match="NaN") as caught:
            prune(model, PruningConfig(sparsity=0.5, target_modules=["linear"], **options), criterion=criterion)
        messages.append(str(caught.value))

    broken = uneven()
    with torch.no_grad():
        broken.linear.weight[6, 3] = torch.nan
    note(sharded(broken))

    @needs(elementwise=True)
    def odd(inputs: ScoreInputs) -> torch.Tensor:
        return inputs.weight.abs() if rank == 0 else inputs.weight * torch.nan

    for scope in ("global", "row"):
        note(sharded(uneven()), odd, scope=scope)

    def odd_as_a_whole(inputs: ScoreInputs) -> torch.Tensor:
        return torch.where(inputs.weight == inputs.weight.max(), torch.nan, inputs.weight)

    note(sharded(uneven()), odd_as_a_whole)

    def raising(inputs: ScoreInputs) -> torch.Tensor:
        if rank == 1:
            raise ValueError("NaN, says one process")
        return inputs.weight.abs()

    signal.alarm(100)  # Instead of waiting for ever.
    for scope in ("global", "layer", "row"):
        note(sharded(uneven()), raising, scope=scope)
    return messages


@pytest.mark.multiprocess
def test_what_is_wrong_on_one_process_is_an_error_on_all(tmp_path):
    first, second = on_two_processes(errors_of_one_shard, tmp_path)
    assert first == second
    weights, *scores = first[:-3]
    assert first[-3:] == ["NaN, says one process"] * 3
    assert "1 of the 36 weights of 'linear.weight' are NaN" in weights
    assert ["scores of 'linear.weight' are NaN" in message for message in scores] == [True] * 3


def refusals(rank: int) -> dict[str, str]:
    """What is said to configs that need whole weights, and to weights that are not divided by rows."""
    found = {}
    configs = {
        **{name: {"criterion": name} for name in RECONSTRUCTIONS},
        "neuron": {"granularity": "neuron"},
    }
    for name, options in configs.items():
        model = sharded(build("llama"))
        before = [own(parameter).clone() for parameter in model.parameters()]
        with pytest.raises(ValueError, match="needs whole weights") as caught:
            prune(model, PruningConfig(sparsity=0.5, **options), [])
        found[name] = str(caught.value)
        assert all(torch.equal(own(p), b) for p, b in zip(model.parameters(), before, strict=True))
    mesh = init_device_mesh("cpu", (2,))
    for placement in (Replicate(), Shard(1)):
        with pytest.raises(ValueError, match="divided as") as caught:
            require_by_rows("odd", distribute_tensor(torch.ones(4, 4), mesh, [placement]))
        found[str(placement)] = str(caught.value)
    mixed = uneven()
    fully_shard(mixed.linear, mesh=mesh)
    with pytest.raises(ValueError, match="is whole on each") as caught:
        prune(mixed, PruningConfig(sparsity=0.5, target_modules=".*"))
    found["mixed"] = str(caught.value)
    return found


@pytest.mark.multiprocess
def test_what_needs_whole_weights_is_an_error(tmp_path):
    first, second = on_two_processes(refusals, tmp_path)
    assert first == second
    assert "'few.weight' is whole on each process, and other weights are sharded" in first.pop("mixed")
    for placement in (Replicate(), Shard(1)):
        assert "needs parameters that are whole, or that FSDP2 has divided by rows" in first.pop(str(placement))
    assert all("needs whole weights, and FSDP has sharded them" in message for message in first.values()), first


def there_and_back(rank: int) -> None:
    mesh = init_device_mesh("cpu", (3,))
    values = torch.arange(14.0).view(7, 2)
    tensor = distribute_tensor(values, mesh, [Shard(0)])
    assert rows_held(tensor) == [slice(0, 3), slice(3, 6), slice(6, 7)][rank]
    assert torch.equal(own(tensor), values[rows_held(tensor)])
    assert torch.equal(whole(shard(values, tensor)), values)
    narrow = torch.arange(4.0).view(2, 2)
    rows = own(shard(narrow, tensor))
    assert len(rows) == [1, 1, 0][rank]
    assert torch.equal(whole(from_own(rows, tensor, narrow.shape)), narrow)


@pytest.mark.multiprocess
def test_rows_are_found_again(tmp_path):
    on_processes(3, there_and_back, tmp_path)


def test_whole_tensors_are_their_own_shards():
    values = torch.arange(4.0)
    assert all(function(values) is values for function in (own, whole))
    assert shard(values, values) is from_own(values, values) is values
    assert rows_held(values) == slice(0, 4)
    require_by_rows("values", values)
