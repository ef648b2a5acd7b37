"""Stacks: queries that go by themselves, in projections of their own or beside keys and values."""

import pytest
import torch
import transformers

from hf_prune import Heads, PruningConfig, Stack, prune, shrink
from hf_prune.structures.families import FAMILIES
from hf_prune.structures.loading import recorded_in
from hf_prune.structures.proof import prove
from hf_prune.structures.small_models import random_model
from hf_prune.structures.stacks import stacks_of, structures_of
from tests.structures.test_model_types import walk

SIZES = dict(
    vocab_size=32, hidden_size=48, intermediate_size=16, num_hidden_layers=2, num_attention_heads=6, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, max_position_embeddings=64,
)  # fmt: skip
PHI = dict(original_max_position_embeddings=64)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("Granite", dict(num_key_value_heads=2)),
        ("Granite", dict(num_key_value_heads=1)),  # Multi-query attention: no head can go, and queries can.
        ("Gemma", dict(num_key_value_heads=1, head_dim=8)),  # The same, of a family in the table.
        ("Phi3", dict(num_key_value_heads=2, **PHI)),  # One projection, which the config divides for all layers.
        ("Phi3", dict(num_key_value_heads=1, **PHI)),
    ],
    ids=lambda each: each if isinstance(each, str) else str(each["num_key_value_heads"]),
)
@pytest.mark.parametrize("uniform", [False, True])
def test_as_many_queries_go_of_each_key_value_head(name, fields, uniform, tmp_path):
    kind = getattr(transformers, f"{name}ForCausalLM")
    model = random_model(kind, kind.config_class(**SIZES, **fields))
    prune(model, PruningConfig(sparsity=1 / 3, granularity="query", scope="layer", uniform=uniform))
    masked = walk.outputs_of(model)
    shrink(model)
    assert walk.gap(walk.outputs_of(model), masked) <= walk.TOLERANCE
    attention = model.model.layers[0].self_attn
    assert (model.config.num_attention_heads, attention.o_proj.in_features) == (4, 32)
    assert model.config.num_key_value_heads == fields["num_key_value_heads"]
    assert not recorded_in(model.config)
    model.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path, dtype=model.dtype, attn_implementation="eager").eval()
    assert walk.gap(walk.outputs_of(loaded), masked) <= walk.TOLERANCE


def test_queries_of_all_layers_go_together_where_the_config_divides_a_projection():
    kind = transformers.Phi3ForCausalLM
    model = random_model(kind, kind.config_class(**SIZES, num_key_value_heads=2, **PHI))
    prune(model, PruningConfig(sparsity=1 / 3, granularity="query"))
    gone = [layer.self_attn.o_proj.weight.eq(0).all(0).nonzero().flatten().tolist() for layer in model.model.layers]
    assert gone[0] == gone[1]
    assert len(gone[0]) == 16


@pytest.mark.parametrize("granularity", ["head", "query"])
def test_where_one_key_value_head_is_all(granularity):
    kind = transformers.GraniteForCausalLM
    model = random_model(kind, kind.config_class(**SIZES, num_key_value_heads=1))
    config = PruningConfig(sparsity=0.9, granularity=granularity)
    few = {
        "head": "no head of GraniteForCausalLM can go: no place has more than one",
        "query": "at least .* must stay",
    }
    with pytest.raises(ValueError, match=few[granularity]):
        prune(model, config)


def test_queries_are_proved_too():
    """Laguna has a gate over heads, of which queries have a part each, and no attribute counts them."""
    model = walk.tiny("laguna")
    assert {"head", "query"} & prove(model, None).refused.keys() == {"query"}
    with pytest.raises(ValueError, match="queries cannot be removed from LagunaForCausalLM, as a small model of its"):
        prune(model, PruningConfig(sparsity=0.5, granularity="query"))


class Scaled(transformers.LlamaForCausalLM):
    """Has a factor for each input of each key, as long as a multiple of the number of queries, which stays."""

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            attention = layer.self_attn
            attention.k_scale = torch.nn.Parameter(torch.ones(attention.k_proj.out_features))
            attention.k_proj.register_forward_hook(lambda module, _, keys, to=attention: keys * to.k_scale)


def test_what_is_as_long_as_the_keys_stays_with_them(described):
    heads = Heads("self_attn", dict.fromkeys(("q_proj", "k_proj", "v_proj"), 1), "o_proj", beside={"k_scale": 0})
    described("llama", Stack("layers", (heads,)))
    config = transformers.LlamaConfig(**{**SIZES, "hidden_size": 128, "num_attention_heads": 8}, num_key_value_heads=2)
    ((group, *_),) = [list(structures_of(stacks_of(Scaled(config), FAMILIES["llama"]), ("query",)).values())]
    assert not any("k_scale" in member.name for member in group.members)


def test_a_layout_that_is_none(described):
    described("llama", Stack("layers", (Heads("self_attn", {"q_proj": "kv"}, "o_proj"),)))
    with pytest.raises(ValueError, match=r"must be a number of equal parts or 'q\+k\+v'; got 'kv'"):
        prune(
            transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
            PruningConfig(sparsity=0.5, granularity="head"),
        )
