"""Small models: what is left of a large config, and that it is the same kind of model."""

import pytest
import torch
import transformers

from hf_prune.structures.layer import layer_kind
from hf_prune.structures.small_models import call_exactly, shorten, small_model_like


def on_meta(kind, config):
    with torch.device("meta"):
        return kind(config)


def test_it_is_small_and_of_the_same_class():
    config = transformers.LlamaConfig(num_hidden_layers=30, num_key_value_heads=8)
    small = small_model_like(on_meta(transformers.LlamaForCausalLM, config))
    assert type(small) is transformers.LlamaForCausalLM
    assert small.num_parameters() < 100_000
    assert small.config.num_attention_heads // small.config.num_key_value_heads > 1  # Its queries are still grouped.
    assert {parameter.dtype for parameter in small.parameters()} == {torch.float64}
    assert all(parameter.std() > 0.05 for parameter in small.parameters())  # Norms and biases too.
    assert (config.num_hidden_layers, config.hidden_size) == (30, 4096)


@pytest.mark.parametrize(
    ("heads", "pairs", "expected"), [(8, 1, (6, 3)), (4, 1, (4, 2)), (3, 1, (3, 1)), (2, 2, (2, 2))]
)
def test_a_key_value_head_is_not_alone(heads, pairs, expected):
    config = transformers.LlamaConfig(hidden_size=96, num_attention_heads=heads, num_key_value_heads=pairs)
    small = shorten(config, [0, 1], narrow=True)
    assert (small.num_attention_heads, small.num_key_value_heads) == expected


def test_it_has_a_layer_of_each_kind():
    model = on_meta(transformers.DeepseekV3ForCausalLM, transformers.DeepseekV3Config())
    small = small_model_like(model)
    assert {layer_kind(layer) for layer in small.model.layers} == {layer_kind(layer) for layer in model.model.layers}


def test_tokens_with_a_meaning_stay_apart():
    config = transformers.LlamaConfig(vocab_size=1000, bos_token_id=998, eos_token_id=[997, 3], pad_token_id=999)
    small = shorten(config, [0, 1], narrow=True)
    assert len({small.bos_token_id, small.pad_token_id}) == 2
    assert all(each < small.vocab_size for each in (small.bos_token_id, small.pad_token_id, *small.eos_token_id))


def test_lists_by_layer_are_as_short_as_it():
    small = shorten(transformers.Gemma2Config(), [0, 1], narrow=True)
    assert (small.num_hidden_layers, len(small.layer_types)) == (2, 2)


def test_a_class_that_needs_more_than_its_config():
    class Strange(transformers.LlamaForCausalLM):
        def __init__(self, config, more):
            super().__init__(config)

    model = on_meta(lambda config: Strange(config, 1), transformers.LlamaConfig())
    with pytest.raises(ValueError, match="no small Strange can be built and called"):
        small_model_like(model)


def test_nothing_is_computed_in_single_precision():
    """Llama's norm casts to float32 whatever its inputs are: a change that float32 does not show is seen."""
    model = small_model_like(on_meta(transformers.LlamaForCausalLM, transformers.LlamaConfig()))
    before = call_exactly(model).logits
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1 + 1e-12)
    gap = (call_exactly(model).logits - before).abs().max()
    assert 0 < gap < 1e-9
