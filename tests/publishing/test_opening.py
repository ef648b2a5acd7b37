"""Saved models, opened by name: the model that was saved, and never code that came with it."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from hf_prune import PruningConfig, prune, save_pretrained, shrink
from hf_prune.publishing.folders import names_in
from hf_prune.publishing.opening import open_empty, open_model, open_processing
from hf_prune.structures.shrinking import find_removable
from tests.structures import models
from tests.tiny import FAMILIES, build
from tests.words import word_tokenizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_that_was_saved_is_opened(family, compress, dtype, tmp_path):
    model = build(family, dtype)
    prune(model, PruningConfig(sparsity=0.8))
    save_pretrained(model, tmp_path, compress=compress)
    opened = open_model(tmp_path)
    assert type(opened) is type(model)
    assert not opened.training
    expected = model.state_dict()
    assert {name: tensor.dtype for name, tensor in opened.state_dict().items()} == {
        n: t.dtype for n, t in expected.items()
    }
    assert all(torch.equal(tensor, expected[name]) for name, tensor in opened.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_names_in_files_are_those_of_the_model(family, tmp_path):
    model = build(family)
    model.save_pretrained(tmp_path)
    saved = transformers.modeling_utils.load_state_dict(str(tmp_path / "model.safetensors"))
    parameters = dict(model.named_parameters())
    names = names_in(open_empty(tmp_path), saved)
    assert all(torch.equal(saved[there], parameters[here]) for here, there in names.items() if here in parameters)
    # What is fused in memory has no name of its own in the files.
    missing = {name for name in parameters if name not in names}
    assert all("experts" in name or "lm_head" in name for name in missing), missing


def test_a_body_and_its_head_know_each_others_names(tmp_path):
    model = build("gpt2")
    model.transformer.save_pretrained(tmp_path)
    names = names_in(model, ["h.0.mlp.c_fc.weight", "nothing"])
    assert names == {"transformer.h.0.mlp.c_fc.weight": "h.0.mlp.c_fc.weight"}
    assert names_in(open_empty(tmp_path), ["transformer.ln_f.bias"]) == {"ln_f.bias": "transformer.ln_f.bias"}


@pytest.mark.parametrize("name", ["gpt2", "gpt_neo"])
def test_an_empty_model_has_the_recorded_shapes(name, tmp_path):
    model = models.build(name)
    prune(model, PruningConfig(sparsity=0.5, granularity="head+neuron", multiple_of=1))
    shrink(model)
    model.save_pretrained(tmp_path)
    empty = open_empty(tmp_path)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in empty.state_dict().items()} == shapes
    assert {n: place.count for n, place in find_removable(empty).items()} == {
        n: place.count for n, place in find_removable(model).items()
    }


def with_config(folder: Path, **values: object) -> Path:
    build("llama").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    return folder


@pytest.mark.parametrize("names", [["os"], ["Trainer"], ["pipeline"], ["__builtins__"], ["MyModel"]])
def test_what_is_no_model_of_transformers_is_an_error(names, tmp_path):
    with pytest.raises(ValueError, match="as its architecture, which is no model of Transformers"):
        open_model(with_config(tmp_path, architectures=names))


@pytest.mark.parametrize("names", [None, []])
def test_no_architecture_is_an_error(names, tmp_path):
    with pytest.raises(ValueError, match=r"names no architecture\. Save the model with save_pretrained"):
        open_model(with_config(tmp_path, architectures=names))


def test_weights_of_other_shapes_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be loaded: .*mismatch"):
        open_model(with_config(tmp_path, intermediate_size=33))


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    folder = with_config(
        tmp_path, auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}, model_type="mine"
    )
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        open_model(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["mine.T", "mine.T"]}}))
    with pytest.raises((ValueError, OSError)):
        open_processing(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": "wide"}, r"config\.json is damaged, or of no model of Transformers: .*hidden_size"),
        ({"num_attention_heads": []}, r"config\.json is damaged, .*: .*num_attention_heads"),
        (
            {"quantization_config": {"quant_method": "hf_prune", "shapes": 3}},
            r"'shapes' of a pruned model, recorded in config\.json, must be an object: 3",
        ),
    ],
)
def test_a_damaged_config_is_an_error(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        open_empty(with_config(tmp_path, **values))


def test_pickles_are_not_loaded(tmp_path):
    build("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(build("llama").state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"is not a saved model: it has no model\.safetensors"):
        open_model(tmp_path)


def test_no_model_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"is not a saved model: it has no model\.safetensors"):
        open_model(tmp_path)
    with pytest.raises(ValueError, match=r"is not a saved model: it has no config\.json"):
        open_empty(tmp_path)


def test_a_dtype_is_that_of_the_files_whatever_the_config_says(tmp_path):
    folder = with_config(tmp_path, dtype="bfloat16")
    assert {tensor.dtype for tensor in open_model(folder).state_dict().values()} == {torch.float32}


def test_of_several_dtypes_the_widest_loses_nothing(tmp_path):
    model = build("llama", torch.bfloat16)
    model.model.norm.float()
    with torch.no_grad():
        model.model.norm.weight.add_(1e-4)
    model.save_pretrained(tmp_path)
    opened = open_model(tmp_path).state_dict()
    assert all(torch.equal(opened[name], tensor.float()) for name, tensor in model.state_dict().items())


def test_weights_without_a_place_are_named(tmp_path, caplog):
    build("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "second_head.weight": torch.ones(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    open_model(tmp_path)
    assert (
        "A LlamaForCausalLM has no place for these weights, and they are left out: second_head.weight." in caplog.text
    )


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_code_of_the_hub_for_attention_is_not_asked_for(key, tmp_path):
    """Without the package that would load it, asking is an ImportError."""
    folder = with_config(tmp_path, **{key: "evil/attn"})
    assert open_model(folder).config._attn_implementation == "eager"
    assert find_removable(open_empty(folder))


def test_processing(tmp_path):
    assert open_processing(tmp_path) == []
    word_tokenizer().save_pretrained(tmp_path)
    build("llama").config.save_pretrained(tmp_path)
    for name in ("", "tokenizer_config.json"):  # With all files, and with one.
        (tmp_path / name).unlink() if name else None
        (found,) = open_processing(tmp_path)
        assert found("a b")["input_ids"] == word_tokenizer()("a b")["input_ids"]


def test_a_tokenizer_and_an_image_processor(tmp_path):
    transformers.ViTConfig().save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    transformers.ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    tokenizer, image_processor = open_processing(tmp_path)
    assert tokenizer("a")["input_ids"] == word_tokenizer()("a")["input_ids"]
    assert image_processor.size["height"] == 8


def test_a_feature_extractor(tmp_path):
    transformers.WhisperConfig().save_pretrained(tmp_path)
    transformers.WhisperFeatureExtractor().save_pretrained(tmp_path)
    (found,) = open_processing(tmp_path)
    assert isinstance(found, transformers.WhisperFeatureExtractor)


def test_damaged_processing_is_an_error(tmp_path):
    build("llama").config.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match="to prepare inputs cannot be loaded"):
        open_processing(tmp_path)
