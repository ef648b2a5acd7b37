"""Lists of a config that go by layers, and models that are parts of others."""

import copy
import json

import pytest
import torch
import transformers

from hf_prune import PruningConfig, PruningTrainerCallback, Stack, prune, save_pretrained, shrink
from hf_prune.structures.configs import lists_of_layers
from hf_prune.structures.families import FAMILIES
from hf_prune.structures.groups import StructureGroup
from hf_prune.structures.removal import whole_of
from tests.structures.models import DECODER, GROUPED, IMAGES, TOKENS, build, logits_of, perturbed
from tests.structures.test_training import samples

LAYERS = {**GROUPED, "num_hidden_layers": 4}
GROUP = StructureGroup("model.layers", "layer", 4, (), fields=(("num_hidden_layers", 1),))
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)


def test_lists_are_told_by_name_or_by_their_length_in_a_config_with_fewer_layers():
    config = transformers.SmolLM3Config(**LAYERS)
    assert lists_of_layers(config, GROUP) == {"no_rope_layers": [1, 1, 1, 0], "layer_types": ["full_attention"] * 4}
    config.eos_token_id = [1, 2, 3, 4]  # As many as there are layers.
    config.mlp_only_layers = [0, 3]  # Numbers of layers.
    config.layer_sizes_of_something = [16, 24]
    assert lists_of_layers(config, GROUP).keys() == {"no_rope_layers", "layer_types", "mlp_only_layers"}


def smollm3():
    return transformers.SmolLM3ForCausalLM(transformers.SmolLM3Config(**LAYERS))


def qwen3_moe():
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**LAYERS, **EXPERTS, mlp_only_layers=[1, 3]))


def gemma3():
    return transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            **LAYERS,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        )
    )


@pytest.mark.parametrize(
    ("make", "gone", "said"),
    [
        (smollm3, [0, 2], {"no_rope_layers": [1, 0]}),
        (qwen3_moe, [0, 3], {"mlp_only_layers": [0]}),
        (gemma3, [1, 2], {"layer_types": ["sliding_attention", "full_attention"]}),
    ],
)
def test_lists_that_go_by_layers_are_renumbered(make, gone, said, monkeypatch, tmp_path):
    torch.manual_seed(0)
    model = perturbed(make())
    monkeypatch.setitem(FAMILIES, model.config.model_type, (Stack("layers", ()),))
    with torch.no_grad():
        for i in gone:
            for parameter in model.model.layers[i].parameters():
                parameter.mul_(1e-3)
    ids = torch.arange(3, 19)[None]
    prune(model, PruningConfig(sparsity=0.5, granularity="layer"))
    masked = model(ids).logits
    shrink(model)
    assert (model(ids).logits - masked).abs().max() < 1e-5
    assert {name: getattr(model.config, name) for name in said} == said
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not hasattr(loaded.config, "quantization_config")


def llava(text):
    vision = transformers.CLIPVisionConfig(**{k: v for k, v in IMAGES.items() if k != "num_labels"})
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**text), vision_config=vision, image_token_index=59
    )
    return transformers.LlavaForConditionalGeneration(config)


def encoder_decoder(encoder, decoder, whole):
    config = getattr(transformers, f"{whole}Config").from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return getattr(transformers, f"{whole}Model")(config)


def vision_encoder_decoder():
    decoder = transformers.GPT2Config(**TOKENS, n_positions=32, n_embd=16, n_layer=3, n_head=4)
    return encoder_decoder(transformers.ViTConfig(**IMAGES), decoder, "VisionEncoderDecoder")


def two_berts():
    return encoder_decoder(*(transformers.BertConfig(**DECODER) for _ in range(2)), "EncoderDecoder")


IDS = torch.arange(3, 13)[None]
PIXELS = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
WHOLES = {
    "llava": (lambda: llava(GROUPED), "model.language_model", {"input_ids": IDS}),
    "an encoder of images": (
        vision_encoder_decoder, "encoder", {"pixel_values": PIXELS, "decoder_input_ids": IDS}
    ),
    "a decoder of images": (vision_encoder_decoder, "decoder", {"pixel_values": PIXELS, "decoder_input_ids": IDS}),
    "an encoder": (two_berts, "encoder", {"input_ids": IDS, "decoder_input_ids": IDS}),
    "a decoder": (two_berts, "decoder", {"input_ids": IDS, "decoder_input_ids": IDS}),
    "a body": (lambda: build("llama"), "model", {"input_ids": IDS}),
}  # fmt: skip


CANNOT_BE = {
    ("BertModel", "layer", False): "a norm comes behind each sum",
    ("BertModel", "layer", True): "a norm comes behind each sum",
    ("BertModel", "head+neuron", True): "can say fewer heads",
    ("GPT2Model", "head+neuron", True): "can say fewer heads",
}


@pytest.mark.parametrize("granularity", ["head+neuron", "layer"])
@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("name", WHOLES)
def test_a_whole_loads_after_a_part_of_it_has_shrunk(name, granularity, uniform, tmp_path):
    make, path, inputs = WHOLES[name]
    torch.manual_seed(0)
    model = perturbed(make())
    part = model.get_submodule(path)
    config = PruningConfig(sparsity=0.34, granularity=granularity, uniform=uniform)
    if why := CANNOT_BE.get((type(part.base_model).__name__, granularity, uniform)):
        with pytest.raises(ValueError, match=why):
            prune(part, config)
        return
    prune(part, config)
    with torch.no_grad():
        masked = model(**inputs).logits
    shrink(part)
    with torch.no_grad():
        assert (model(**inputs).logits - masked).abs().max() < 1e-5
        model.save_pretrained(tmp_path / "whole")
        loaded = type(model).from_pretrained(tmp_path / "whole")
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
        part.save_pretrained(tmp_path / "part")
        alone = type(part).from_pretrained(tmp_path / "part")
    assert alone.state_dict().keys() == part.state_dict().keys()
    assert all(torch.equal(value, part.state_dict()[name]) for name, value in alone.state_dict().items())
    if uniform:
        assert not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize("parts", [("encoder",), ("decoder",), ("encoder", "decoder")])
@pytest.mark.parametrize("compress", [None, False, True])
def test_a_whole_that_is_put_together_from_shrunk_parts_loads(parts, compress, tmp_path):
    torch.manual_seed(0)
    made = two_berts()
    for name in parts:
        part = made.get_submodule(name)
        prune(part, PruningConfig(sparsity=0.34, granularity="head+neuron", multiple_of=4))
        shrink(part).save_pretrained(tmp_path / name)
    encoder, decoder = (
        type(part).from_pretrained(tmp_path / name) if name in parts else part for name, part in made.named_children()
    )
    model = transformers.EncoderDecoderModel(encoder=encoder, decoder=decoder).eval()
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS}
    for folder in ("once", "twice"):
        if compress is None:
            model.save_pretrained(tmp_path / folder)
        else:
            save_pretrained(model, tmp_path / folder, compress=compress)
        if parts == ("encoder",) and compress is None:  # Transformers looks for records in the decoder's config alone.
            with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
                transformers.EncoderDecoderModel.from_pretrained(tmp_path / folder)
            return
        loaded = transformers.EncoderDecoderModel.from_pretrained(tmp_path / folder)
        with torch.no_grad():
            assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
        model = loaded


def test_a_loaded_whole_is_shrunk_once_more(tmp_path):
    model = perturbed(llava(GROUPED))
    for i in range(2):
        language = model.model.language_model
        prune(language, PruningConfig(sparsity=0.3 + 0.1 * i, granularity="neuron", multiple_of=1))
        shrink(language)
        model.save_pretrained(tmp_path / str(i))
        model = type(model).from_pretrained(tmp_path / str(i))
    assert sum(layer.mlp.up_proj.out_features for layer in model.model.language_model.layers) < 24 * 3 * 0.7


def test_what_another_model_of_the_same_config_says_stays():
    first = llava(GROUPED)
    second = type(first)(first.config)
    said = copy.deepcopy(second.config.to_dict())
    prune(first.model.language_model, PruningConfig(sparsity=0.34, granularity="layer"))
    shrink(first.model.language_model)
    assert first.config.text_config.num_hidden_layers == 2
    assert second.config.to_dict() == said


def test_what_a_model_is_a_part_of():
    whole = llava(GROUPED)
    assert whole_of(whole.model.language_model) is whole
    assert whole_of(whole.model.vision_tower) is whole
    assert whole_of(whole) is whole
    llama = build("llama")
    assert whole_of(llama.model) is llama
    others = [type(llama)(llama.config), torch.nn.Sequential(llama)]
    assert whole_of(llama) is llama, others


def test_a_whole_is_pruned_by_its_parts(make_trainer):
    """What the error says is done here: a part is pruned, the whole is trained with its zeros, the part is shrunk."""
    model, config = perturbed(llava(GROUPED)), PruningConfig(sparsity=0.34, granularity="head")
    with pytest.raises(ValueError, match=r"made of several models.*Give model\.model\.language_model to prune"):
        prune(model, config)
    with pytest.raises(ValueError, match=r"prune that part first, train with hold_zeros=True"):
        make_trainer(model, PruningTrainerCallback(config), train_dataset=samples(model)).train()
    language = model.model.language_model
    prune(language, config)
    held = PruningTrainerCallback(PruningConfig(sparsity=0.34, schedule="one_shot", hold_zeros=True))
    make_trainer(model, held, train_dataset=samples(model), max_steps=2).train()
    before = language.num_parameters()
    shrink(language)
    assert language.num_parameters() < before


# What each layer has


def uneven(name="llama", granularity="neuron", **fields):
    """A model of which the first layer loses other numbers than the rest."""
    model = build(name)
    fields |= {"multiple_of": 4} if "neuron" in granularity else {}
    own = {r".*layers\.0\..*": 2 / 3}
    prune(model, PruningConfig(sparsity=1 / 3, granularity=granularity, layer_sparsity=own, scope="layer", **fields))
    return shrink(model)


@pytest.mark.parametrize(
    ("granularity", "field", "numbers"),
    [
        ("neuron", "intermediate_size", [8, 16, 16]),
        ("head", "num_key_value_heads", [1, 2, 2]),
        ("query", "num_attention_heads", [3, 9, 9]),
    ],
)
def test_the_config_says_what_each_layer_has(granularity, field, numbers, tmp_path):
    model = uneven("mistral", granularity)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["per_layer_config"]["0"][field] == numbers[0]
    assert written["quantization_config"]["shapes"]  # Beside it.
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [getattr(layer, field) for layer in loaded.config.per_layer_config] == numbers
    assert torch.equal(logits_of(loaded), logits_of(model))
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == written


def test_layers_are_numbered_as_they_are_now():
    model = build("llama")
    own = {r".*layers\.2\..*": 2 / 3}
    prune(model, PruningConfig(sparsity=1 / 3, granularity="neuron", multiple_of=4, layer_sparsity=own, scope="layer"))
    with torch.no_grad():
        for parameter in model.model.layers[0].parameters():
            parameter.zero_()
    shrink(model)
    assert [layer.intermediate_size for layer in model.config.per_layer_config] == [16, 8]


def test_what_is_even_again_is_said_by_the_config_itself():
    model = uneven()
    assert model.config.is_heterogeneous
    own = {r".*layers\.[12]\..*": 0.5}
    prune(model, PruningConfig(sparsity=0.0, granularity="neuron", multiple_of=4, layer_sparsity=own))
    assert shrink(model).config.intermediate_size == 8
    assert not model.config.is_heterogeneous
    assert "per_layer_config" not in model.config.to_dict()
    assert "allow_global_per_layer_attribute_access" not in model.config.to_dict()
    assert not hasattr(model.config, "quantization_config")


def test_what_a_config_does_not_take_is_recorded_alone(tmp_path, monkeypatch):
    def refuse(kind, config):
        assert config.is_heterogeneous
        raise ValueError("layers have to be alike")

    monkeypatch.setattr("hf_prune.structures.configs.build_empty", refuse)
    model = uneven()
    assert not model.config.is_heterogeneous
    assert "per_layer_config" not in model.config.to_dict()
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_versions_that_know_no_layers_of_their_own(monkeypatch, tmp_path):
    monkeypatch.delattr("transformers.integrations.heterogeneity.HeterogeneousConfigMixin.per_layer_config")
    model = uneven()
    assert "per_layer_config" not in model.config.to_dict()
    assert model.config.quantization_config["shapes"]


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_layers_of_their_own_generate_from_a_cache(cache):
    model = uneven("mistral", "head")
    tokens = torch.arange(3, 9).view(1, 6)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    plain = model.generate(tokens, **options, use_cache=False)
    assert torch.equal(model.generate(tokens, **options, cache_implementation=cache), plain)
