import logging

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from hf_prune.weights.body import in_body
from hf_prune.weights.targets import Target, find_targets
from tests.tiny import FAMILIES, build

# Written by hand from the printed models: what the default targets are, by the end of their names.
EXPECTED = {
    "gpt2": {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"},
    "gpt_neo": {"attention.k_proj", "attention.v_proj", "attention.q_proj", "attention.out_proj"}
    | {"mlp.c_fc", "mlp.c_proj"},
    "bert": {"self.query", "self.key", "self.value", "output.dense", "intermediate.dense"},
    "vit": {"attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2"},
    "llama": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
    | {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"},
    "t5": {"SelfAttention.q", "SelfAttention.k", "SelfAttention.v", "SelfAttention.o"}
    | {"EncDecAttention.q", "EncDecAttention.k", "EncDecAttention.v", "EncDecAttention.o"}
    | {"DenseReluDense.wi", "DenseReluDense.wo"},
    "resnet": {"0.convolution", "1.convolution", "shortcut.convolution"},
    "convnext": {"0.dwconv", "0.pwconv1", "0.pwconv2", "downsampling_layer.1"},
    "mixtral": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
    | {"experts.gate_up_proj", "experts.down_proj"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_default_targets_are_the_body(family):
    model = build(family)
    targets = find_targets(model)
    assert {".".join(target.module.split(".")[-2:]) for target in targets.values()} == EXPECTED[family]
    for name, target in targets.items():
        assert model.get_parameter(name) is target.weight


def test_layouts_put_the_input_last():
    gpt2, llama = find_targets(build("gpt2")), find_targets(build("llama"))
    fc = gpt2["transformer.h.0.mlp.c_fc.weight"]
    assert (fc.in_features, fc.out_features) == (16, 64)  # Conv1D stores [in, out].
    down = llama["model.layers.0.mlp.down_proj.weight"]
    assert (down.in_features, down.out_features) == (32, 16)
    experts = find_targets(build("mixtral"))["model.layers.0.mlp.experts.gate_up_proj"]
    assert (experts.in_features, experts.out_features) == (16, 64)


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_go_there_and_back(family):
    for target in find_targets(build(family)).values():
        matrix = target.to_matrix(target.weight)
        assert matrix.shape == (target.weight.numel() // target.in_features, target.in_features)
        assert torch.equal(target.from_matrix(matrix), target.weight)


def test_the_matrix_of_a_linear_layer_computes_what_the_layer_does():
    gpt2 = build("gpt2")
    layer, x = gpt2.transformer.h[0].mlp.c_fc, torch.randn(3, 16)
    matrix = find_targets(gpt2)["transformer.h.0.mlp.c_fc.weight"].to_matrix(layer.weight)
    torch.testing.assert_close(layer(x), x @ matrix.T + layer.bias)


def test_transposed_experts():
    def experts(family: str, config: transformers.PretrainedConfig) -> Target:
        return next(t for name, t in find_targets(family(config)).items() if name.endswith("experts.gate_up_proj"))

    sizes = dict(vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    sizes |= dict(num_key_value_heads=1, num_local_experts=2, head_dim=8, pad_token_id=0)
    gpt_oss = experts(transformers.GptOssForCausalLM, transformers.GptOssConfig(**sizes))
    assert (gpt_oss.in_features, gpt_oss.out_features) == (16, 48)
    llama4 = experts(
        transformers.Llama4ForCausalLM, transformers.Llama4TextConfig(**sizes, interleave_moe_layer_step=1)
    )
    assert (llama4.in_features, llama4.out_features) == (16, 48)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("Qwen2MoeForCausalLM", dict(shared_expert_intermediate_size=16, moe_intermediate_size=16, num_experts=2)),
        ("SwitchTransformersForConditionalGeneration", dict(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)),
    ],
)
def test_routers_are_not_targets(family, config):
    cls = getattr(transformers, family)
    common = dict(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    model = cls(cls.config_class(**{**common, **config}))
    names = list(find_targets(model))
    assert any("expert" in name for name in names)
    assert not any("router" in name or name.endswith(("gate.weight", "expert_gate.weight")) for name in names)


def test_tied_linear_layers_are_targets_once_or_not_at_all():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight
            self.lm_head = nn.Linear(4, 4)
            self.lm_head.weight = self.c.weight

    assert list(find_targets(Tied())) == ["a.weight"]


def test_a_named_head_is_pruned_unless_it_is_tied(caplog):
    assert list(find_targets(build("bert"), ["classifier"])) == ["classifier.weight"]
    gpt2 = build("gpt2")
    gpt2.lm_head.weight = gpt2.transformer.wte.weight
    with caplog.at_level(logging.WARNING):
        assert "lm_head.weight" not in find_targets(gpt2, ".*")
    assert "lm_head.weight is not pruned: it is tied to transformer.wte.weight" in caplog.text
    with pytest.raises(ValueError, match="no parameter of GPT2LMHeadModel is left to prune"):
        find_targets(gpt2, ["lm_head"])


def test_target_words_are_pefts():
    model = build("llama")
    names = list(find_targets(model, r".*\.0\..*q_proj"))
    assert names == ["model.layers.0.self_attn.q_proj.weight"]
    assert names == list(find_targets(model, ["model.layers.0.self_attn.q_proj"]))
    assert names == list(find_targets(model, [r".*\.0\..*q_proj"]))  # one pattern on a command line
    assert len(find_targets(model, ["q_proj", "v_proj"])) == 4
    assert (
        not find_targets(model, ["q_proj", "v_proj"]).keys() & find_targets(model, None, ["q_proj", "v_proj"]).keys()
    )
    assert list(find_targets(build("mixtral"), ["experts"])) == [
        f"model.layers.{i}.mlp.experts.{weight}" for i in (0, 1) for weight in ("gate_up_proj", "down_proj")
    ]


@pytest.mark.parametrize("option", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize("patterns", ["nothing.*", ["nothing"], ["q_proj", "nothing"]])
def test_a_pattern_that_matches_nothing_is_an_error(option, patterns):
    with pytest.raises(ValueError, match=rf"{option}='nothing.*matches no prunable module of LlamaForCausalLM"):
        find_targets(build("llama"), **{option: patterns})


def test_a_prefix_of_a_name_is_not_a_match():
    with pytest.raises(ValueError, match="matches no prunable module"):
        find_targets(build("llama"), ["proj"])


def test_a_model_without_prunable_weights_is_an_error():
    with pytest.raises(ValueError, match="no parameter of Embedding is left to prune"):
        find_targets(nn.Embedding(4, 4))


def test_experts_that_fsdp2_has_sharded_by_themselves_are_read_as_before():
    class Llama4TextExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(2, 4, 6))

    class FSDPLlama4TextExperts(Llama4TextExperts):  # Such a class FSDP2 makes.
        pass

    for kind in (Llama4TextExperts, FSDPLlama4TextExperts):
        assert find_targets(nn.ModuleDict({"experts": kind()}))["experts.gate_up_proj"].axes == (0, 2, 1)


class DeepSpeedEngine(nn.Module):
    """Of its name; with DeepSpeed itself nothing is pruned by hand here."""


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: DeepSpeedEngine()], ids=["torch", "deepspeed"])
def test_wrapped_models_are_refused(wrap):
    with pytest.raises(ValueError, match=r"wraps a model, .* accelerator\.unwrap_model\(model\)"):
        find_targets(wrap(build("llama")))


def test_quantized_models_are_refused():
    model = build("llama")
    model.is_quantized = True
    with pytest.raises(ValueError, match="LlamaForCausalLM are quantized"):
        find_targets(model)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantized_weights_are_refused(dtype):
    # As bitsandbytes does: a Linear whose weight is a parameter of integers, or of eight bits.
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(torch.zeros(4, 4).to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match=f"the weight of '1' is quantized .dtype {dtype}"):
        find_targets(model)
    assert list(find_targets(model, exclude_modules=["1"])) == ["0.weight"]


def test_weights_that_are_computed_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    torch_prune.l1_unstructured(model[1], "weight", 0.5)
    with pytest.raises(ValueError, match="the weight of '1' is computed from other parameters"):
        find_targets(model)
    torch_prune.remove(model[1], "weight")
    assert len(find_targets(model)) == 2
    parametrizations.weight_norm(model[0])
    with pytest.raises(ValueError, match="the weight of '0' is computed from other parameters"):
        find_targets(model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_under_peft_the_targets_are_those_of_the_base_model(family):
    peft = pytest.importorskip("peft")
    plain = find_targets(build(family))
    base = build(family)
    last = {target.module.rpartition(".")[2] for target in plain.values()}
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=sorted(last - {"dense"})[:2], lora_dropout=0.1))
    targets = find_targets(model)
    assert [target.module.removeprefix("base_model.model.") for target in targets.values()] == [
        target.module for target in plain.values()
    ]
    assert any("base_layer" in name for name in targets)
    assert not any("lora" in name for name in targets)
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(targets.values(), plain.values(), strict=True))
    chosen = sorted(last - {"dense"})[0]
    assert find_targets(model, [chosen]).keys() == {n for n, t in targets.items() if t.module.endswith(f".{chosen}")}


def test_a_layer_that_is_called_as_peft_calls_one_is_no_adapter():
    class Aggregation(nn.Module):  # As in DLA.
        def __init__(self):
            super().__init__()
            self.base_layer, self.level = nn.Linear(4, 4), nn.Linear(4, 4)

    assert list(find_targets(Aggregation())) == ["base_layer.weight", "level.weight"]


def test_encoders_of_prompts_are_no_targets():
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=16
    )
    model = peft.get_peft_model(build("llama"), config)
    assert any(name.startswith("prompt_encoder") for name, _ in model.named_parameters())
    assert len(find_targets(model)) == len(find_targets(build("llama")))


def test_experts_with_a_child_that_is_called_expert_are_targets():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.ones(2, 8, 4))
            self.post_expert_norm = nn.LayerNorm(4)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.experts = nn.Linear(4, 2), Experts()

    assert list(find_targets(Block())) == ["experts.gate_up_proj"]


@pytest.mark.parametrize(
    ("name", "is_target"),
    [
        ("fc", False),
        ("mask_head.0", False),
        ("class_predictor", False),
        ("conv_stem.conv", False),
        ("encoder.patch_embeddings.0.proj", False),
        ("audio_embed.encoder.layers.0.fc", True),
        ("blocks.0.fc", True),
        ("decoder.bbox_embed.0.layers.2", False),
        ("decoder.class_embed.0", False),
        ("decoder.output_projection", False),
        ("predict_action.0", False),
        ("vision_tower.patch_conv", False),
        ("text_projection", True),
        ("vision_projection.linear_1", True),
    ],
)
def test_heads_and_embeddings_by_name(name, is_target):
    model = nn.Sequential()
    model.add_module("body", nn.Linear(4, 4))
    *parents, last = name.split(".")
    place = model
    for parent in parents:
        place.add_module(parent, nn.Module())
        place = place.get_submodule(parent)
    place.add_module(last, nn.Linear(4, 4))
    assert (f"{name}.weight" in find_targets(model)) == is_target


# Models by their class, with what they compute their outputs with.
OUTPUTS = {
    "CLIPModel": {"visual_projection", "text_projection"},
    "CLIPTextModelWithProjection": {"text_projection"},
    "CLIPVisionModelWithProjection": {"visual_projection"},
    "ClapModel": {"text_projection.linear2", "audio_projection.linear2"},
    "AlignModel": {"text_projection"},
    "Blip2ForImageTextRetrieval": {"vision_projection", "text_projection", "itm_head"},
    "OwlViTForObjectDetection": {"class_head.dense0", "box_head.dense2", "owlvit.visual_projection"},
    "BertForPreTraining": {"cls.predictions.decoder", "cls.seq_relationship"},
    "BertForQuestionAnswering": {"qa_outputs"},
    "BertForMultipleChoice": {"classifier"},
    "DistilBertForMaskedLM": {"vocab_projector", "vocab_transform"},
    "RobertaForSequenceClassification": {"classifier.dense", "classifier.out_proj"},
    "BartForSequenceClassification": {"classification_head.dense", "classification_head.out_proj"},
    "WhisperForConditionalGeneration": {"proj_out"},
    "T5ForTokenClassification": {"classifier"},
    "GPT2DoubleHeadsModel": {"lm_head", "multiple_choice_head.summary"},
    "ElectraForPreTraining": {"discriminator_predictions.dense_prediction"},
    "FSMTForConditionalGeneration": {"model.decoder.output_projection"},
    "DecisionTransformerModel": {"predict_action.0", "predict_return", "predict_state"},
    "YolosForObjectDetection": {"class_labels_classifier", "bbox_predictor.layers.2"},
    "SegformerForSemanticSegmentation": {"decode_head.classifier"},
    "DPTForDepthEstimation": {"head.head.0"},
    "RTDetrForObjectDetection": {"model.decoder.bbox_embed.0.layers.2", "model.enc_score_head"},
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_what_computes_the_outputs_is_no_target(kind):
    cls = getattr(transformers, kind)
    with torch.device("meta"), no_init_weights():
        model = cls(cls.config_class())
    left = {name for name, module in model.named_modules() if name and not in_body(model, name)}
    assert left >= OUTPUTS[kind]
    kinds = (nn.Linear, nn.Conv2d, Conv1D)
    assert any(in_body(model, name) for name, module in model.named_modules() if isinstance(module, kinds))


def test_what_reads_a_projection_is_body():
    """Projections into a language model are inside of the model, and not what it gives."""
    with torch.device("meta"), no_init_weights():
        model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig())
    assert in_body(model, "model.multi_modal_projector.linear_1")


def test_weights_that_are_not_in_memory_are_an_error():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"not in memory \(meta device\).* Load the model whole"):
        find_targets(model)
