"""The four examples of CONTRIBUTING.md are added as a contributor would add them, and used."""

import dataclasses
import math
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from transformers import PhiConfig, PhiForCausalLM, default_data_collator

from hf_prune import Heads, MaskSet, Neurons, PruningConfig, Stack, describe_family, granularities, prune, shrink
from hf_prune.criteria import CRITERIA, ScoreInputs, needs
from hf_prune.schedules import SCHEDULES, ending_at, explicit
from hf_prune.selection.weight_groups import WeightGroups
from hf_prune.structures.families import FAMILIES
from hf_prune.weights.targets import Target
from tests.tiny import batch, build

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"^## Add a (\w+)\n.*?^```python\n(.*?)```", TEXT, flags=re.MULTILINE | re.DOTALL))


@pytest.fixture
def add(monkeypatch):
    """Runs an example; the tables are afterwards as they were."""
    monkeypatch.setattr(granularities, "GRANULARITIES", granularities.GRANULARITIES)
    tables = [(table, dict(table)) for table in (SCHEDULES, CRITERIA, FAMILIES)]
    names = {
        "math": math, "torch": torch, "re": re, "Iterable": Iterable,
        "dataclass": dataclasses.dataclass, "needs": needs, "ScoreInputs": ScoreInputs,
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
@pytest.mark.parametrize("scope", ["global", "layer", "row", "erk"])
def test_a_granularity(add, family, scope):
    """Strips of N inputs are blocks of 1xN."""
    add("granularity")
    strips, blocks = build(family), build(family)
    config = PruningConfig(sparsity=0.5, granularity="strip:4", scope=scope)
    report = prune(strips, config)
    expected = prune(blocks, dataclasses.replace(config, granularity="block:1x4"))
    assert report.zeros == expected.zeros > 0
    assert all(torch.equal(a, b) for a, b in zip(strips.parameters(), blocks.parameters(), strict=True))


def test_a_granularity_goes_on_from_its_masks(add):
    add("granularity")
    model = build("llama")
    prune(model, PruningConfig(sparsity=0.25, granularity="strip:4"))
    before = MaskSet.from_zeros(model)
    prune(model, PruningConfig(sparsity=0.5, granularity="strip:4", hold_zeros=True))
    after = MaskSet.from_zeros(model)
    assert not any((after[name] & ~before[name]).any() for name in before)
    assert after.sparsity == 0.5


def test_a_granularity_says_what_does_not_fit(add):
    add("granularity")
    with pytest.raises(ValueError, match=r"strip:7 needs in_features divisible by 7"):
        prune(build("llama"), PruningConfig(sparsity=0.5, granularity="strip:7"))
    model = build("llama")
    prune(model, PruningConfig(sparsity=0.25))
    with pytest.raises(ValueError, match=r"are not whole groups of strip:4\. Start without hold_zeros"):
        prune(model, PruningConfig(sparsity=0.5, granularity="strip:4", hold_zeros=True))


@pytest.mark.parametrize("granularity", ["head", "neuron", "head+neuron", "layer"])
def test_a_family(add, granularity):
    sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
    model = PhiForCausalLM(PhiConfig(**sizes)).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    config = PruningConfig(
        sparsity=0.5, granularity=granularity, **({"multiple_of": 4} if "neuron" in granularity else {})
    )
    add("family")
    prune(model, config)
    ids = torch.randint(32, (2, 7))
    expected, before = model(ids).logits, model.num_parameters()
    torch.testing.assert_close(shrink(model)(ids).logits, expected)
    assert model.num_parameters() < before
