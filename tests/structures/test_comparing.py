"""A model that would compute something else without its structures, or after loading, keeps them."""

import copy
import logging

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from hf_prune import Heads, MaskSet, Neurons, PruningConfig, PruningTrainerCallback, Stack, prune, shrink
from hf_prune.structures import comparing
from hf_prune.structures.comparing import Differs, Reference
from hf_prune.structures.families import FAMILIES
from tests.structures.models import DECODER, GROUPED, build, inputs_of, logits_of, perturbed
from tests.structures.test_training import samples

HEADS = Heads("self_attn", {"q_proj": 1, "k_proj": 1, "v_proj": 1}, "o_proj")
NEURONS = Neurons("mlp", {"gate_proj": 1, "up_proj": 1}, "down_proj")
LAYERS = {**DECODER, "num_hidden_layers": 4}


def stablelm():
    """Its norms of queries and keys are one for each head, in a list that goes by heads."""
    return transformers.StableLmForCausalLM(
        transformers.StableLmConfig(**DECODER, num_key_value_heads=4, qk_layernorm=True)
    )


def olmo2():
    """Its norms of queries and keys are as wide as all heads."""
    return transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**DECODER))


def moe_with_a_dense_layer():
    """Its config says which layers have no experts in a way that hf_prune does not know."""
    config = transformers.DeepseekV3Config(
        **{**LAYERS, "num_attention_heads": 2}, num_key_value_heads=2, moe_intermediate_size=8, n_routed_experts=4,
        num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8,
        qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config)


def bloom():
    """Its heads have slopes that go by their number, and that its config makes."""
    return transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=60, hidden_size=16, n_layer=2, n_head=4))


BLOOM_HEADS = Heads(
    "self_attention", {"query_key_value": 1}, "dense", attributes=("num_heads", "hidden_size"), fields=("n_head",)
)
WRONG = {
    "stablelm": (stablelm, Stack("layers", (HEADS,)), "head", "removing heads of 'model.layers.0.self_attn'"),
    "olmo2": (olmo2, Stack("layers", (HEADS, NEURONS)), "head", "removing heads of 'model.layers.0.self_attn'"),
    "a gate that is not named": (
        lambda: transformers.OlmoForCausalLM(transformers.OlmoConfig(**DECODER)),
        Stack("layers", (Neurons("mlp", {"up_proj": 1}, "down_proj"),)),
        "neuron",
        "removing neurons of 'model.layers.0.mlp'.*can no longer be called",
    ),
    "slopes of heads": (
        bloom, Stack("h", (BLOOM_HEADS,), ("n_layer",)), "head", "removing heads of 'transformer.h.0.self_attention'"
    ),
    "a norm behind each sum": (
        lambda: transformers.XLMRobertaForMaskedLM(transformers.XLMRobertaConfig(**DECODER)),
        Stack("encoder.layer", (), norm_first=True),
        "layer",
        "removing layers of 'roberta.encoder.layer'.*relative difference of logits",
    ),
    "layers that are counted": (
        moe_with_a_dense_layer, Stack("layers", ()), "layer", "removing layers of 'model.layers'.*(another|loaded)"
    ),
}  # fmt: skip


def described(name, monkeypatch):
    """A model of a family that is described wrongly, with some structures pruned, and what the error is to say."""
    make, stack, granularity, match = WRONG[name]
    torch.manual_seed(0)
    model = perturbed(make())
    monkeypatch.setitem(FAMILIES, model.config.model_type, (stack,))
    if granularity == "layer":  # The first one differs from the others.
        with torch.no_grad():
            for parameter in model.base_model.get_submodule(stack.layers)[0].parameters():
                parameter.mul_(1e-3)
    return model, PruningConfig(sparsity=0.25 if granularity == "layer" else 0.5, granularity=granularity), match


@pytest.mark.parametrize("name", WRONG)
def test_a_description_that_is_wrong_is_told_and_the_model_is_as_it_was(name, monkeypatch):
    model, config, match = described(name, monkeypatch)
    prune(model, config)
    ids = torch.arange(3, 19)[None]
    before, state, said = model(ids).logits, copy.deepcopy(model.state_dict()), model.config.to_dict()
    with pytest.raises(ValueError, match=match):
        shrink(model)
    assert torch.equal(model(ids).logits, before)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.config.to_dict() == said


@pytest.mark.parametrize("name", ["olmo2", "slopes of heads", "layers that are counted"])
def test_in_training_the_masked_model_stays(name, monkeypatch, make_trainer, caplog):
    model, config, _ = described(name, monkeypatch)
    before = model.num_parameters()
    pruning = PruningTrainerCallback(config)
    make_trainer(model, pruning, train_dataset=samples(model), max_steps=2).train()
    assert "The model was not shrunk, and its pruned structures stay in it as zeros" in caplog.text
    assert "attribute that depends on the number of" in caplog.text
    assert model.num_parameters() == before
    assert pruning.masks.masked
    assert all((model.get_parameter(name)[~mask] == 0).all() for name, mask in pruning.masks.items())


def test_the_one_that_differs_is_named(monkeypatch):
    """Of heads and neurons it is the heads, though both are pruned."""
    model, _, match = described("olmo2", monkeypatch)
    prune(model, PruningConfig(sparsity=0.5, granularity="neuron", multiple_of=1))
    prune(model, PruningConfig(sparsity=0.5, granularity="head"))
    with pytest.raises(ValueError, match=match):
        shrink(model)


@pytest.mark.parametrize("name", ["llama", "qwen3", "t5", "t5 with gates", "vit", "dinov2", "whisper", "bert"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision_are_compared_too(name, dtype, caplog):
    """Some read the dtype of another module's weight; and `.to(dtype)` has rounded the frequencies of rotary ones."""
    model = build(name, dtype)
    before = model.num_parameters()
    config = PruningConfig(sparsity=0.5, granularity="head+neuron", criterion="magnitude", multiple_of=4)
    prune(model, config)
    shrink(model)
    assert model.num_parameters() < before
    assert caplog.text == ""


def test_in_half_precision_a_wrong_description_is_told(monkeypatch):
    family = Stack(
        "encoder.block", (Heads("layer.0.SelfAttention", {"q": 1, "k": 1, "v": 1}, "o", "key_value_proj_dim"),)
    )
    monkeypatch.setitem(FAMILIES, "t5", (family,))
    model = build("t5", torch.bfloat16)
    prune(model, PruningConfig(sparsity=0.5, granularity="head"))
    with pytest.raises(ValueError, match="can no longer be called"):
        shrink(model)


class Twice(torch.nn.Linear):
    """A layer of its own kind, which computes as the usual one."""


@pytest.mark.parametrize("change", ["a layer of its own kind", "a hook", "an activation", "another head"])
def test_what_its_owner_has_changed_in_a_model_is_no_fault_of_its_description(change, caplog):
    model = build("llama")
    mlp = model.model.layers[1].mlp
    if change == "a layer of its own kind":
        weight, mlp.gate_proj = mlp.gate_proj.weight, Twice(16, 24, bias=False)
        mlp.gate_proj = Twice(mlp.up_proj.in_features, mlp.up_proj.out_features, bias=False)
        mlp.gate_proj.weight = weight
    elif change == "a hook":
        model.model.layers[0].register_forward_hook(lambda module, inputs, output: output * 2)
    elif change == "an activation":
        mlp.act_fn = torch.nn.Tanh()
    else:
        model.lm_head = torch.nn.Sequential(torch.nn.Linear(24, 60))
    prune(model, PruningConfig(sparsity=0.34, granularity="head+neuron", multiple_of=4))
    masked, state = logits_of(model), torch.get_rng_state()
    shrink(model)
    assert (logits_of(model) - masked).abs().max() < 1e-4
    assert torch.equal(torch.get_rng_state(), state)
    assert ("modules that its config does not build" in caplog.text) == (change in ("a hook", "an activation"))


def test_of_layers_that_go_no_part_is_blamed(monkeypatch):
    """The error is that of layers, though all heads and neurons in one of them are gone as well."""
    model, config, match = described("layers that are counted", monkeypatch)
    stack = Stack("layers", (Neurons("mlp.shared_experts", {"gate_proj": 1, "up_proj": 1}, "down_proj"),))
    monkeypatch.setitem(FAMILIES, model.config.model_type, (stack,))
    prune(model, config)
    with pytest.raises(ValueError, match=match):
        shrink(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_any_precision_are_compared_and_stay(dtype):
    model = build("llama", dtype)
    before = dict(model.named_parameters())
    buffers = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    Reference(model, {}).require_same(model, model)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert all(buffers[n][0] is buffer and torch.equal(buffers[n][1], buffer) for n, buffer in model.named_buffers())
    assert not model.training


def test_large_models_are_compared_in_single_precision(monkeypatch):
    monkeypatch.setattr(comparing, "_LARGEST_DOUBLE", 0)
    model = build("llama", torch.bfloat16)
    reference = Reference(model, {})
    assert reference._dtype == torch.float32
    reference.require_same(model, model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    with pytest.raises(Differs, match="relative difference of logits"):
        reference.require_same(model, model)


def test_mixed_precision_of_training_is_left_out():
    """Accelerate has replaced the forward pass by one in bfloat16, whose rounding would look like a difference."""
    AcceleratorState._reset_state(reset_partial_state=True)
    model = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(build("llama"))
    forward = model.forward
    assert model(**inputs_of(model)).logits.dtype == torch.float32
    prune(model, PruningConfig(sparsity=0.5, granularity="head+neuron", multiple_of=4))
    shrink(model)
    assert model.forward is forward
    AcceleratorState._reset_state(reset_partial_state=True)


def test_masks_of_weights_that_are_not_zero_count():
    model = build("llama")
    masked = copy.deepcopy(model)
    masks = prune_masks(masked)
    shrink(model, masks)
    assert torch.allclose(logits_of(model), logits_of(masked), atol=1e-5)


def prune_masks(model):
    prune(model, PruningConfig(sparsity=0.5, granularity="head+neuron", multiple_of=4))
    return MaskSet.from_zeros(model)


class Molecules(transformers.LlamaForCausalLM):
    """A model whose inputs cannot be made from its config."""

    main_input_name = "molecules"

    def forward(self, molecules, labels=None, **kwargs):
        return super().forward(input_ids=molecules, labels=labels, **kwargs)


def test_what_cannot_be_called_is_said_and_a_batch_helps(caplog):
    model = perturbed(Molecules(transformers.LlamaConfig(**GROUPED)))
    prune(model, PruningConfig(sparsity=0.3, granularity="head"))
    other = copy.deepcopy(model)
    shrink(model)
    assert "could not be compared with the masked one: Molecules cannot be called to compare" in caplog.text
    caplog.clear()
    shrink(other, batch={"molecules": torch.arange(8)[None]})
    assert caplog.text == ""
    assert other.num_parameters() == model.num_parameters()


def test_in_training_a_batch_of_it_helps(make_trainer, caplog):
    model = perturbed(Molecules(transformers.LlamaConfig(**GROUPED)))
    dataset = [{"molecules": row["input_ids"], "labels": row["labels"]} for row in samples(model)]
    pruning = PruningTrainerCallback(PruningConfig(sparsity=0.3, granularity="head"))
    with caplog.at_level(logging.WARNING):
        make_trainer(model, pruning, train_dataset=dataset, max_steps=2).train()
    assert "could not be compared" not in caplog.text
    assert pruning.history.costs["shrunk"].parameters < pruning.history.costs["masked"].parameters


def test_a_model_that_gives_nothing_finite_is_not_compared(caplog):
    model = build("llama")
    prune(model, PruningConfig(sparsity=0.3, granularity="head"))
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    shrink(model)
    assert "it gives no finite outputs" in caplog.text


def test_loading_reports_nothing(capfd):
    model = build("bert")
    Reference(model, {}).require_same(model, model)
    out, err = capfd.readouterr()
    assert out == err == ""


def test_a_t5_that_can_no_longer_generate_says_so(caplog):
    model = build("t5")
    with torch.no_grad():  # The last layers of the encoder matter least.
        for layer in model.encoder.block[1:]:
            for parameter in layer.parameters():
                parameter.mul_(0.01)
    prune(model, PruningConfig(sparsity=0.34, granularity="layer"))
    shrink(model)
    assert (len(model.encoder.block), len(model.decoder.block)) == (1, 3)
    assert "generate fails with the layers that are left" in caplog.text
    assert "generate(..., use_cache=False) works" in caplog.text
    assert "https://github.com/huggingface/transformers/issues/30508" in caplog.text
    ids = torch.arange(3, 9)[None]
    assert model.generate(ids, max_new_tokens=2, use_cache=False).shape[0] == 1
    assert transformers.T5ForConditionalGeneration(model.config).encoder.config.num_layers == 1


@pytest.mark.parametrize("name", ["gpt2", "whisper", "bert"])
def test_others_say_nothing_of_it(name, caplog):
    model = build(name)
    prune(model, PruningConfig(sparsity=0.34, granularity="layer" if name != "bert" else "head"))
    shrink(model)
    assert "generate fails" not in caplog.text
