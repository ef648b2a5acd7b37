"""By kind: what is found of a mixture, and what of a model that is made of several."""

import logging

import pytest
import torch
import transformers

from hf_prune import Neurons, PruningConfig, Stack, prune, shrink
from hf_prune.structures.by_kind import find_by_kind
from hf_prune.weights.targets import find_targets
from tests.structures.mixtures import build_mixture

NEURONS_OF = {"mixtral": "experts.down_proj", "jetmoe": "output_linear"}
NEURONS = PruningConfig(sparsity=0.5, granularity="neuron", multiple_of=2)


def neurons_of(name):
    model = build_mixture(name)
    return set(find_by_kind(model, ["neuron"], find_targets(model), 2))


def test_neurons_of_shared_experts_go_with_those_of_experts(caplog):
    found = neurons_of("qwen2_moe")
    assert {name.rpartition("mlp.")[2] for name in found} == {"experts.down_proj", "shared_expert"}
    assert not caplog.records


@pytest.mark.parametrize("name", ["mixtral", "jetmoe"])  # Of the latter heads are not found either.
def test_a_mixture_without_other_neurons_is_nothing_to_warn_of(name, caplog):
    assert {module.rpartition("mlp.")[2] for module in neurons_of(name)} == {NEURONS_OF[name]}
    assert not caplog.records


def test_other_neurons_that_cannot_go_are_told(caplog):
    model = build_mixture("minimax")
    with caplog.at_level(logging.WARNING, logger="hf_prune"):
        prune(model, NEURONS)
    assert "only those of experts are pruned: neurons cannot be removed from MiniMaxForCausalLM" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="hf_prune"):  # Of experts nobody has to know.
        prune(model, PruningConfig(sparsity=0.25, granularity="expert"))
        shrink(model)
    assert "neurons" not in caplog.text


def test_other_neurons_that_are_described_wrongly_are_an_error(described):
    described("qwen2_moe", Stack("layers", (Neurons("mlp.shared_expert", {"up_proj": 1}, "down_proj"),)))
    with pytest.raises(ValueError, match="neurons cannot be removed from Qwen2MoeForCausalLM, as a small model of"):
        prune(build_mixture("qwen2_moe"), NEURONS)


@pytest.mark.parametrize("granularity", ["expert", "neuron", "head", "query", "layer"])
def test_a_model_that_is_made_of_several_is_an_error(granularity):
    with torch.device("meta"):
        model = transformers.AriaForConditionalGeneration(transformers.AriaConfig())
    match = r"AriaForConditionalGeneration is made of several models.*Give .*model\.model\.language_model to prune"
    with pytest.raises(ValueError, match=match):
        find_by_kind(model, [granularity], {}, 1)
