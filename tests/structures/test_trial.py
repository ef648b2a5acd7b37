"""Trials: structures that no family describes are tried on a small model first, however large the model is."""

import pytest
import torch
import transformers

from hf_prune.structures import trial
from hf_prune.structures.trial import require_exact_on_a_small_model
from tests.structures.mixtures import build_mixture


class Share(transformers.MixtralForCausalLM):
    """Multiplies logits by the share of an expert, whatever is masked."""

    def forward(self, input_ids, **kwargs):
        output = super().forward(input_ids, **kwargs)
        output.logits = output.logits / self.model.layers[0].mlp.experts.num_experts
        return output


@pytest.mark.parametrize("kind", ["expert", "neuron", "width"])
def test_a_model_that_fills_no_memory_is_tried(kind):
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig())
    assert model.num_parameters() > 40e9
    require_exact_on_a_small_model(model, kind)


def test_what_shows_in_the_outputs_alone_is_an_error():
    with torch.device("meta"):
        model = Share(transformers.MixtralConfig())
    require_exact_on_a_small_model(model, "neuron")
    match = r"experts cannot be removed from Share: a small model of this class without some of them fails \(relative"
    for _ in range(2):
        with pytest.raises(ValueError, match=match):
            require_exact_on_a_small_model(model, "expert")


def test_neurons_are_said_to_be_those_of_experts(monkeypatch):
    def none(model):
        raise ValueError("there is no small one")

    monkeypatch.setattr(trial, "small_model_like", none)
    match = r"neurons of experts cannot be removed from MixtralForCausalLM: .* fails \(there is no small one\)"
    with pytest.raises(ValueError, match=match):
        require_exact_on_a_small_model(build_mixture("mixtral", vocab_size=61), "neuron")


def test_it_is_done_once_for_a_class_and_a_config(monkeypatch):
    require_exact_on_a_small_model(build_mixture("mixtral"), "expert")
    monkeypatch.setattr(trial, "small_model_like", lambda _: pytest.fail("it is tried again"))
    require_exact_on_a_small_model(build_mixture("mixtral"), "expert")
