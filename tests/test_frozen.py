"""A model that is frozen, in part or all of it, is pruned as one that is not, and stays frozen."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import default_data_collator

from hf_prune import PruningConfig, PruningTrainerCallback, prune, shrink
from tests.structures import test_channels
from tests.structures.models import build as build_of_structures
from tests.structures.test_training import samples
from tests.test_data_criteria import DATA
from tests.tiny import batch, build

FROZEN = {
    "embeddings": lambda name: "embed" in name or "stem" in name or ".wte" in name,
    "a part of the body": lambda name: ".0." in name,
    "all": lambda name: True,
}


def freeze(model: nn.Module, what: str) -> dict[str, bool]:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not FROZEN[what](name))
    found = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert False in found.values()
    return found


def trained(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def require_equal(model: nn.Module, other: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name
        assert parameter.grad is None


@pytest.mark.parametrize("criterion", [name for name in DATA if name != "movement"])
@pytest.mark.parametrize(
    ("family", "frozen"),
    [("gpt2", "a part of the body"), ("gpt2", "all"), ("resnet", "embeddings"), ("resnet", "all")],
)
def test_by_every_criterion_that_looks_at_data(family, criterion, frozen):
    model, config = build(family), PruningConfig(sparsity=0.5, criterion=criterion, scope="global")
    data = DataLoader(batch(model, 4), batch_size=4, collate_fn=default_data_collator)
    other = copy.deepcopy(model)
    wants = freeze(other, frozen)
    prune(model, config, data)
    prune(other, config, data)
    require_equal(other, model)
    assert trained(other) == wants


@pytest.mark.parametrize(
    ("name", "granularity", "frozen"),
    [
        *(("gpt_neo", granularity, "all") for granularity in ("2:4", "block:4x4", "head", "neuron", "layer")),
        ("gpt_neo", "head+neuron", "a part of the body"),
        *(("resnet", "channel", frozen) for frozen in FROZEN),
        ("efficientnet", "channel", "all"),
    ],
)
def test_by_every_granularity(name, granularity, frozen):
    build_it = test_channels.build if granularity == "channel" else build_of_structures
    model, data = build_it(name), None
    options = {} if granularity == "2:4" else {"sparsity": 0.5}
    config = PruningConfig(granularity=granularity, criterion="taylor", **options)
    other = copy.deepcopy(model)
    wants = freeze(other, frozen)
    data = DataLoader(samples(model, 4), batch_size=4, collate_fn=default_data_collator)
    prune(model, config, data)
    prune(other, config, data)
    require_equal(other, model)
    assert trained(other) == wants
    if granularity not in ("2:4", "block:4x4"):
        shrink(model)
        shrink(other)
        require_equal(other, model)
        after = trained(other)
        if granularity != "layer":  # Their names are other ones where a layer is gone.
            assert after == wants


@pytest.mark.parametrize(
    ("name", "granularity", "frozen"),
    [
        ("resnet", "channel", "embeddings"),
        ("bert", "head+neuron", "a part of the body"),
        ("bert", "unstructured", "embeddings"),
    ],
)
def test_in_training(name, granularity, frozen, make_trainer):
    """The first cut, before any step, is that of a model of which nothing is frozen; and what is frozen stays."""
    build_it = test_channels.build if granularity == "channel" else build_of_structures
    first, models = [], [build_it(name), build_it(name)]
    wants = freeze(models[1], frozen)
    before = {n: p.detach().clone() for n, p in models[1].named_parameters()}
    for model in models:
        stays = {} if granularity == "unstructured" else {"shrink_at_end": False}
        config = PruningConfig(
            sparsity=0.5,
            granularity=granularity,
            criterion="taylor",
            schedule="one_shot",
            calibration_samples=4,
            **stays,
        )
        pruning = PruningTrainerCallback(config)
        make_trainer(model, pruning, train_dataset=samples(model, 8), max_steps=1).train()
        first.append(pruning.masks.digest())
    assert first[0] == first[1]
    assert trained(models[1]) == wants
    for n, parameter in models[1].named_parameters():
        if not wants[n]:
            assert torch.equal(parameter, before[n].where(parameter != 0, 0)), n


def test_what_is_frozen_does_not_move(make_trainer):
    model = build("gpt2")
    config = PruningConfig(sparsity=0.5, criterion="movement", begin=2)
    freeze(model, "a part of the body")
    with pytest.raises(
        ValueError, match=r"cannot score frozen weights.*transformer\.h\.0\.attn\.c_attn.*Unfreeze them"
    ):
        make_trainer(model, PruningTrainerCallback(config)).train()
    config = PruningConfig(sparsity=0.5, criterion="movement", begin=2, exclude_modules=[r".*\.0\..*"])
    make_trainer(model, PruningTrainerCallback(config)).train()
