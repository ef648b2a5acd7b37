"""The structures that a config prunes, and what it cannot."""

import peft
import pytest
import torch
import transformers
from torch import nn

from hf_prune import PruningConfig, PruningTrainerCallback, describe_family, prune, shrink, sparsity_report
from hf_prune.structures.families import FAMILIES, Heads, Neurons, Stack
from tests.structures import test_channels
from tests.structures.models import DECODER, GROUPED, build, logits_of, perturbed
from tests.structures.test_shrinking import config_of
from tests.structures.test_training import samples


def test_a_family_that_is_unknown():
    model = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=8, hidden_size=8, state_size=2, num_hidden_layers=1)
    )
    with pytest.raises(
        ValueError, match=r"does not know where the family 'mamba' has its.* It knows gpt_neo,.*describe_family"
    ):
        prune(model, config_of("head"))


def test_a_user_describes_a_family():
    model = perturbed(transformers.OlmoForCausalLM(transformers.OlmoConfig(**DECODER)))
    describe_family(
        "olmo",
        Stack(
            "layers",
            (
                Heads("self_attn", {"q_proj": 1, "k_proj": 1, "v_proj": 1}, "o_proj"),
                Neurons("mlp", {"gate_proj": 1, "up_proj": 1}, "down_proj", fields=("intermediate_size",)),
            ),
        ),
    )
    try:
        prune(model, config_of("head+neuron"))
        masked = logits_of(model)
        shrink(model)
        assert (logits_of(model) - masked).abs().max() < 1e-5
    finally:
        del FAMILIES["olmo"]


def test_a_description_that_is_none():
    with pytest.raises(TypeError, match="described by Stacks, got str"):
        describe_family("my_model", "layers")


def test_a_family_that_looks_otherwise(monkeypatch):
    monkeypatch.setitem(FAMILIES, "llama", (Stack("layers", (Neurons("mlp", {"up": 1}, "down"),)),))
    with pytest.raises(ValueError, match="has no neurons where this family has them"):
        prune(build("llama"), config_of("neuron"))
    monkeypatch.setitem(FAMILIES, "llama", (Stack("blocks", ()),))
    with pytest.raises(ValueError, match=r"has no layers where the family 'llama' has them \(blocks\)"):
        prune(build("llama"), config_of("neuron"))


def test_a_model_that_is_not_of_transformers():
    with pytest.raises(ValueError, match="those of a Transformers model, got Sequential"):
        prune(nn.Sequential(nn.Linear(4, 4)), config_of("head"))


def test_key_value_heads_that_do_not_divide_the_heads():
    model = build("llama")
    layer = model.model.layers[1].self_attn
    layer.q_proj = nn.Linear(24, 28, bias=False)
    layer.o_proj = nn.Linear(28, 24, bias=False)
    with pytest.raises(
        ValueError, match=r"self_attn.* is 28 wide, for 7 heads of width 4, which 3 key-value heads do not"
    ):
        prune(model, config_of("head"))


def test_layers_that_share_weights():
    model = build("llama")
    model.model.layers[2].mlp = model.model.layers[0].mlp
    with pytest.raises(ValueError, match="are one tensor"):
        prune(model, config_of("neuron"))


@pytest.mark.parametrize("granularity", ["head", "head+neuron", "layer"])
def test_a_sparsity_that_would_empty_a_layer(granularity):
    with pytest.raises(ValueError, match=r"a sparsity of 0.97 would remove .* must stay in each place"):
        prune(build("gpt_neo"), config_of(granularity, sparsity=0.97))


def test_a_later_round_that_would_empty_a_layer_is_an_error_at_once(make_trainer):
    from hf_prune import PruningTrainerCallback
    from tests.structures.test_training import samples

    model = build("gpt_neo")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = PruningConfig(sparsities=[0.25, 0.97], granularity="head")
    with pytest.raises(ValueError, match="would remove"):
        make_trainer(model, PruningTrainerCallback(config), train_dataset=samples(model)).train()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_with_adapters():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="carries adapters"):
        prune(model, config_of("head"))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"granularity": "head", "scope": "row"}, "scope must be one of auto, global, layer with granularity 'head'"),
        ({"granularity": "head", "scope": "owl"}, "scope must be one of auto, global, layer"),
        ({"granularity": "layer", "scope": "global"}, "scope must be one of auto with granularity 'layer'"),
        (
            {"granularity": "head", "scope": "global", "uniform": True},
            "scope must be one of auto, layer with .* and uniform",
        ),
        ({"granularity": "layer", "layer_sparsity": {".*": 0.1}}, "all layers are one pool"),
        (
            {"granularity": "head", "uniform": True, "layer_sparsity": {".*": 0.1}},
            "layer_sparsity contradicts uniform",
        ),
        ({"granularity": "neuron", "multiple_of": 0}, "multiple_of must be at least 1, got 0"),
        ({"multiple_of": 4}, "multiple_of is about structures, and granularity 'unstructured' has none"),
        (
            {"granularity": "head", "multiple_of": 4},
            "multiple_of is about neurons, channels, widths, and granularity 'head'",
        ),
        ({"uniform": True}, "uniform is about structures"),
        ({"granularity": "2:4", "sparsity": None, "shrink_at_end": False}, "shrink_at_end is about structures"),
        ({"granularity": "head", "criterion": "sparsegpt"}, "sparsegpt chooses weights one by one"),
        ({"granularity": "heads"}, "or one or several of head, neuron, .* joined by .*; got 'heads'"),
    ],
)
def test_a_config_that_contradicts_itself(fields, match):
    with pytest.raises(ValueError, match=match):
        PruningConfig(**{"sparsity": 0.5, **fields})


def test_a_pattern_of_layer_sparsity_that_matches_no_place():
    with pytest.raises(ValueError, match=r"matches none of the places of structures, such as 'model"):
        prune(build("llama"), config_of("head", layer_sparsity={"mlp": 0.5}))


def test_a_place_has_its_own_sparsity():
    report = prune(build("llama"), config_of("neuron", layer_sparsity={r".*layers\.0\..*": 0.0}))
    assert report.structures[0].zeros == 0
    assert sum(row.zeros for row in report.structures) == 24


def test_what_is_excluded_is_left_alone():
    model = build("llama")
    report = prune(model, config_of("head+neuron", exclude_modules=[r".*layers\.1\.self_attn.*", "down_proj"]))
    assert [row.name for row in report.structures] == ["model.layers.0.self_attn", "model.layers.2.self_attn"]


def test_zeros_are_held_as_whole_structures():
    model = build("llama")
    prune(model, config_of("head", sparsity=1 / 3))
    again = prune(model, config_of("head", sparsity=2 / 3, hold_zeros=True))
    assert sum(row.zeros for row in again.structures) == 6
    prune(model, PruningConfig(sparsity=0.9, schedule="one_shot"))
    with pytest.raises(ValueError, match="are not whole heads"):
        prune(model, config_of("head", sparsity=2 / 3, hold_zeros=True))


def test_the_report_counts_structures():
    model = build("gpt_neo")
    report = prune(model, config_of("head+neuron"))
    assert report.sparsity == 0.5
    assert report.units == "heads and neurons"
    assert [(row.kind, row.total) for row in report.structures] == [("head", 4), ("neuron", 64)] * 3
    assert "all heads and neurons" in str(report)
    assert report.to_dict()["structures"][0]["kind"] == "head"
    assert sparsity_report(model, config_of("head+neuron")).sparsity == 0.5


@pytest.mark.parametrize("criterion", ["taylor", "fisher", "snip", "wanda", "random", "lamp"])
def test_criteria_that_look_at_data_choose_structures_too(criterion):
    from tests.structures.test_training import samples

    model = build("llama")
    rows = samples(model, 8)
    batches = [{k: torch.stack([row[k] for row in rows[i : i + 4]]) for k in rows[0]} for i in (0, 4)]
    config = config_of("head+neuron", criterion=criterion, score_steps=2, calibration_samples=8)
    report = prune(model, config, batches)
    assert report.sparsity == pytest.approx(0.5, abs=0.05)
    masked = logits_of(model)
    shrink(model)
    assert (logits_of(model) - masked).abs().max() < 1e-5


def test_grouped_queries_go_with_their_keys():
    model = build("llama")
    prune(model, config_of("head", sparsity=1 / 3, scope="layer"))
    shrink(model)
    attention = model.model.layers[0].self_attn
    assert (attention.q_proj.out_features, attention.k_proj.out_features) == (32, 8)
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (8, 2)
    assert GROUPED["num_attention_heads"] == 12


def test_a_number_of_heads_that_no_config_can_say():
    """A config of Llama wants the hidden size to be a multiple of the number of heads."""
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**DECODER, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 4})
    )
    with pytest.raises(ValueError, match=r"can say num_attention_heads=5, num_key_value_heads=5, head_dim=4. Choose"):
        prune(model, config_of("head", sparsity=3 / 8, uniform=True))
    prune(model, config_of("head", sparsity=3 / 8, scope="layer"))
    masked = logits_of(model.eval())
    shrink(model)
    assert (logits_of(model) - masked).abs().max() < 1e-5
    assert model.config.num_attention_heads == 8


def test_a_vision_transformer_with_a_convolution_is_no_convolutional_network():
    config = transformers.BeitConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
    )
    model = transformers.BeitForImageClassification(config)
    match = r"'beit\..*' is an attention layer\. Choose granularity head, neuron"
    with pytest.raises(ValueError, match=match):
        prune(model, PruningConfig(sparsity=0.5, granularity="channel"))


def test_a_report_does_not_judge_the_config():
    model = build("gpt_neo")
    config = config_of("head", sparsity=0.75)
    prune(model, config)
    shrink(model)
    assert sparsity_report(model, config).sparsity == 0


def test_uniform_with_nothing_to_prune():
    model = build("llama")
    prune(model, config_of("neuron"))
    report = prune(model, PruningConfig(granularity="neuron", hold_zeros=True, uniform=True))
    assert report.sparsity == 0.5


@pytest.mark.parametrize(
    ("part", "match"),
    [
        (
            Heads("self_attn", {"q_proj": 1, "k_proj": 1, "v_proj": 1}, "o_proj", size="nothing"),
            r"'model\.layers\.0\.self_attn\.nothing' is taken for the width of a head, and is None",
        ),
        (
            Neurons("", {"mlp": 1}, "self_attn"),
            r"'model\.layers\.0\.self_attn' is described as a projection, and is a Ol",
        ),
    ],
)
def test_a_description_that_is_wrong(monkeypatch, part, match):
    monkeypatch.setitem(FAMILIES, "olmo", (Stack("layers", (part,)),))
    model = transformers.OlmoForCausalLM(transformers.OlmoConfig(**DECODER))
    with pytest.raises(ValueError, match=match):
        prune(model, PruningConfig(sparsity=0.5, granularity=part.kind))


class Around(nn.Module):
    """A model of somebody's own with one of Transformers in it, as a Trainer takes it."""

    def __init__(self, inner):
        super().__init__()
        self.part = nn.ModuleDict({"inner": inner})

    def forward(self, **batch):
        return self.part["inner"](**batch)


@pytest.mark.parametrize(
    ("family", "granularity"),
    [("bert", "head+neuron"), ("gpt_neo", "layer"), ("resnet", "channel"), ("bert", "channel")],
)
@pytest.mark.parametrize("how", ["prune", "train"])
def test_a_model_inside_of_another_is_named(family, granularity, how, make_trainer):
    inner = test_channels.build(family) if family == "resnet" else build(family)
    model, config = Around(inner), PruningConfig(sparsity=0.5, granularity=granularity)
    match = rf"It contains a {type(inner).__name__} at model\.part\.inner: pass that one\. To train the whole"
    trainer = make_trainer(model, PruningTrainerCallback(config), train_dataset=samples(inner))
    with pytest.raises(ValueError, match=match):
        prune(model, config) if how == "prune" else trainer.train()


def test_what_is_done_with_a_model_inside_of_another(make_trainer):
    """What the message says: it is pruned and made smaller first, and trained with what is around it."""
    model = Around(build("bert"))
    prune(model.part.inner, PruningConfig(sparsity=0.5, granularity="neuron", multiple_of=4))
    shrink(model.part.inner)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    make_trainer(model, train_dataset=samples(model.part.inner), max_steps=2, remove_unused_columns=False).train()
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == shapes


@pytest.mark.parametrize("granularity", ["layer", "head", "neuron", "width"])
@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_one_side_of_an_encoder_decoder(side, granularity):
    """Of mT5 each has a copy of the config, of which nothing is saved."""
    config = transformers.MT5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)
    model = transformers.MT5ForConditionalGeneration(config)
    match = (
        r"this MT5Stack is one side of a MT5ForConditionalGeneration, .* Prune the whole\. What is to stay is named"
    )
    with pytest.raises(ValueError, match=match):
        prune(getattr(model, side), PruningConfig(sparsity=0.5, granularity=granularity))
    prune(model, PruningConfig(sparsity=0.5, granularity="neuron", exclude_modules=r"decoder\..*"))
    shrink(model)
    assert model.encoder.block[0].layer[1].DenseReluDense.wo.in_features < 24
    assert model.decoder.block[0].layer[2].DenseReluDense.wo.in_features == 24


@pytest.mark.parametrize("granularity", ["neuron", "layer"])
def test_adapters_that_came_after_the_cut(granularity):
    model = build("llama")
    prune(model, PruningConfig(sparsity=0.34, granularity=granularity))
    # As `add_adapter` of Transformers, which may ask for a peft that is not out yet.
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), model)
    with pytest.raises(ValueError, match=r"this LlamaForCausalLM carries adapters, .* Merge them first"):
        shrink(model)


@pytest.mark.parametrize("granularity", ["head", "channel"])
def test_a_model_with_none_inside_of_it(granularity):
    with pytest.raises(ValueError, match=r"It contains no Transformers model\. Choose granularity unstructured"):
        prune(nn.Sequential(nn.Linear(8, 8)), PruningConfig(sparsity=0.5, granularity=granularity))


def test_channels_of_a_model_of_text():
    config = transformers.MambaConfig(vocab_size=8, hidden_size=8, state_size=2, num_hidden_layers=1)
    match = r"MambaForCausalLM is no .*: it takes no images, or has no Conv2d\. Choose granularity head"
    with pytest.raises(ValueError, match=match):
        prune(transformers.MambaForCausalLM(config), PruningConfig(sparsity=0.5, granularity="channel"))
