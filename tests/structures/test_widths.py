"""Channels of the residual stream: masked, removed and loaded models give the same outputs, to the last digits."""

import pytest
import torch
import transformers

from hf_prune import PruningConfig, prune, shrink
from hf_prune.structures.finding import find_structures
from hf_prune.structures.groups import kept_in, nonzeros
from hf_prune.structures.norms import norm_of
from hf_prune.weights.targets import find_targets
from tests.structures.mixtures import build_mixture
from tests.structures.models import DECODER, GROUPED, MODELS, build, inputs_of, perturbed
from tests.structures.test_configs import llava
from tests.structures.test_loading import load_elsewhere, save
from tests.structures.test_shrinking import clip

ROPE = {"rope_theta": 1e4, "rope_type": "default"}
TWO = {**DECODER, "num_key_value_heads": 2}
TIED = {**GROUPED, "tie_word_embeddings": True}
EXPERTS = {**GROUPED, "num_experts_per_tok": 2}
MIXTURES = {
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**EXPERTS, num_local_experts=4)),
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**EXPERTS, num_experts=4, moe_intermediate_size=8)
    ),
    "gpt_oss": lambda: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(
            **EXPERTS, num_local_experts=4, rope_parameters={"rope_theta": 1e4, "rope_type": "default"}
        )
    ),
}
OTHERS = {
    "llama, tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TIED)),
    "llama, classes": lambda: transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**GROUPED)),
    "llama, no head": lambda: transformers.LlamaModel(transformers.LlamaConfig(**GROUPED)),
    "qwen2, width of heads not said": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TWO)),
    "qwen3, tied": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**TIED)),
    "olmo2": lambda: transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**GROUPED)),
    "granite": lambda: transformers.GraniteForCausalLM(transformers.GraniteConfig(**GROUPED)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**GROUPED)),
    "phi3": lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**GROUPED)),
    "t5, untied": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            **{"vocab_size": 60, "pad_token_id": 0, "decoder_start_token_id": 0, "num_layers": 2},
            **{"d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 4, "tie_word_embeddings": False},
        )
    ),
}
RMS = ("llama", "llama with biases", "mistral", "qwen2", "qwen3", "gemma", "gemma2")
EVERYTHING = {**{name: MODELS[name] for name in RMS}, **OTHERS, **MIXTURES}


def make(name, dtype=torch.float64):
    torch.manual_seed(0)
    model = perturbed(EVERYTHING[name]()).to(dtype)
    model.set_experts_implementation("eager") if name in MIXTURES else None
    return model


def width(granularity="width", sparsity=0.5, multiple_of=4, **fields):
    return PruningConfig(
        sparsity=sparsity, schedule="one_shot", granularity=granularity, multiple_of=multiple_of, **fields
    )


@torch.no_grad()
def outputs_of(model):
    found = model(**inputs_of(model))
    return found.logits if "logits" in found else found.last_hidden_state


@pytest.fixture
def exact(monkeypatch):
    """Norms, rotations and routers compute in float64 where the model does, and not in float32."""
    to = torch.Tensor.to

    def own(self, *args, **options):
        if self.dtype == torch.float64 and torch.float32 in (*args, *options.values()):
            return self
        return to(self, *args, **options)

    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.Tensor, "float", lambda self: own(self, torch.float32))
    monkeypatch.setattr(torch.Tensor, "to", own)
    monkeypatch.setattr(
        torch.nn.functional, "softmax", lambda x, dim=None, dtype=None, **_: softmax(x, dim).to(x.dtype)
    )


@pytest.mark.parametrize("name", EVERYTHING)
def test_masked_and_shrunk_and_loaded_models_give_the_same_outputs(name, exact, tmp_path):
    model = make(name)
    dense, parameters = outputs_of(model), model.num_parameters()
    report = prune(model, width())
    count = report.structures[0].total
    assert [(row.kind, row.zeros) for row in report.structures] == [("width", count // 2)]
    masked = outputs_of(model)
    assert (masked - dense).abs().max() > 1e-3
    if name == "llama, no head":
        masked = masked[..., (model.embed_tokens.weight != 0).any(0)]

    shrink(model)
    assert model.num_parameters() < 0.6 * parameters
    assert (outputs_of(model) - masked).abs().max() < 1e-10
    assert model.config.hidden_size == count // 2
    assert not hasattr(model.config, "quantization_config")

    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64).double()  # The angles of positions too.
    loaded.set_experts_implementation("eager") if name in MIXTURES else None
    assert (outputs_of(loaded) - masked).abs().max() < 1e-10


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("granularity", ["query+neuron+width", "head+width", "layer+width", "head+neuron+layer+width"])
def test_it_goes_with_other_kinds(name, granularity, exact):
    model = make(name)
    report = prune(model, width(granularity, multiple_of=12))
    assert {row.kind for row in report.structures if row.zeros} == set(granularity.split("+"))
    masked = outputs_of(model)
    shrink(model)
    assert (outputs_of(model) - masked).abs().max() < 1e-10


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3, tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_other_dtypes_it_is_equal_up_to_rounding(name, dtype):
    model = make(name, dtype)
    prune(model, width())
    masked = outputs_of(model).float()
    shrink(model)
    assert next(model.parameters()).dtype == dtype
    gap = (outputs_of(model).float() - masked).norm() / masked.norm()
    assert gap < (1e-5 if dtype == torch.float32 else 0.05)


def test_what_is_masked():
    model = make("llama, tied")
    prune(model, width())
    gone = (model.model.embed_tokens.weight == 0).all(0)
    assert gone.sum() == 12
    layer = model.model.layers[0]
    assert (layer.input_layernorm.weight == 0).tolist() == gone.tolist()
    assert (model.model.norm.weight == 0).tolist() == gone.tolist()
    for matrix in (layer.self_attn.q_proj, layer.mlp.gate_proj, layer.mlp.up_proj):
        assert (matrix.weight == 0).all(0).tolist() == gone.tolist()
    for matrix in (layer.self_attn.o_proj, layer.mlp.down_proj):
        assert (matrix.weight == 0).all(1).tolist() == gone.tolist()
    shrink(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.in_features == model.model.embed_tokens.embedding_dim == 12


def test_epsilon_grows_in_the_config_and_norms_of_other_widths_make_up_for_it():
    model = make("qwen3")
    norm, of_heads = model.model.norm, model.model.layers[0].self_attn.q_norm
    projection = model.model.layers[0].self_attn.q_proj
    prune(model, width(sparsity=1 / 3))
    before, weight = projection.weight.detach().clone(), norm.weight.detach().clone()
    kept = (model.model.embed_tokens.weight != 0).any(0)
    shrink(model)
    growth = 24 / 16
    assert model.config.rms_norm_eps == norm.variance_epsilon == of_heads.variance_epsilon == 1e-6 * growth
    assert torch.allclose(projection.weight, before[:, kept] * growth**0.5)
    assert torch.allclose(norm.weight, weight[kept] * growth**0.5)


def test_uniform_changes_nothing():
    plain, uniform = make("llama"), make("llama")
    prune(plain, width())
    prune(uniform, width(uniform=True))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), uniform.parameters(), strict=True))
    assert shrink(uniform).config.hidden_size == shrink(plain).config.hidden_size < make("llama").config.hidden_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixture_is_left_as_fused_kernels_read_it(dtype):
    model = build_mixture("mixtral", dtype, hidden_size=32, head_dim=8, intermediate_size=32)
    prune(model, PruningConfig(sparsity=0.375, granularity="width", multiple_of=1))
    shrink(model)
    assert model.config.hidden_size < 32
    assert model.config.hidden_size * dtype.itemsize % 16 == 0
    assert model(input_ids=torch.ones(1, 8, dtype=torch.long)).logits.isfinite().all()


def test_planted_channels_are_the_ones_that_go():
    model = make("llama")
    structures = find_structures(model, ("width",), find_targets(model), 4)
    group = structures["model.embed_tokens"]
    assert (group.count, group.counts_that_may_go()) == (24, [0, 4, 8, 12, 16, 20])
    gone = [1, 2, 5, 8, 9, 10, 13, 14, 15, 20, 21, 23]
    keep = torch.ones(24, dtype=torch.float64)
    keep[gone] = 1e-4
    with torch.no_grad():
        for member in group.members:
            member.parameter.mul_(member.along_axes(keep[member.owners]))
    prune(model, width())
    assert (~kept_in(structures, nonzeros(structures))["model.embed_tokens"]).nonzero().flatten().tolist() == gone


def test_a_part_of_another_model_is_an_error():
    model = llava(GROUPED)
    with pytest.raises(ValueError, match=r"is a part of a LlavaFor\w+, whose other parts hand it what is as wide"):
        prune(model.model.language_model, width())


@pytest.mark.parametrize("cache", [None, "static"])
def test_it_generates(cache):
    model = make("llama", torch.float32)
    prune(model, width("query+neuron+width"))
    shrink(model)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    tokens = inputs_of(model)["input_ids"]
    plain = model.generate(tokens, **options, use_cache=False)
    assert torch.equal(model.generate(tokens, **options, cache_implementation=cache), plain)


@pytest.mark.slow
def test_it_loads_where_hf_prune_is_not_installed(tmp_path):
    expected = {}
    for name in ("llama", "gemma2", "qwen3, tied", "qwen2, width of heads not said", "olmo2", "t5, untied"):
        for granularity in ("width", "query+neuron+width") if name in ("llama", "gemma2") else ("width",):
            model = make(name, torch.float32)
            prune(model, width(granularity, scope="auto" if granularity == "width" else "layer"))
            folder = tmp_path / f"{name} {granularity}"
            expected[folder] = save(shrink(model), folder)
    load_elsewhere(tmp_path, plain=True)
    for folder, logits in expected.items():
        assert torch.equal(torch.load(folder / "logits.pt"), logits), folder.name


# What cannot be


def with_own_module():
    model = build("llama")
    model.probe = torch.nn.Linear(24, 3)
    return model


def with_heads_of_no_width():
    return transformers.OlmoForCausalLM(transformers.OlmoConfig(**DECODER))


@pytest.mark.parametrize(
    ("model", "config", "match"),
    [
        (lambda: build("gpt2"), width(), r"'transformer\.h\.0\.ln_1' subtracts the mean over all channels.*RMS norms"),
        (lambda: build("bert"), width(), r"LayerNorm' subtracts the mean over all channels"),
        (lambda: build("vit"), width(), r"layernorm_before' subtracts the mean"),
        (
            lambda: build("t5"),
            width(),
            r"cannot be removed from T5For.*: a small model of this class without some of them fails \(relative",
        ),
        (with_heads_of_no_width, width(), "has no RMS norms over its residual stream. Choose granularity head"),
        (
            lambda: transformers.GemmaModel(transformers.GemmaConfig(**GROUPED)),
            width(),
            "lacks the head that is tied to them and would be scaled too",
        ),
        (
            lambda: transformers.PixtralVisionModel(
                transformers.PixtralVisionConfig(
                    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4},
                    **{"image_size": 8, "patch_size": 4},
                )
            ),
            width(),
            "PixtralVisionModel has no embeddings as wide as its config says in hidden_size",
        ),
        (clip, width(), "the config of CLIPModel does not say in hidden_size how wide it is"),
        (
            lambda: transformers.JetMoeForCausalLM(
                transformers.JetMoeConfig(
                    **{"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_key_value_heads": 2},
                    **{"kv_channels": 4, "intermediate_size": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
                )
            ),
            width(),
            r"no field of the config alone says the ε of 'model\.layers\.0\.input_layernorm' \(1e-06\)",
        ),
        (with_own_module, width(), r"has 'probe\.weight', which its config does not build"),
        (
            lambda: build("llama"),
            width(exclude_modules=["q_proj"]),
            r"q_proj\.weight' is no target\. Leave target_mod",
        ),
        (
            lambda: build("llama"),
            width(sparsity=1 / 3, multiple_of=8),
            r"no config of LlamaForCausalLM can say hidden_size=16: .* Choose another sparsity or multiple_of",
        ),
        (lambda: build("llama"), width(sparsity=0.95), r"remove 23 of the 24 widths in 'model.embed_tokens', and at"),
        (
            lambda: transformers.DiffLlamaForCausalLM(transformers.DiffLlamaConfig(**DECODER)),
            width(),
            r"a small model .*groupnorm' has its ε from 'rms_norm_eps' .* is fed by no projection",
        ),
        (
            lambda: transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**TWO)),
            width(),
            r"k_norm\.weight' of Olmoe.* depends on hidden_size \(8 at 16, 16 at 32\) in a way that cannot be kept",
        ),
        (lambda: torch.nn.Linear(4, 4), width(), "widths are those of a Transformers model, got Linear"),
        (
            lambda: transformers.ResNetForImageClassification(transformers.ResNetConfig(hidden_sizes=[8], depths=[1])),
            width(),
            "convolutional network and has no widths that are known",
        ),
    ],
)
def test_what_cannot_be_is_an_error_before_anything_is_touched(model, config, match):
    model = model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        prune(model, config)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"scope": "layer"}, "scope must be one of auto with granularity 'width'"),
        ({"layer_sparsity": {".*": 0.3}}, "layer_sparsity does not apply to granularity 'width': all widths are one"),
    ],
)
def test_a_config_that_contradicts_itself(fields, match):
    with pytest.raises(ValueError, match=match):
        width(**fields)


class Norm(torch.nn.Module):
    """`(shift + w) · x / √(mean(x²) + ε)`, of which a test spoils something."""

    def __init__(self, eps=1e-5, shift=0, power=1.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(8))
        self.epsilon, self.shift, self.power, self.other = eps, shift, power, 0.1

    def forward(self, x):
        eps = self.epsilon or 1e-5
        return (self.weight + self.shift) ** self.power * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def test_norms_are_told_by_what_they_compute():
    for shift in (0, 1):
        found = norm_of("norm", Norm(shift=shift), 8)
        assert (found[0].shift, found[1]) == (shift, "epsilon")
    for other in (torch.nn.Dropout(), torch.nn.Bilinear(8, 8, 2)):
        assert norm_of("other", other, 8) is None
    with pytest.raises(ValueError, match="'norm' is a norm over all channels, and not x"):
        norm_of("norm", Norm(power=2.0), 8)
    with pytest.raises(ValueError, match="by an ε that is known"):
        norm_of("norm", Norm(eps=None), 8)
    with pytest.raises(ValueError, match="subtracts the mean"):
        norm_of("norm", torch.nn.LayerNorm(8), 8)
