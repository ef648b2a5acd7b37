"""Compressed tensors come back, by themselves and by `from_pretrained`, or not at all."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertForTokenClassification,
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    LlamaForCausalLM,
    PreTrainedModel,
)

from hf_prune import PruningConfig, prune, shrink
from hf_prune.publishing.hub import save_pretrained
from hf_prune.weights.compression import BITMASK, compress, compressed_state, decompress
from tests.structures.models import build as build_of_structures
from tests.tiny import FAMILIES, build, needs_comparison

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (8,), (9,), (3, 5), (4, 8), (2, 3, 5), (0,), (0, 4)])
def test_tensors_come_back(dtype, shape):
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.4)
    tensor = tensor.to(dtype)
    bitmask, values = compress(tensor)
    assert (bitmask.dtype, len(bitmask)) == (torch.uint8, (tensor.numel() + 7) // 8)
    assert (values.dtype, len(values)) == (dtype, int(tensor.float().count_nonzero()))
    back = decompress("a", bitmask, values, shape)
    assert (back.dtype, back.shape) == (dtype, tensor.shape)
    assert torch.equal(*(each.flatten().view(torch.uint8) for each in (back, tensor.where(tensor != 0, 0))))


def test_nan_and_infinity_come_back_and_a_negative_zero_as_a_zero():
    back = decompress("a", *compress(torch.tensor([torch.nan, -torch.inf, -0.0, 0.0])), (4,))
    assert back[0].isnan()
    assert back[1:].tolist() == [-torch.inf, 0, 0]
    assert not back[2:].signbit().any()


@pytest.mark.parametrize(
    ("bitmask", "values", "message"),
    [
        ([0b10100000], [1.0], "says 2 of 5 elements, there are 1"),
        ([0b10100000], [1.0, 2.0, 3.0], "says 2 of 5 elements, there are 3"),
        ([0b10100100], [1.0, 2.0, 3.0], "says 3 of 5 elements, there are 3"),  # the last bit is of no element
        ([0b10100000, 0], [1.0, 2.0], r"of shape \[5\] cannot be read from \[2\] bits"),
        ([], [], r"of shape \[5\] cannot be read from \[0\] bits"),
        ([0b10100000], [[1.0, 2.0]], r"values of shape \[1, 2\]"),
    ],
)
def test_bits_and_values_that_do_not_fit_are_an_error(bitmask, values, message):
    with pytest.raises(ValueError, match=message):
        decompress("a", torch.tensor(bitmask, dtype=torch.uint8), torch.tensor(values), (5,))


def test_what_would_not_be_smaller_stays_as_it_is():
    dense, half = torch.ones(64), torch.ones(64)
    half[::2] = 0
    others = {"steps": torch.zeros(64, dtype=torch.long), "scalar": torch.tensor(0.0)}
    state, shapes = compressed_state({"dense": dense, "half": half, **others})
    assert shapes == {"half": [64]}
    assert set(state) == {"dense", "half", "half:bitmask", *others}


@pytest.mark.parametrize(("dtype", "sparsity", "size"), [(torch.bfloat16, 0.5, 0.56), (torch.bfloat16, 0.9, 0.16)])
def test_how_small_files_are(dtype, sparsity, size, tmp_path):
    model = wide(dtype)
    save_pretrained(model, tmp_path / "dense")
    prune(model, PruningConfig(sparsity=sparsity, target_modules=".*"))
    save_pretrained(model, tmp_path / "sparse", compress=True)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("sparse", "dense")]
    assert sizes[0] / sizes[1] == pytest.approx(size, abs=0.01)


def wide(dtype: torch.dtype) -> PreTrainedModel:
    config = build("llama").config
    config.hidden_size, config.intermediate_size = 256, 1024
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 4, 64
    return LlamaForCausalLM(config).to(dtype)


def equal(model: nn.Module, other: nn.Module) -> bool:
    state = other.state_dict()
    return model.state_dict().keys() == state.keys() and all(
        torch.equal(tensor, state[name]) and tensor.dtype == state[name].dtype
        for name, tensor in model.state_dict().items()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back(family, dtype, tmp_path):
    model = build(family, dtype)
    prune(model, PruningConfig(sparsity=0.8))
    save_pretrained(model, tmp_path / "sparse", compress=True)
    assert not hasattr(model.config, "quantization_config")
    assert any(name.endswith(BITMASK) for name in load_file(tmp_path / "sparse" / "model.safetensors"))
    loaded = type(model).from_pretrained(tmp_path / "sparse", dtype="auto")
    assert equal(loaded, model)
    # From here on it is an ordinary model, which is saved as such.
    assert not getattr(loaded, "is_quantized", False)
    loaded.float().save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert equal(type(model).from_pretrained(tmp_path / "plain", dtype=dtype), model)


def test_other_dtypes_and_classes(tmp_path):
    model = build("llama")
    prune(model, PruningConfig(sparsity=0.8))
    save_pretrained(model, tmp_path, compress=True)
    assert equal(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16), model.bfloat16())
    assert equal(AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16), model.model)


def test_in_several_files(tmp_path):
    model = wide(torch.float32)
    prune(model, PruningConfig(sparsity=0.5))
    save_pretrained(model, tmp_path, compress=True, max_shard_size="1MB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert equal(LlamaForCausalLM.from_pretrained(tmp_path), model)


def test_shapes_that_no_config_can_say_are_beside_it(tmp_path):
    model = build_of_structures("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(0.1)  # More of its neurons go than of the other layer's.
    prune(model, PruningConfig(sparsity=0.5, granularity="neuron", multiple_of=4))
    shrink(model)
    prune(model, PruningConfig(sparsity=0.5))
    record = model.config.to_dict()["quantization_config"]
    save_pretrained(model, tmp_path, compress=True)
    assert model.config.to_dict()["quantization_config"] == record
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"].keys() > record.keys()
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert equal(loaded, model)
    assert loaded.config.to_dict()["quantization_config"] == record


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = build("llama")
    prune(model, PruningConfig(sparsity=0.8))
    save_pretrained(model, tmp_path, compress=True)
    return tmp_path


NAME = "model.layers.0.mlp.up_proj.weight"


def change(folder: Path, how: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    if how == "too few values":
        tensors[NAME] = tensors[NAME][1:].clone()
    elif how == "another bit":
        tensors[NAME + BITMASK][0] ^= 0xFF
    elif how == "whole numbers":
        tensors[NAME] = tensors[NAME].int()
    else:
        del tensors[NAME + (BITMASK if how == "no bits" else "")]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("how", ["too few values", "another bit", "whole numbers", "no bits", "no values"])
def test_damaged_files_are_an_error(how, saved):
    change(saved, how)
    with pytest.raises(RuntimeError, match="CONVERSION"):
        LlamaForCausalLM.from_pretrained(saved)


def test_who_knows_nothing_of_it_meets_an_error_and_no_new_weights(saved):
    config = json.loads((saved / "config.json").read_text())
    del config["quantization_config"]
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        LlamaForCausalLM.from_pretrained(saved)


def test_a_config_from_before_does_no_harm(saved, tmp_path):
    model = LlamaForCausalLM(AutoConfig.from_pretrained(saved))
    model.save_pretrained(tmp_path / "new")
    assert equal(LlamaForCausalLM.from_pretrained(tmp_path / "new"), model)


def test_another_shape_in_the_model_is_an_error(saved):
    config = json.loads((saved / "config.json").read_text())
    config["intermediate_size"] *= 2
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises((RuntimeError, ValueError), match="ignore_mismatched_sizes"):
        LlamaForCausalLM.from_pretrained(saved)


def with_zeros_in(*names: str) -> Callable[[PreTrainedModel], None]:
    def change(model: PreTrainedModel) -> None:
        for name in names:
            model.get_parameter(name).data[:-1] = 0

    return change


# A model, what is zero in it beside its body, and what its loader asks for.
REPLACED = {
    "a zero bias": ("bert", with_zeros_in("classifier.bias"), {"num_labels": 5}),
    "a pruned head": ("bert", with_zeros_in("classifier.weight", "classifier.bias"), {"num_labels": 5}),
    "a pruned head of images": ("vit", with_zeros_in("classifier.weight"), {"num_labels": 1}),
    "a head of one label": ("bert", with_zeros_in("classifier.weight"), {"num_labels": 1}),
    "rows of embeddings": ("llama", with_zeros_in("model.embed_tokens.weight"), {"vocab_size": 70}),
    "tied embeddings": ("t5", with_zeros_in("shared.weight"), {"vocab_size": 50}),
    "positions": ("bert", with_zeros_in("bert.embeddings.position_embeddings.weight"), {"max_position_embeddings": 9}),
}


@needs_comparison
@pytest.mark.parametrize(
    ("case", "shards"), [*((case, {}) for case in REPLACED), ("a pruned head", {"max_shard_size": "6KB"})]
)
def test_a_loader_replaces_what_it_replaces_of_a_dense_folder(case, shards, tmp_path):
    family, change, asked = REPLACED[case]
    model, infos, loaded = build(family), [], []
    prune(model, PruningConfig(sparsity=0.8))
    change(model)
    for folder in ("dense", "sparse"):
        save_pretrained(model, tmp_path / folder, compress=folder == "sparse", **shards)
        torch.manual_seed(1)
        one, info = type(model).from_pretrained(
            tmp_path / folder, ignore_mismatched_sizes=True, output_loading_info=True, **asked
        )
        loaded.append(one)
        infos.append(info)
    assert infos[1] == infos[0]
    assert infos[0]["mismatched_keys"]
    assert equal(loaded[1], loaded[0])
    assert not hasattr(loaded[1].config, "quantization_config")


@pytest.mark.parametrize("case", REPLACED)
def test_another_shape_is_never_loaded_in_silence(case, tmp_path):
    family, change, asked = REPLACED[case]
    model = build(family)
    prune(model, PruningConfig(sparsity=0.8))
    change(model)
    save_pretrained(model, tmp_path, compress=True)
    with pytest.raises((RuntimeError, ValueError), match="ignore_mismatched_sizes"):
        type(model).from_pretrained(tmp_path, **asked)


def test_what_goes_by_several_names_is_saved_once(tmp_path):
    model = build("t5")
    prune(model, PruningConfig(sparsity=0.8))
    with_zeros_in("shared.weight")(model)
    save_pretrained(model, tmp_path, compress=True)
    names = {name.removesuffix(BITMASK) for name in load_file(tmp_path / "model.safetensors")}
    model.save_pretrained(tmp_path / "dense")
    assert names == set(load_file(tmp_path / "dense" / "model.safetensors"))
    assert equal(type(model).from_pretrained(tmp_path), model)


@needs_comparison
def test_vocabularies_are_resized_and_saved_again(tmp_path):
    model = build("llama")
    prune(model, PruningConfig(sparsity=0.8))
    with_zeros_in("model.embed_tokens.weight")(model)
    save_pretrained(model, tmp_path / "sparse", compress=True)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "sparse")
    loaded.resize_token_embeddings(70)
    save_pretrained(loaded, tmp_path / "again", compress=True)
    again = LlamaForCausalLM.from_pretrained(tmp_path / "again")
    assert again.get_input_embeddings().weight.shape == (70, 16)
    assert equal(again, loaded)
    # And beside a config from before, as who copies the weights alone has them.
    loaded.save_pretrained(tmp_path / "plain")
    config = (tmp_path / "sparse" / "config.json").read_text()
    (tmp_path / "plain" / "config.json").write_text(config)
    late = LlamaForCausalLM.from_pretrained(tmp_path / "plain", ignore_mismatched_sizes=True)
    assert late.get_input_embeddings().weight.shape == (60, 16)
    assert torch.equal(late.model.layers[0].mlp.up_proj.weight, loaded.model.layers[0].mlp.up_proj.weight)


@needs_comparison
def test_with_another_head_or_none(tmp_path):
    model = build("bert")
    prune(model, PruningConfig(sparsity=0.8, target_modules=".*"))
    save_pretrained(model, tmp_path / "head", compress=True)
    save_pretrained(model.bert, tmp_path / "base", compress=True)
    assert equal(AutoModel.from_pretrained(tmp_path / "head"), model.bert)
    for folder in ("head", "base"):
        loaded, info = BertForTokenClassification.from_pretrained(
            tmp_path / folder, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True
        )
        assert loaded.classifier.weight.shape == (5, 16)
        body = model.bert.state_dict()
        assert all(torch.equal(t, body[name]) for name, t in loaded.bert.state_dict().items())
        assert not {name for name in info["missing_keys"] if name.startswith("bert.")}


def test_modules_that_are_kept_in_float32_are(tmp_path):
    model = build("t5")
    prune(model, PruningConfig(sparsity=0.8))
    model.save_pretrained(tmp_path / "plain")
    save_pretrained(model, tmp_path / "sparse", compress=True)
    plain, sparse = (type(model).from_pretrained(tmp_path / name, dtype=torch.float16) for name in ("plain", "sparse"))
    assert {tensor.dtype for tensor in sparse.state_dict().values()} == {torch.float16, torch.float32}
    assert equal(sparse, plain)


def test_a_part_of_a_model_that_has_a_config_of_its_own_is_no_new_one(tmp_path):
    text = {
        "vocab_size": 60,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    vision = {**text, "image_size": 8, "patch_size": 4}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    prune(model, PruningConfig(sparsity=0.8, target_modules=".*proj"))
    save_pretrained(model, tmp_path, compress=True)
    assert equal(CLIPModel.from_pretrained(tmp_path), model)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        CLIPTextModel.from_pretrained(tmp_path)


def test_a_quantized_model_is_refused(tmp_path):
    model = build("llama")
    prune(model, PruningConfig(sparsity=0.8))
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    with pytest.raises(ValueError, match="the model is quantized"):
        save_pretrained(model, tmp_path, compress=True)
    assert not any(tmp_path.iterdir())
