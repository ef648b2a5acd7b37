"""The four examples of CONTRIBUTING.md are added as a contributor would add them, and used."""

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import PhiConfig, PhiForCausalLM, default_data_collator

from hf_prune import Heads, Neurons, PruningConfig, Stack, describe_family, granularities, prune, shrink
from hf_prune.criteria import CRITERIA, ScoreInputs, needs
from hf_prune.schedules import SCHEDULES, ending_at, explicit
from hf_prune.selection.weight_groups import WeightGroups
from hf_prune.structures.families import FAMILIES
from hf_prune.weights.masks import masked_in
from hf_prune.weights.targets import Target, find_targets
from tests.tiny import batch, build

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"^## Add a (\w+)\n.*?^```python\n(.*?)```", TEXT, flags=re.MULTILINE | re.DOTALL))


@pytest.fixture
def add(monkeypatch):
    """Runs an example; the tables are afterwards as they were."""
    monkeypatch.setattr(granularities, "GRANULARITIES", granularities.GRANULARITIES)
    tables = [(table, dict(table)) for table in (SCHEDULES, CRITERIA, FAMILIES)]
    names = {
        "math": math, "torch": torch, "dataclass": dataclasses.dataclass, "needs": needs, "ScoreInputs": ScoreInputs,
        "SCHEDULES": SCHEDULES, "CRITERIA": CRITERIA, "granularities": granularities, "ending_at": ending_at,
        "WeightGroups": WeightGroups, "Target": Target, "Heads": Heads, "Neurons": Neurons, "Stack": Stack,
        "describe_family": describe_family,
    }  # fmt: skip
    yield lambda what: exec(compile(EXAMPLES[what], "CONTRIBUTING.md", "exec"), names)
    for table, before in tables:
        table.clear()
        table.update(before)


def test_there_is_an_example_for_each_extension_point():
    assert set(EXAMPLES) == {"schedule", "criterion", "granularity", "family"}


def test_a_schedule(add):
    add("schedule")
    values = PruningConfig(sparsity=0.9, schedule="square_root", rounds=4).round_sparsities
    assert values == explicit(values)
    assert len(values) == 4
    assert values[-1] == 0.9


def test_a_criterion(add):
    add("criterion")
    model = build("llama")
    config = PruningConfig(sparsity=0.5, criterion="distance_from_mean", calibration_samples=4)
    assert prune(model, config, [default_data_collator(batch(model, 4))]).sparsity == 0.5


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "resnet"])
@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
def test_a_granularity(add, family, scope):
    add("granularity")
    model = build(family)
    config = PruningConfig(sparsity=0.25, granularity="row", scope=scope)
    prune(model, config)
    rows = {n: (t.to_rows(t.weight) != 0).flatten(0, 1).float().mean(1) for n, t in find_targets(model).items()}
    assert all(set(each.tolist()) <= {0.0, 1.0} for each in rows.values())
    gone, total = sum(int((each == 0).sum()) for each in rows.values()), sum(len(each) for each in rows.values())
    assert abs(gone - 0.25 * total) <= (len(rows) / 2 if scope == "layer" else 0.5)


def test_a_granularity_goes_on_from_its_masks(add):
    add("granularity")
    model = build("llama")
    prune(model, PruningConfig(sparsity=0.25, granularity="row"))
    before = {name: target.weight == 0 for name, target in find_targets(model).items()}
    prune(model, PruningConfig(sparsity=0.5, granularity="row", hold_zeros=True))
    after = {name: target.weight == 0 for name, target in find_targets(model).items()}
    assert all(not (before[name] & ~after[name]).any() for name in before)
    assert sum(masked_in(~each) for each in after.values()) > sum(masked_in(~each) for each in before.values())


@pytest.mark.parametrize("granularity", ["head", "neuron", "head+neuron", "layer"])
def test_a_family(add, granularity):
    sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
    model = PhiForCausalLM(PhiConfig(**sizes)).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    config = PruningConfig(
        sparsity=0.5, granularity=granularity, **({"multiple_of": 4} if "neuron" in granularity else {})
    )
    with pytest.raises(ValueError, match="describe_family"):
        prune(model, config)
    add("family")
    prune(model, config)
    ids = torch.randint(32, (2, 7))
    expected, before = model(ids).logits, model.num_parameters()
    torch.testing.assert_close(shrink(model)(ids).logits, expected)
    assert model.num_parameters() < before
