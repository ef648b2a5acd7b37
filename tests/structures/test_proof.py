"""Proof: what is found or described is tried on a small model before anything is touched."""

import copy
import random

import pytest
import torch
import transformers

from hf_prune import Neurons, PruningConfig, Stack, describe_family, prune, shrink
from hf_prune.plan import Plan
from hf_prune.structures import proof
from hf_prune.structures.families import FAMILIES
from tests.structures.mixtures import build_mixture
from tests.structures.models import DECODER, logits_of, perturbed
from tests.structures.test_model_types import walk
from tests.structures.test_shrinking import config_of

SIZES = dict(
    vocab_size=32, hidden_size=32, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, eos_token_id=1,
    pad_token_id=0, bos_token_id=2,
)  # fmt: skip


def olmo():
    return perturbed(transformers.OlmoForCausalLM(transformers.OlmoConfig(**DECODER)))


def test_a_wrong_description_is_an_error_before_anything_is_touched(described):
    described("olmo", Stack("layers", (Neurons("mlp", {"up_proj": 1}, "down_proj"),)))
    model = olmo()
    before = copy.deepcopy(model.state_dict())
    states = random.getstate(), torch.get_rng_state()
    match = r"neurons cannot be removed from OlmoForCausalLM, as a small model of its class shows: .*describe_family"
    with pytest.raises(ValueError, match=match):
        prune(model, config_of("neuron"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])


def test_a_right_description_is_taken(described):
    described("olmo", Stack("layers", (Neurons("mlp", {"gate_proj": 1, "up_proj": 1}, "down_proj"),)))
    model = olmo()
    prune(model, config_of("neuron"))
    masked = logits_of(model)
    shrink(model)
    assert (logits_of(model) - masked).abs().max() < 1e-5
    assert model.config.intermediate_size == DECODER["intermediate_size"]  # No field was named: it is recorded.


def test_a_family_that_looks_like_another_one(described):
    described("mt5", like="t5")
    config = transformers.MT5Config(
        vocab_size=32, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=4
    )
    model = perturbed(transformers.MT5ForConditionalGeneration(config)).double().eval()
    batch = {name: torch.arange(2, 9)[None] for name in ("input_ids", "decoder_input_ids")}
    before = model.num_parameters()
    prune(model, config_of("head"))
    with torch.no_grad():
        masked = model(**batch).logits
        shrink(model)
        torch.testing.assert_close(model(**batch).logits, masked)
    assert model.num_parameters() < before


@pytest.mark.parametrize(
    ("stacks", "like", "match"),
    [
        ((), None, "got both or none"),
        ((Stack("layers", ()),), "llama", "got both or none"),
        ((), "lama", "like must be one of gpt_neo, .*; got 'lama'"),
    ],
)
def test_a_description_that_says_nothing(stacks, like, match):
    with pytest.raises(ValueError, match=match):
        describe_family("a_model", *stacks, like=like)
    assert "a_model" not in FAMILIES


def test_it_is_done_once_for_a_class_and_a_config(monkeypatch):
    prune(olmo(), config_of("head"))
    monkeypatch.setattr(proof, "small_model_like", lambda _: pytest.fail("it is tried again"))
    model = olmo()
    prune(model, config_of("neuron"))
    shrink(model)


def test_neurons_of_all_experts_of_a_dict_are_found():
    """However many there are: a small model has a few of them."""
    model = build_mixture("switch_transformers", num_experts=12)
    counts = [len(each) for name, each in model.named_modules() if name.endswith(".experts")]
    found = [name for name in Plan.of(model, config_of("neuron")).structures if ".experts." in name]
    assert counts == [12] * len(counts)
    assert len(found) == sum(counts) > 0


BITS = {
    "sinks": ("gpt_oss", "head", "sinks", 0.5),
    "a gate over heads": ("afmoe", "head", "gate_proj", 0.5),
    "queries, keys and values of different widths in one": ("phi3", "head", "qkv_proj", 0.5),
    "latent keys and values": ("deepseek_v3", "head", "kv_b_proj", 0.5),
    "a table of positions in each layer": ("umt5", "head", "relative_attention_bias", 0.5),
    "a fused gate": ("glm", "neuron", "gate_up_proj", 0.5),
}


@pytest.mark.parametrize("name", BITS)
def test_what_belongs_to_structures_is_found(name):
    """Each of these goes along, or the outputs would be others: `shrink` compares, and the shapes tell."""
    model_type, granularity, part, share = BITS[name]
    model = walk.tiny(model_type)
    before = {name: parameter.shape for name, parameter in model.named_parameters()}
    multiple = {"multiple_of": 1} if granularity == "neuron" else {}
    prune(model, PruningConfig(sparsity=share, granularity=granularity, scope="layer", **multiple))
    masked = walk.outputs_of(model)
    shrink(model)
    assert walk.gap(walk.outputs_of(model), masked) <= walk.TOLERANCE
    changed = [name for name, parameter in model.named_parameters() if parameter.shape != before[name]]
    assert any(part in name for name in changed)


REFUSED = {
    "bloom": (
        lambda: transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=32, hidden_size=32, n_head=4)),
        "head",
        "heads cannot be removed from BloomForCausalLM",
    ),
    "olmo2": (
        lambda: transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**SIZES)),
        "head",
        "heads cannot be removed from Olmo2ForCausalLM",
    ),
    "camembert": (
        lambda: transformers.CamembertForMaskedLM(transformers.CamembertConfig(**SIZES)),
        "layer",
        "layers cannot be removed from CamembertForMaskedLM.*relative difference of logits",
    ),
    "albert": (
        lambda: transformers.AlbertForMaskedLM(transformers.AlbertConfig(embedding_size=16, **SIZES)),
        "layer",
        "layers cannot be removed from AlbertForMaskedLM|no layer of",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_go_is_an_error(name):
    make, granularity, match = REFUSED[name]
    with pytest.raises(ValueError, match=match):
        prune(make(), PruningConfig(sparsity=0.5, granularity=granularity))


def test_a_layer_of_a_kind_that_has_to_stay_stays():
    """The config of DeepSeek counts its first dense layers: the others may go."""
    model = walk.tiny("deepseek_v3")
    dense, count = model.config.first_k_dense_replace, model.config.num_hidden_layers
    assert 0 < dense < count
    with torch.no_grad():
        for parameter in model.model.layers[0].parameters():
            parameter.mul_(1e-3)
    prune(model, PruningConfig(sparsity=1 / count, granularity="layer"))
    shrink(model)
    assert model.config.num_hidden_layers == count - 1
    assert model.config.first_k_dense_replace == dense


@pytest.mark.parametrize("granularity", ["neuron", "layer"])
def test_a_config_that_refuses_a_field(granularity):
    """Falcon computes the width of its heads and takes none, which only widths ask for."""
    sizes = {**SIZES, "multi_query": True, "bias": False}
    model = transformers.FalconForCausalLM(transformers.FalconConfig(**sizes))
    before = model.num_parameters()
    prune(model, PruningConfig(sparsity=0.34, granularity=granularity))
    shrink(model)
    assert model.num_parameters() < before
    with pytest.raises(ValueError, match="Only models with RMS norms can lose widths"):
        prune(model, PruningConfig(sparsity=0.5, granularity="width"))


def test_a_model_that_keeps_what_it_has_computed():
    """RecurrentGemma keeps its states, with their graph."""
    config = transformers.RecurrentGemmaConfig(**{**SIZES, "lru_width": 32, "head_dim": 8})
    model = transformers.RecurrentGemmaForCausalLM(config)
    prune(model, config_of("neuron"))
    shrink(model)
