"""Batches that are made from a config, with which every model can be called."""

import pytest
import torch
import transformers

from hf_prune.structures.example_inputs import example_batch, image_shape
from tests.structures.models import DECODER, MODELS, TOKENS, build
from tests.structures.test_channels import NETWORKS


@pytest.mark.parametrize("name", MODELS)
def test_every_family_can_be_called(name):
    model = build(name)
    batch = example_batch(model)
    assert all(len(value) == 1 for value in batch.values())
    with torch.no_grad():
        assert model(**batch)[0].isfinite().all()
    again = example_batch(model)
    assert all(torch.equal(value, again[name]) for name, value in batch.items())


@pytest.mark.parametrize("name", NETWORKS)
def test_every_convolutional_network_can_be_called(name):
    model = NETWORKS[name]().eval()
    with torch.no_grad():
        assert model(**example_batch(model))[0].isfinite().all()


def test_a_sequence_ends_once():
    """Some heads read what stands at its end, and require as many in each sample."""
    model = transformers.BartForSequenceClassification(
        transformers.BartConfig(**TOKENS, d_model=16, encoder_layers=1, decoder_layers=1, num_labels=3)
    ).eval()
    ids = example_batch(model)["input_ids"]
    assert (ids == 2).nonzero().tolist() == [[0, ids.shape[1] - 1]]
    assert not (ids == 0).any()
    with torch.no_grad():
        assert model(**example_batch(model)).logits.shape == (1, 3)


def test_a_sequence_is_no_longer_than_positions_are():
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**TOKENS, n_positions=6, n_embd=8, n_head=2, n_layer=1)
    )
    assert example_batch(model)["input_ids"].shape == (1, 4)


def test_sounds():
    config = transformers.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(8, 8),
        conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2, num_conv_pos_embedding_groups=2,
        num_conv_pos_embeddings=4,
    )  # fmt: skip
    model = transformers.Wav2Vec2Model(config).eval()
    with torch.no_grad():
        assert model(**example_batch(model)).last_hidden_state.shape[0] == 1


def test_what_is_not_known_is_nothing():
    class Strange(transformers.LlamaForCausalLM):
        main_input_name = "molecules"

    assert example_batch(Strange(transformers.LlamaConfig(**DECODER))) is None


def test_large_images_only_take_time_unless_they_are_cut_into_patches():
    resnet = transformers.ResNetModel(transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))
    assert image_shape(resnet) == (1, 3, 64, 64)
    resnet.config.image_size = 512
    assert image_shape(resnet) == (1, 3, 256, 256)
    vit = transformers.ViTModel(transformers.ViTConfig(**{**IMAGE, "image_size": 512, "patch_size": 128}))
    assert image_shape(vit) == (1, 3, 512, 512)


IMAGE = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
