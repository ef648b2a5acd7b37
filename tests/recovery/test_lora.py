"""LoRA that keeps zeros: what is trained is what is merged, and every zero is still there."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from accelerate import cpu_offload
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_prune import MaskSet, PruningConfig, keep_sparsity, prune, shrink
from hf_prune.recovery.lora import require_maskable_adapters
from hf_prune.recovery.masked_lora import MaskedLinear
from hf_prune.weights.targets import find_targets
from tests.structures.models import build as build_of_structures
from tests.tiny import batch, build, logits
from tests.trainers import trainer_factory

FAMILIES = ["gpt2", "gpt_neo", "llama", "bert", "vit", "t5"]
GRANULARITIES = ["unstructured", "2:4", "block:2x2"]


def pruned(family: str = "llama", granularity: str = "unstructured", dtype: torch.dtype = torch.float32) -> nn.Module:
    model = build(family, dtype)
    prune(model, PruningConfig(sparsity=0.75 if granularity != "2:4" else None, granularity=granularity))
    return model.eval()


def adapted(model: nn.Module, keep: bool = True, **options) -> PeftModel:
    """With adapters that matter: peft's own begin at zero."""
    torch.manual_seed(1)
    config = LoraConfig(**{"target_modules": "all-linear", "r": 3, "lora_alpha": 7, "lora_dropout": 0.0, **options})
    wrapped = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return keep_sparsity(wrapped.eval()) if keep else wrapped.eval()


def zeros_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameter → where it is zero, by the names of the model without peft, of weights that were pruned."""
    zeros = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): parameter == 0
        for name, parameter in model.named_parameters()
        if "lora_" not in name and parameter.ndim > 1
    }
    return {name: where for name, where in zeros.items() if bool(where.any())}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(zeros, other[name]) for name, zeros in one.items())


def count(zeros: dict[str, torch.Tensor]) -> int:
    return sum(int(where.sum()) for where in zeros.values())


# What it computes


class Oracle(nn.Module):
    """`x (W + M ∘ Σ s B A)ᵀ + b`, as it stands, by autograd."""

    def __init__(self, layer: MaskedLinear, names: list[str]) -> None:
        super().__init__()
        self.layer, self.names = layer, names

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        base, layer = self.layer.get_base_layer(), self.layer
        transposed = isinstance(base, Conv1D)
        weight = base.weight.T if transposed else base.weight
        mask = layer.sparsity_mask.T if transposed else layer.sparsity_mask
        for name in self.names:
            weight = weight + mask * (layer.lora_B[name].weight @ layer.lora_A[name].weight) * layer.scaling[name]
        return F.linear(x, weight, base.bias)


class One(nn.Module):
    def __init__(self, kind: type, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.it = Conv1D(5, 7) if kind is Conv1D else nn.Linear(7, 5, bias=bias)
        with torch.no_grad():
            self.it.weight.normal_()
            self.it.weight[torch.rand_like(self.it.weight) < 0.5] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.it(x)


def layer_of(kind: type, bias: bool = True, dtype: torch.dtype = torch.float64, **options) -> MaskedLinear:
    fan_in_fan_out = kind is Conv1D
    model = adapted(One(kind, bias).to(dtype), target_modules=["it"], fan_in_fan_out=fan_in_fan_out, **options)
    layer = model.base_model.model.it
    assert type(layer) is MaskedLinear
    return layer


KINDS = pytest.mark.parametrize(("kind", "bias"), [(nn.Linear, True), (nn.Linear, False), (Conv1D, True)])


@KINDS
@pytest.mark.parametrize("shape", [(7,), (4, 7), (2, 3, 7)])
@pytest.mark.parametrize("names", [["default"], ["default", "other"]])
@pytest.mark.parametrize("looked_at", [True, False])
@pytest.mark.parametrize("has_mask", [True, False])
def test_outputs_and_gradients_are_those_of_autograd(kind, bias, shape, names, looked_at, has_mask):
    layer = layer_of(kind, bias)
    layer.update_layer("other", 2, 5, config=LoraConfig(r=2, lora_alpha=5, fan_in_fan_out=kind is Conv1D))
    nn.init.normal_(layer.lora_B["other"].weight)
    layer.double().set_adapter(names)
    layer.get_base_layer().requires_grad_(True)
    if looked_at:  # The two ways of computing it.
        layer.get_base_layer().register_forward_hook(lambda *_: None)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expected = Oracle(layer, names)(x)
    if not has_mask:  # As under FSDP2.
        layer.sparsity_mask = None
    found = layer(x)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    upstream = torch.randn_like(found)
    parameters = [p for n, p in layer.named_parameters() if "lora_" not in n or n.split(".")[1] in names]
    gradients = [torch.autograd.grad(y, [x, *parameters], upstream) for y in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


@KINDS
def test_gradients_are_those_of_differences(kind, bias):
    layer = layer_of(kind, bias)
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


@KINDS
def test_dropout_drops_what_goes_into_the_adapter(kind, bias):
    layer = layer_of(kind, bias, lora_dropout=0.5).train()
    x = torch.randn(4, 7, dtype=torch.float64)
    torch.manual_seed(3)
    found = layer(x)
    torch.manual_seed(3)
    dropped = layer.lora_dropout["default"](x)
    base = layer.get_base_layer()
    expected = base(x) + Oracle(layer, ["default"])(dropped) - base(dropped)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    assert not torch.allclose(layer(x), found)


def test_a_bias_of_the_adapter_is_added():
    layer = layer_of(nn.Linear, lora_bias=True)
    x = torch.randn(4, 7, dtype=torch.float64)
    bias = layer.lora_B["default"].bias
    assert bool(bias.any())
    expected = Oracle(layer, ["default"])(x) + bias * layer.scaling["default"]
    assert torch.allclose(layer(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("how", ["autocast", "lower weights", "all low"])
def test_lower_precision(how):
    exact = layer_of(nn.Linear)
    layer = copy.deepcopy(exact).float()
    if how == "lower weights":  # as peft has it: adapters in float32
        layer.get_base_layer().bfloat16()
    elif how == "all low":
        layer.bfloat16()
    x = torch.randn(4, 7, dtype=torch.float64)
    given = x.float().requires_grad_() if how == "autocast" else x.bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        found = layer(given)
    assert found.dtype == torch.bfloat16
    expected = Oracle(exact, ["default"])(x)
    assert torch.allclose(found.double(), expected, rtol=0.05, atol=0.1)
    found.sum().backward()
    expected.sum().backward()
    for name in ("lora_A", "lora_B"):
        ours, theirs = (getattr(each, name)["default"].weight for each in (layer, exact))
        assert ours.grad.dtype == ours.dtype
        assert torch.allclose(ours.grad.double(), theirs.grad, rtol=0.05, atol=0.1)


def test_what_is_far_smaller_than_the_weights_is_not_lost_in_lower_precision():
    """What adapters add is less than half of the last bit of each weight, and is all that comes out."""
    layer = layer_of(nn.Linear, bias=False).bfloat16()
    signs = torch.tensor([1.0, -1.0] * 3 + [0.0])
    with torch.no_grad():
        layer.get_base_layer().weight.copy_(signs.abs().expand(5, 7))
        layer.lora_A["default"].weight.copy_(signs.expand(3, 7) * 2**-6)
        layer.lora_B["default"].weight.fill_(2**-6)
    keep_sparsity(layer)
    x = signs.expand(4, 7).bfloat16()
    assert not bool(layer.get_base_layer()(x).any())
    expected = 6 * 3 * 2**-12 * layer.scaling["default"]
    assert torch.allclose(layer(x).double(), torch.tensor(expected, dtype=torch.float64), rtol=0.01, atol=0)


def test_no_other_weight_is_kept_for_the_backward_pass():
    layer = layer_of(nn.Linear)
    kept: list[tuple[int, ...]] = []
    known = {layer.get_base_layer().weight.data_ptr(), layer.sparsity_mask.data_ptr()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in known:
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(4, 7, dtype=torch.float64))
    assert sorted(kept) == sorted([(4, 7), *(tuple(p.shape) for n, p in layer.named_parameters() if "lora_" in n)])


# In models


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rslora", [True, False])
def test_every_zero_is_there_after_a_merge(rslora, granularity, family):
    base = pruned(family, granularity)
    before, dense_logits = zeros_of(base), logits(base)
    model = adapted(copy.deepcopy(base), use_rslora=rslora)
    expected = logits(model)
    assert (expected - dense_logits).abs().max() > 1e-3

    model.merge_adapter()
    assert same(zeros_of(model), before)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    model.unmerge_adapter()
    assert same(zeros_of(model), before)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    model.merge_adapter(safe_merge=True)
    assert same(zeros_of(model), before)
    model.unmerge_adapter()
    for safe in (True, False):
        merged = copy.deepcopy(model).merge_and_unload(safe_merge=safe)
        assert same(zeros_of(merged), before)
        assert torch.allclose(logits(merged), expected, atol=1e-5)
    with model.disable_adapter():
        assert torch.allclose(logits(model), dense_logits, atol=1e-5)

    plain = zeros_of(adapted(copy.deepcopy(base), keep=False, use_rslora=rslora).merge_and_unload())
    assert count(plain) < 0.01 * count(before)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_several_adapters(family):
    base = pruned(family)
    before = zeros_of(base)
    model = adapted(base)
    model.add_adapter("second", LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False))
    first = logits(model)
    model.set_adapter("second")
    second = logits(model)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    assert not torch.allclose(first, second, atol=1e-3)
    model.merge_adapter()
    assert same(zeros_of(model), before)
    assert torch.allclose(logits(model), both, atol=1e-5)
    model.unmerge_adapter()
    model.delete_adapter("default")
    assert torch.allclose(logits(model), second, atol=1e-5)


@pytest.mark.parametrize("compress", [True, False])
def test_adapters_are_saved_as_ever_and_kept_sparse_again(compress, tmp_path):
    import hf_prune

    base = pruned()
    hf_prune.save_pretrained(base, tmp_path / "base", compress=compress)
    model = adapted(copy.deepcopy(base))
    model.save_pretrained(tmp_path / "adapter")
    plain = adapted(copy.deepcopy(base), keep=False)
    plain.save_pretrained(tmp_path / "plain")
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("adapter", "plain")]
    assert files[0] == files[1]
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    loaded = keep_sparsity(PeftModel.from_pretrained(again, tmp_path / "adapter")).eval()
    assert torch.equal(logits(loaded), logits(model))
    assert same(zeros_of(loaded.merge_and_unload()), zeros_of(base))


@pytest.mark.parametrize("checkpointing", [True, False])
def test_training_with_trainer(checkpointing, tmp_path):
    base = pruned()
    before = zeros_of(base)
    model = adapted(base, lora_dropout=0.1)
    if checkpointing:
        model.enable_input_require_grads()
    trainer = trainer_factory(tmp_path)(
        model, train_dataset=batch(base, 24), eval_dataset=batch(base, 8), gradient_checkpointing=checkpointing
    )
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < first
    expected = logits(model.eval())
    merged = model.merge_and_unload()
    assert same(zeros_of(merged), before)
    assert torch.allclose(logits(merged), expected, atol=1e-5)


def test_masks_of_the_model_before_and_after_peft():
    base = build("llama")
    config = PruningConfig(sparsity=0.75)
    prune(base, config)
    masks = MaskSet.from_zeros(base)
    first = adapted(copy.deepcopy(base), keep=False)
    second = copy.deepcopy(first)
    keep_sparsity(first, masks)
    keep_sparsity(second, MaskSet.from_zeros(second))
    assert torch.equal(logits(first), logits(second))
    third = adapted(copy.deepcopy(base))
    assert torch.equal(logits(first), logits(third))


def test_masks_leave_other_zeros_free():
    base = pruned()
    masks = dict(MaskSet.from_zeros(base))
    name = "model.layers.0.mlp.up_proj.weight"
    masks[name] = torch.ones_like(masks[name])
    merged = keep_sparsity(adapted(base, keep=False), masks).merge_and_unload()
    zeros = zeros_of(merged)
    assert name not in zeros
    assert "model.layers.1.mlp.up_proj.weight" in zeros


def test_a_copy_keeps_sparsity_too():
    model = adapted(pruned())
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    assert any(type(module) is MaskedLinear for module in copy.deepcopy(model).modules())


def test_the_state_is_that_of_peft():
    ours, theirs = adapted(pruned()), adapted(pruned(), keep=False)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert [name for name, _ in ours.named_buffers()] == [name for name, _ in theirs.named_buffers()]


def test_adapters_on_a_shrunk_model_have_no_zeros_to_keep():
    model = build_of_structures("llama")
    prune(model, PruningConfig(sparsity=0.5, granularity="neuron", multiple_of=1))
    wrapped = adapted(shrink(model), keep=False)
    with pytest.raises(ValueError, match="no adapter is on a weight with zeros"):
        keep_sparsity(wrapped)


# What cannot be


def conv(model: nn.Module) -> PeftModel:
    return get_peft_model(model, LoraConfig(target_modules=["convolution"]))


def test_variants_and_other_adapters_are_errors():
    for config, message in [
        (LoraConfig(target_modules=["q_proj"], use_dora=True), "'default' is a DoraLinearVariant, which does more"),
        (LoHaConfig(target_modules=["q_proj"]), "adapters of another kind cannot keep sparsity"),
        (
            IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
            "adapters of another kind cannot keep sparsity",
        ),
    ]:
        model = get_peft_model(pruned(), config)
        with pytest.raises(ValueError, match=message):
            keep_sparsity(model)
        assert not any(type(module) is MaskedLinear for module in model.modules())
    with pytest.raises(ValueError, match="LoRA on such a layer cannot keep sparsity"):
        keep_sparsity(conv(pruned("resnet")))


@pytest.mark.parametrize("names", [["gate_up_proj"], ["gate_up_proj", "down_proj"]])
def test_experts_that_are_one_parameter_are_an_error(names):
    base = pruned("mixtral")
    parameters = [f"mlp.experts.{name}" for name in names]
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], target_parameters=parameters))
    message = r"(gate_up|down)_proj' is in a .*ParamWrapper: LoRA on such a layer cannot keep"
    with pytest.raises(ValueError, match=message):
        keep_sparsity(model)
    with pytest.raises(ValueError, match=message):
        require_maskable_adapters(model, find_targets(model, ["experts"]))
    assert not any(type(module) is MaskedLinear for module in model.modules())


def test_attention_in_one_piece_is_an_error():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)

    net = Net()
    with torch.no_grad():
        net.attention.in_proj_weight[0] = 0
    model = get_peft_model(net, LoraConfig(target_modules=["attention"]))
    with pytest.raises(ValueError, match="LoRA on such a layer cannot keep sparsity"):
        keep_sparsity(model)


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_an_adapter_that_would_change_base_weights_is_an_error(how):
    base = pruned()
    before = zeros_of(base)
    model = adapted(base)
    with pytest.raises(ValueError, match=f"init_lora_weights='{how}' changes base weights, and fills their zeros"):
        model.add_adapter("two", LoraConfig(target_modules="all-linear", init_lora_weights=how))
    assert same(zeros_of(model), before)


def test_adapters_on_other_layers_are_masked_when_it_is_called_again():
    base = pruned()
    before = zeros_of(base)
    model = adapted(base, target_modules=["q_proj"])
    model.add_adapter("two", LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
    model.set_adapter("two")
    assert same(zeros_of(keep_sparsity(model).merge_and_unload()), before)


def test_a_layer_that_does_more_than_to_multiply_does_it_still():
    class Twice(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    net = One(nn.Linear, True)
    net.it = Twice(7, 5)
    with torch.no_grad():
        net.it.weight[0] = 0
    expected = net(x := torch.randn(3, 7))
    model = keep_sparsity(get_peft_model(net, LoraConfig(target_modules=["it"])))
    assert type(model.base_model.model.it) is MaskedLinear
    assert torch.equal(model(x), expected)


def test_a_variant_that_is_added_later_is_an_error():
    model = adapted(pruned())
    with pytest.raises(ValueError, match="'dora' is a DoraLinearVariant"):
        model.add_adapter("dora", LoraConfig(target_modules=["q_proj"], use_dora=True))
    zeros = zeros_of(model)
    assert same(zeros_of(model.merge_and_unload()), zeros)


def test_modules_that_share_a_weight_share_its_mask():
    model = build("llama")
    first, second = (layer.self_attn.q_proj for layer in model.model.layers)
    second.weight = first.weight
    prune(model, PruningConfig(sparsity=0.75))
    masks = MaskSet.from_zeros(model)
    wrapped = keep_sparsity(adapted(model, keep=False), masks)
    zeros = zeros_of(wrapped)
    for layer in wrapped.base_model.model.model.layers:
        assert torch.equal(layer.self_attn.q_proj.sparsity_mask, masks["model.layers.0.self_attn.q_proj.weight"])
    assert same(zeros_of(wrapped.merge_and_unload()), zeros)


def test_a_model_whose_own_names_are_those_of_peft():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_model = nn.Module()
            self.base_model.model = pruned()

        def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
            return self.base_model.model(**inputs)

    model = Outer()
    zeros = zeros_of(model)
    for masks in (None, MaskSet.from_zeros(model)):
        wrapped = keep_sparsity(adapted(copy.deepcopy(model), keep=False), masks)
        assert sum(type(module) is MaskedLinear for module in wrapped.modules()) == 14
        assert count(zeros_of(wrapped.merge_and_unload())) == count(zeros)


def test_adapters_around_adapters_are_masked_or_an_error():
    twice = get_peft_model(pruned(), LoraConfig(target_modules=["q_proj"]))
    twice = get_peft_model(twice, LoraConfig(target_modules=["v_proj"]))
    keep_sparsity(twice)
    assert sum(type(module) is MaskedLinear for module in twice.modules()) == 4
    mixed = get_peft_model(pruned(), LoraConfig(target_modules=["q_proj"]), mixed=True)
    mixed.add_adapter("other", LoHaConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="adapters of another kind cannot keep sparsity"):
        keep_sparsity(mixed)
    assert not any(type(module) is MaskedLinear for module in mixed.modules())


def test_weights_that_are_not_in_memory_are_an_error():
    model = adapted(pruned())
    cpu_offload(model)
    with pytest.raises(ValueError, match=r"weights were offloaded \(meta device\), where masks do not reach"):
        logits(model)
    model = adapted(pruned(), keep=False)
    cpu_offload(model)
    with pytest.raises(ValueError, match=r"is not in memory \(meta device\): load the model whole"):
        keep_sparsity(model)


def test_zeros_of_an_embedding_that_nobody_pruned():
    model = pruned()
    masks = MaskSet.from_zeros(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = 0  # as transformers has it for padding
    model = adapted(model, keep=False, target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(ValueError, match="If the zeros of this one were not pruned, give masks of what was"):
        keep_sparsity(model)
    keep_sparsity(model, masks)
    assert sum(type(module) is MaskedLinear for module in model.modules()) == 2


def test_masks_from_before_peft_name_what_it_trains_whole_too():
    model = pruned()
    masks = MaskSet.from_zeros(model)
    wrapped = adapted(model, keep=False, target_modules=["q_proj"], modules_to_save=["down_proj"])
    keep_sparsity(wrapped, masks)
    assert sum(type(module) is MaskedLinear for module in wrapped.modules()) == 2


def test_masks_that_were_made_in_inference_mode_can_be_trained_with():
    model = adapted(pruned(), keep=False)
    with torch.inference_mode():
        keep_sparsity(model)
    inputs = {key: value[None] for key, value in batch(model.get_base_model())[0].items()}
    model(**inputs).loss.backward()
    assert any(parameter.grad is not None and bool(parameter.grad.any()) for parameter in model.parameters())


def test_pruning_further_takes_the_masks_along():
    model = adapted(pruned())
    prune(model, PruningConfig(sparsity=0.9))
    zeros = zeros_of(model)
    assert count(zeros) == round(0.9 * MaskSet.from_zeros(model).total)
    expected = logits(model)
    merged = model.merge_and_unload()
    assert same(zeros_of(merged), zeros)
    assert torch.allclose(logits(merged), expected, atol=1e-5)


def test_an_adapter_for_each_sample_is_an_error():
    model = adapted(pruned())
    with pytest.raises(ValueError, match="adapter_names, one for each sample of a batch, cannot be used"):
        model(input_ids=torch.ones(2, 4, dtype=torch.long), adapter_names=["default", "__base__"])


def test_no_adapters_no_zeros_and_other_masks_are_errors():
    with pytest.raises(ValueError, match="this LlamaForCausalLM has no adapters"):
        keep_sparsity(pruned())
    with pytest.raises(ValueError, match="no adapter is on a weight with zeros"):
        keep_sparsity(adapted(build("llama"), keep=False))
    model = adapted(pruned(), keep=False)
    with pytest.raises(ValueError, match=r"has no parameter 'something\.else'; the masks are of another model"):
        keep_sparsity(model, {"something.else": torch.zeros(2, 2, dtype=torch.bool)})
    with pytest.raises(TypeError, match="must be a bool tensor"):
        keep_sparsity(model, {"model.layers.0.mlp.up_proj.weight": torch.zeros(32, 16)})
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=r"the mask of .*up_proj.weight' has shape \[2, 2\], its weight \[32, 16\]"):
        keep_sparsity(model, {name: torch.zeros(2, 2, dtype=torch.bool)})
    with pytest.raises(
        ValueError, match=r"masked weights of .*up_proj.weight' are not zero. Set them to zero with MaskSet"
    ):
        keep_sparsity(model, {name: torch.zeros(32, 16, dtype=torch.bool)})
    assert not any(type(module) is MaskedLinear for module in model.modules())


def test_merged_adapters_are_an_error():
    model = adapted(pruned(), keep=False)
    masks = MaskSet.from_zeros(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match="no adapter is on a weight with zeros"):
        keep_sparsity(model)
    with pytest.raises(ValueError, match=r"masked weights of .* are not zero"):
        keep_sparsity(model, masks)
    model = adapted(pruned())
    model.merge_adapter()
    with pytest.raises(ValueError, match="are merged, and may have filled zeros"):
        keep_sparsity(model)


def test_adapters_on_weights_without_zeros_stay_those_of_peft():
    model = adapted(pruned(), keep=False, target_modules=["q_proj", "lm_head"])
    keep_sparsity(model)
    kinds = {
        name.rpartition(".")[2]: type(module) for name, module in model.named_modules() if isinstance(module, Linear)
    }
    assert kinds == {"q_proj": MaskedLinear, "lm_head": Linear}


def test_a_model_is_found_again_after_pickling(tmp_path: Path):
    model = adapted(pruned())
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(logits(torch.load(tmp_path / "model.pt", weights_only=False)), logits(model))
