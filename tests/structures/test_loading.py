"""A shrunk model is loaded as any other, in a process of its own."""

import dataclasses
import json
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_prune import PruningConfig, prune, save_pretrained, shrink
from hf_prune.structures import families
from hf_prune.structures.loading import Record
from tests.structures.models import MODELS, build, inputs_of, logits_of
from tests.structures.test_shrinking import IMPOSSIBLE, config_of
from tests.structures.test_training import samples

LOAD = """
import copy, json, pathlib, sys, torch, transformers
if {plain}:
    sys.modules["hf_prune"] = None
else:
    import hf_prune
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    kind = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    # Copied, since the last bit of a product depends on where in the memory its factors begin.
    model = copy.deepcopy(kind.from_pretrained(folder))
    inputs = torch.load(folder / "inputs.pt")
    with torch.no_grad():
        torch.save(model(**inputs).logits, folder / "logits.pt")
"""


def load_elsewhere(folder, plain):
    code = LOAD.format(plain=plain)
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def save(model, folder):
    model.save_pretrained(folder)
    torch.save(inputs_of(model), folder / "inputs.pt")
    return logits_of(model)


@pytest.mark.slow
def test_every_family_loads_in_a_fresh_process_to_the_last_bit(tmp_path):
    expected = {}
    for name in MODELS:
        for granularity in ("head", "head+neuron", "layer"):
            if (name, granularity) not in IMPOSSIBLE:
                model = build(name)
                prune(model, config_of(granularity, "auto"))
                shrink(model)
                folder = tmp_path / f"{name} {granularity}"
                expected[folder] = save(model, folder)
    load_elsewhere(tmp_path, plain=False)
    for folder, logits in expected.items():
        assert torch.equal(torch.load(folder / "logits.pt"), logits), folder.name


# Families and granularities of which a config can say how many structures there are.
SAYABLE = [
    (name, granularity)
    for name in MODELS
    for granularity in ("head", "neuron", "layer")
    if (name, granularity) not in IMPOSSIBLE
    and not (granularity == "neuron" and name.startswith("dinov2"))
    and (granularity != "head" or name.startswith(("llama", "mistral", "qwen", "gemma", "vit", "deit", "t5")))
]


@pytest.mark.slow
def test_what_a_config_can_say_loads_where_hf_prune_is_not_installed(tmp_path):
    expected = {}
    for name, granularity in SAYABLE:
        model = build(name)
        uniform = {} if granularity == "layer" else {"uniform": True}
        prune(model, config_of(granularity, **uniform))
        shrink(model)
        assert not hasattr(model.config, "quantization_config"), name
        folder = tmp_path / f"{name} {granularity}"
        expected[folder] = save(model, folder)
    load_elsewhere(tmp_path, plain=True)
    for folder, logits in expected.items():
        assert torch.equal(torch.load(folder / "logits.pt"), logits), folder.name


@pytest.mark.parametrize(
    ("name", "granularity"),
    [
        (name, granularity)
        for name in MODELS
        for granularity in ("head", "neuron")
        if (name, granularity) not in SAYABLE
    ],
)
def test_uniform_fails_early_where_no_config_can_say_it(name, granularity):
    with pytest.raises(ValueError, match=f"no config of .* can say fewer {granularity}s"):
        prune(build(name), config_of(granularity, uniform=True))


def test_uniform_means_everywhere():
    with pytest.raises(ValueError, match=r"uniform: 'model.layers.0.mlp' would keep all"):
        prune(build("llama"), config_of("neuron", uniform=True, exclude_modules=[".*layers.0.mlp.*"]))


@pytest.mark.parametrize(("name", "granularity"), [("qwen2", "layer"), ("gemma2", "layer"), ("qwen3", "head+layer")])
def test_uniform_layers_shorten_the_lists_of_a_config_too(name, granularity):
    model = build(name)
    shrink_uniformly(model, granularity, 0.5)
    assert model.config.num_hidden_layers == len(model.config.layer_types) == len(model.model.layers)


def llama_of(hidden_size):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=hidden_size, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4
    )
    return transformers.LlamaForCausalLM(config)


def shrink_uniformly(model, granularity, sparsity, **options):
    prune(model, PruningConfig(sparsity=sparsity, granularity=granularity, uniform=True, **options))
    shrink(model)
    assert "quantization_config" not in model.config.to_dict()


def test_uniform_asks_what_a_config_can_say_together():
    model = llama_of(16)  # Three heads do not divide it, but the twelve channels that are left.
    shrink_uniformly(model, "head+width", 0.25, multiple_of=4)
    assert (model.config.num_attention_heads, model.config.hidden_size) == (3, 12)

    # Three heads divide 24, four divide 16, three do not divide 16.
    with pytest.raises(ValueError, match=r"uniform: no config of .* can say num_attention_heads=3.*hidden_size=16"):
        shrink_uniformly(llama_of(24), "head+width", 0.25, multiple_of=4)


@pytest.fixture
def shrunk():
    """A model whose shapes no config can say."""
    model = build("gpt_neo")
    prune(model, config_of("head+neuron"))
    return shrink(model)


@pytest.mark.parametrize(
    "options",
    [{}, {"device_map": "cpu"}, {"device_map": "auto"}, {"low_cpu_mem_usage": True}, {"dtype": torch.bfloat16}],
    ids=str,
)
@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "4KB"}], ids=["whole", "sharded"])
def test_it_loads_in_every_way(shrunk, tmp_path, options, shards):
    shrunk.save_pretrained(tmp_path, **shards)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or not shards
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    assert torch.equal(logits_of(loaded), logits_of(shrunk.to(options.get("dtype", torch.float32))))


def test_it_loads_with_another_head_or_none(tmp_path):
    model = build("bert")
    prune(model, config_of("head+neuron"))
    shrink(model).save_pretrained(tmp_path / "with")
    base = transformers.AutoModel.from_pretrained(tmp_path / "with")
    inputs = inputs_of(model)
    with torch.no_grad():
        assert torch.equal(base(**inputs).last_hidden_state, model.bert(**inputs).last_hidden_state)
    base.save_pretrained(tmp_path / "without")
    other = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "without", num_labels=5)
    with torch.no_grad():
        ours, theirs = other.bert(**inputs), base(**inputs)
    assert torch.equal(ours.last_hidden_state, theirs.last_hidden_state)
    assert other.classifier.weight.isfinite().all()


def test_a_loaded_model_is_an_ordinary_one(shrunk, tmp_path, make_trainer):
    shrunk.save_pretrained(tmp_path / "first")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert not getattr(loaded, "is_quantized", False)
    assert loaded.half().dtype == torch.float16
    assert loaded.float().dtype == torch.float32
    make_trainer(loaded, train_dataset=samples(loaded)).train()
    loaded.save_pretrained(tmp_path / "second")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    assert torch.equal(logits_of(again), logits_of(loaded.eval()))


def test_it_is_pruned_again(shrunk, tmp_path):
    shrunk.save_pretrained(tmp_path / "first")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    before = loaded.num_parameters()
    prune(loaded, PruningConfig(sparsity=0.3, schedule="one_shot", granularity="head+neuron", multiple_of=4))
    shrink(loaded).save_pretrained(tmp_path / "second")
    assert loaded.num_parameters() < before
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    assert torch.equal(logits_of(again), logits_of(loaded))


def test_adapters_go_on_top(shrunk):
    peft = pytest.importorskip("peft")
    logits = logits_of(shrunk)
    adapted = peft.get_peft_model(shrunk, peft.LoraConfig(target_modules=["q_proj", "c_fc"]))
    assert torch.equal(logits_of(adapted), logits)
    merged = adapted.merge_and_unload()
    assert torch.allclose(logits_of(merged), logits, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt_neo", "gpt2", "llama", "gemma2", "t5", "bart", "whisper", "opt", "gpt_neox"])
@pytest.mark.parametrize("granularity", ["head+neuron", "layer"])
def test_it_generates_with_a_cache_as_without(name, granularity):
    if (name, granularity) in IMPOSSIBLE:
        return
    model = build(name)
    prune(model, config_of(granularity))
    shrink(model)
    inputs = {k: v for k, v in inputs_of(model).items() if not k.startswith("decoder_")}
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    assert torch.equal(
        model.generate(**inputs, **options, use_cache=True), model.generate(**inputs, **options, use_cache=False)
    )


class OwnConfig(QuantizationConfigMixin):
    """A method of somebody else."""

    def __init__(self):
        self.quant_method = "own"


QUANTIZATIONS = {
    "bitsandbytes": lambda: transformers.BitsAndBytesConfig(load_in_8bit=True),
    "quanto": lambda: transformers.QuantoConfig(weights="int8"),
    "own": OwnConfig,
}


@pytest.mark.parametrize("method", QUANTIZATIONS)
def test_a_method_on_top_is_an_error_that_says_what_to_do(method, shrunk, tmp_path):
    shrunk.save_pretrained(tmp_path / "shapes")
    model = build("bert")
    prune(model, PruningConfig(sparsity=0.8))
    save_pretrained(model, tmp_path / "compressed", compress=True)
    kind = type(QUANTIZATIONS[method]()).__name__
    match = (
        r"quantized with no method \(hf_prune has recorded shapes or compression in its place: load the model without "
        rf"quantization_config and quantize it then; or prune with uniform=True.*passing a {kind}"
    )
    for folder, auto in (("shapes", "AutoModelForCausalLM"), ("compressed", "AutoModelForSequenceClassification")):
        with pytest.raises(ValueError, match=match):
            getattr(transformers, auto).from_pretrained(tmp_path / folder, quantization_config=QUANTIZATIONS[method]())


def test_a_record_is_pickled_and_printed_by_its_own_name():
    record = Record({"a.weight": [2, 3]})
    assert pickle.loads(pickle.dumps(record)).to_dict() == record.to_dict()
    assert repr(record).startswith("Record {")


def test_what_is_pruned_evenly_is_quantized_as_any_other(tmp_path):
    """Its config is an ordinary one, so that Transformers gets as far as it does with a dense model."""
    model = build("llama")
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    model.save_pretrained(tmp_path / "dense")
    prune(model, config_of("neuron", uniform=True))
    shrink(model).save_pretrained(tmp_path / "even")
    assert shapes != {name: parameter.shape for name, parameter in model.named_parameters()}
    said = []
    for folder in ("dense", "even"):
        with pytest.raises((ImportError, RuntimeError, ValueError)) as caught:  # The method itself is not installed.
            transformers.AutoModelForCausalLM.from_pretrained(
                tmp_path / folder, quantization_config=transformers.QuantoConfig(weights="int8")
            )
        said.append((caught.type, str(caught.value)))
    assert said[0] == said[1]
    assert "hf_prune" not in said[0][1]


def change_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (  # Transformers raises, or, as 5.17 does, hands the weights on for us to see.
            lambda c: c["shapes"].update({"transformer.h.0.mlp.c_fc.weight": [4, 16]}),
            (RuntimeError, ValueError),
            r"mismatched_sizes|c_fc\.weight' has shape .* in the files, and \[4, 16\] in the model",
        ),
        (lambda c: c.update(shapes={"model.layers.0.mlp.up_proj.weight": [4, 16]}), ValueError, "of another model"),
        (lambda c: c["shapes"].update({"transformer.h.0.mlp.c_fc.weight": [4]}), ValueError, "of another model"),
        (lambda c: c["shapes"].update({"x": [0]}), ValueError, r"shape of 'x' must be positive whole numbers"),
        (lambda c: c["shapes"].update({"x": "y"}), ValueError, r"shape of 'x' must be positive whole numbers"),
        (lambda c: c["attributes"].update({"x": {"num_heads": "2"}}), ValueError, "must be positive whole numbers"),
        (lambda c: c["attributes"].update({"x": {"forward": 2}}), ValueError, "forward, which may not be set"),
        (
            lambda c: c["attributes"].update({"transformer.h.0.mlp": {"num_heads": 2}}),
            ValueError,
            "has no 'transformer.h.0.mlp.num_heads'",
        ),
        (lambda c: c.update(later=1), ValueError, "unknown key later.*newer version"),
    ],
)
def test_a_folder_whose_recorded_shapes_do_not_fit(shrunk, tmp_path, change, error, match):
    shrunk.save_pretrained(tmp_path)
    change_config(tmp_path, change)
    with pytest.raises(error, match=match):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_it_trains_with_gradient_checkpointing(shrunk, tmp_path, make_trainer):
    shrunk.save_pretrained(tmp_path / "shrunk")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "shrunk")
    make_trainer(loaded, train_dataset=samples(loaded), gradient_checkpointing=True).train()
    make_trainer(shrunk, train_dataset=samples(shrunk)).train()
    for ours, theirs in zip(loaded.parameters(), shrunk.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.slow
def test_it_trains_compiled(shrunk, tmp_path, make_trainer):
    shrunk.save_pretrained(tmp_path / "shrunk")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "shrunk")
    trainer = make_trainer(loaded, train_dataset=samples(loaded), torch_compile=True)
    trainer.train()
    with torch.no_grad():
        compiled = torch.compile(loaded.eval())(**inputs_of(loaded)).logits
    assert torch.allclose(compiled, logits_of(loaded), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("whisper", "WhisperForAudioClassification"),
        ("bart", "BartForCausalLM"),
        ("t5", "T5ForTokenClassification"),
        ("t5", "T5EncoderModel"),
        ("qwen3", "Qwen3ForQuestionAnswering"),
    ],
)
def test_it_loads_into_other_classes_of_its_family(name, other, tmp_path):
    model = build(name)
    prune(model, config_of("head+neuron"))
    shrink(model).save_pretrained(tmp_path)
    loaded = getattr(transformers, other).from_pretrained(tmp_path)
    ours = {parameter.shape for n, parameter in model.named_parameters() if "mlp" in n or "fc1" in n or ".wi" in n}
    theirs = {parameter.shape for n, parameter in loaded.named_parameters() if "mlp" in n or "fc1" in n or ".wi" in n}
    assert theirs <= ours


def test_a_family_that_was_described_keeps_what_it_counts(tmp_path, monkeypatch):
    family = families.FAMILIES["gpt_neo"]
    heads, neurons = family[0].parts
    counting = dataclasses.replace(heads, attributes=("num_heads", "embed_dim"))
    monkeypatch.setitem(families.FAMILIES, "gpt_neo", (dataclasses.replace(family[0], parts=(counting, neurons)),))
    model = build("gpt_neo")
    prune(model, config_of("head"))
    shrink(model).save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    widths = [layer.attn.attention.embed_dim for layer in model.transformer.h]
    assert [layer.attn.attention.embed_dim for layer in loaded.transformer.h] == widths != [16, 16, 16]


def test_the_config_of_a_shrunk_model_is_one_to_load_with(tmp_path):
    model = build("llama")
    prune(model, PruningConfig(sparsity=0.34, granularity="neuron", multiple_of=4))
    shrink(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path, config=model.config)
    assert (logits_of(loaded) - logits_of(model)).abs().max() < 1e-6
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path, config=loaded.config)
    assert (logits_of(again) - logits_of(model)).abs().max() < 1e-6


@pytest.mark.parametrize("granularity", ["head", "head+neuron"])
def test_prefix_tuning_goes_on_top_where_all_layers_have_as_many_heads(granularity):
    peft = pytest.importorskip("peft")
    model = build("llama")
    prune(model, PruningConfig(sparsity=0.5, granularity=granularity, uniform=True))
    shrink(model)
    adapted = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with torch.no_grad():
        assert adapted(**inputs_of(model)).logits.isfinite().all()
