"""Trials: structures that no family describes are tried on a small model first, however large the model is."""

import pytest
import torch
import transformers

from hf_prune.structures import trial
from hf_prune.structures.trial import require_exact_on_a_small_model
from tests.structures.mixtures import AVAILABLE, build_mixture, class_of


class ByField(transformers.MixtralForCausalLM):
    """Divides logits by a field of the config, which changes when structures go."""

    def forward(self, input_ids, **kwargs):
        output = super().forward(input_ids, **kwargs)
        output.logits = output.logits / getattr(self.config, self.config.field)
        return output


class ByAttribute(transformers.MixtralForCausalLM):
    """Divides logits by an attribute of a module, which changes when experts go."""

    def forward(self, input_ids, **kwargs):
        output = super().forward(input_ids, **kwargs)
        output.logits = output.logits / self.model.layers[0].mlp.experts.num_experts
        return output


def on_meta(kind, **fields):
    with torch.device("meta"):
        return kind(transformers.MixtralConfig(**fields))


@pytest.mark.parametrize("kind", ["expert", "neuron", "width"])
def test_a_model_that_fills_no_memory_is_tried(kind, monkeypatch):
    model, gone = on_meta(transformers.MixtralForCausalLM), []
    assert model.num_parameters() > 40e9
    differs = trial.why_differs

    def note(small, structures, kept):
        gone.extend(int((~each).sum()) for each in kept.values())
        return differs(small, structures, kept)

    monkeypatch.setattr(trial, "why_differs", note)
    require_exact_on_a_small_model(model, kind)
    assert len(gone) >= 2
    assert all(gone)


@pytest.mark.parametrize(
    ("model", "field", "kind"),
    [
        (ByAttribute, "", "expert"),
        (ByField, "num_local_experts", "expert"),
        (ByField, "intermediate_size", "neuron"),
        (ByField, "hidden_size", "width"),
    ],
)
def test_what_shows_in_the_outputs_alone_is_an_error(model, field, kind):
    model = on_meta(model, field=field)
    for each in {"expert", "neuron", "width"} - {kind}:
        require_exact_on_a_small_model(model, each)
    match = r"cannot be removed from By\w+: a small model of this class without some of them fails \(relative"
    for _ in range(2):
        with pytest.raises(ValueError, match=match):
            require_exact_on_a_small_model(model, kind)


def test_where_nothing_can_go_nothing_is_proved():
    model = on_meta(transformers.MixtralForCausalLM, num_experts_per_tok=2, num_local_experts=2)
    with pytest.raises(ValueError, match=r"experts cannot be removed from Mixtral.* fails \(nothing of it can go\)"):
        require_exact_on_a_small_model(model, "expert")


AS_RELEASED = {
    "gemma4_text": dict(enable_moe_block=True, num_experts=128, top_k_experts=8, moe_intermediate_size=704),
}
# Of their default configs no model can be built or called.
UNBUILT = {"dots1", "hunyuan_v1_moe", "deepseek_v2"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in AVAILABLE if name not in UNBUILT])
def test_mixtures_of_default_configs_are_proved(name):
    with torch.device("meta"):
        model = class_of(name)(transformers.CONFIG_MAPPING[name](**AS_RELEASED.get(name, {})))
    for kind in ("expert", *(("neuron",) if name != "switch_transformers" else ())):  # Those in lists are networks.
        require_exact_on_a_small_model(model, kind)


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
