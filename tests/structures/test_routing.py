"""Routers do not choose experts whose row is zero: in training and evaluation, however the model is run."""

import copy
import pickle

import pytest
import torch
from torch import nn

from hf_prune import PruningConfig, prune, save_pretrained, shrink
from hf_prune.structures.experts import find_experts, find_mixtures
from hf_prune.structures.routing import SAVED_UNBARRED, Router, _Barring, bar_, bars_any, unbar_
from hf_prune.weights.targets import find_targets
from tests.structures.mixtures import build_mixture, logits_of

# A Linear; a weight that the router multiplies itself; with a bias; cast first, with a correction in the block; a
# Linear with a forward pass of its own.
ROUTERS = ["hunyuan_v1_moe", "mixtral", "gpt_oss", "minimax_m2", "llama4_text"]
CONFIG = PruningConfig(sparsity=0.375, granularity="expert", schedule="one_shot")
TOKENS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(5))


def pruned(name, **fields):
    model = build_mixture(name, torch.float32, **fields)
    prune(model, CONFIG)
    return model


def step(model, **options):
    """The loss and all gradients."""
    model.zero_grad()
    loss = model(input_ids=TOKENS, labels=TOKENS, use_cache=False, **options).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def choices(model):
    """Which experts each call chooses: `top_k_index` of what fused experts are called with."""
    found, names = {}, [mixture.name for mixture in find_mixtures(model)]
    for name in names:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: found.__setitem__(name, [*args, *kwargs.values()][1]), with_kwargs=True
        )
    return found


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", ["hunyuan_v1_moe", "mixtral", "gpt_oss", "minimax_m2", "deepseek_v3"])
def test_pruned_experts_are_not_chosen(name, mode):
    model = getattr(pruned(name), mode)()
    found = choices(model)
    model(input_ids=TOKENS, use_cache=False)
    for place, group in find_experts(model, find_targets(model)).items():
        member = group.members[0]
        gone = (member.parameter == 0).flatten(1).all(1).nonzero().flatten()
        assert not torch.isin(found[place], gone).any()
    assert bars_any(model)


@pytest.mark.parametrize("name", ROUTERS)
def test_gradients_are_those_of_what_is_left(name):
    model = build_mixture(name)
    prune(model, CONFIG)
    small = shrink(copy.deepcopy(model))
    for each in (model, small):  # No kernel knows float64.
        each.config._experts_implementation = "eager"
    (loss, ours), (other_loss, theirs) = step(model), step(small)
    assert torch.allclose(loss, other_loss, rtol=1e-6)
    for n, gradient in theirs.items():
        assert ours[n].isfinite().all()
        if ours[n].shape == gradient.shape:
            assert torch.allclose(ours[n], gradient, atol=1e-6), n


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_a_loss_for_balance_has_finite_gradients(name):
    model = pruned(name).train()
    _, gradients = step(model, output_router_logits=True)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_a_corrected_router_has_finite_gradients():
    model = pruned("deepseek_v3").train()
    assert all(gradient.isfinite().all() for gradient in step(model)[1].values())


@pytest.mark.parametrize("name", ROUTERS)
def test_gradient_checkpointing_changes_nothing(name):
    model = pruned(name).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    loss, gradients = step(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again, others = step(model)
    assert torch.equal(loss, again)
    assert all(torch.equal(gradients[n], others[n]) for n in gradients)


@pytest.mark.parametrize("name", ROUTERS)
def test_autocast_bars_too(name):
    model = pruned(name)
    with torch.autocast("cpu", torch.bfloat16):
        barred = model(input_ids=TOKENS, use_cache=False).logits
        shrink(model)
        assert (model(input_ids=TOKENS, use_cache=False).logits - barred).abs().max() < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_compiled_models_bar_too(name):
    model = pruned(name).train()
    loss, gradients = step(model)
    compiled_loss, compiled = step(torch.compile(model))
    assert torch.allclose(loss, compiled_loss)
    names = {n.removeprefix("_orig_mod."): gradient for n, gradient in compiled.items()}
    assert all(torch.allclose(gradients[n], names[n], atol=1e-6) for n in gradients)


def test_a_second_call_changes_nothing_and_hooks_can_go():
    model = build_mixture("minimax_m2")
    dense = logits_of(model)
    prune(model, CONFIG)
    masked, routers = logits_of(model), [mixture.router for mixture in find_mixtures(model)]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    bar_(model, routers)
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    assert torch.equal(logits_of(model), masked)
    unbar_(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not torch.equal(logits_of(model), masked)
    assert not torch.equal(masked, dense)


def test_weights_that_are_loaded_anew_are_not_barred():
    model = build_mixture("mixtral")
    dense, weights = logits_of(model), copy.deepcopy(model.state_dict())
    prune(model, CONFIG)
    model.load_state_dict(weights)
    assert torch.equal(logits_of(model), dense)
    assert not bars_any(model)


def test_nothing_is_left_in_a_module_that_fails():
    model = pruned("minimax_m2")
    gate, block = model.model.layers[0].mlp.gate, model.model.layers[0].mlp
    before = set(vars(gate)), set(vars(block))
    with pytest.raises(RuntimeError):
        block(torch.ones(2, 3, 5))
    assert (set(vars(gate)), set(vars(block))) == before
    assert type(gate.weight) is nn.Parameter


def test_copies_and_pickles_bar_too():
    model = pruned("deepseek_v3")
    masked = logits_of(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits_of(other), masked)


def test_what_is_saved_is_ordinary():
    model = pruned("deepseek_v3")
    assert set(model.state_dict()) == set(build_mixture("deepseek_v3").state_dict())
    assert all(type(tensor) is torch.Tensor for tensor in model.state_dict().values())


def test_a_router_of_zeros_chooses_among_all():
    router = nn.Linear(4, 6, bias=False)
    nn.init.zeros_(router.weight)
    model = nn.ModuleDict({"router": router})
    bar_(model, [Router("router", "")])
    assert torch.equal(router(torch.ones(2, 4)), torch.zeros(2, 6))
    assert not bars_any(model)


def test_a_product_with_a_transposed_weight_is_barred_too():
    weight = _Barring.of(torch.ones(3, 2), torch.tensor([False, True, False]), False)
    x = torch.ones(4, 2)
    expected = torch.tensor([2.0, -torch.inf, 2.0]).expand(4, 3)
    for product in (x @ weight.t(), torch.mm(x, weight.float().T), nn.functional.linear(x, weight.double().float())):
        assert torch.equal(product, expected)
        assert type(product) is torch.Tensor
    assert type(weight + 1) is torch.Tensor


def test_corrections_beside_a_divided_router_are_an_error(monkeypatch):
    monkeypatch.setattr("hf_prune.structures.routing.is_divided", lambda parameter: True)
    with pytest.raises(
        ValueError, match=r"DeepSpeed's stage 3 divides the weight of the router 'model\.layers\.0\.mlp"
    ):
        prune(build_mixture("minimax_m2"), CONFIG)
    prune(build_mixture("mixtral"), CONFIG)  # Its router needs nothing else.


def test_saving_it_unshrunk_says_what_that_means(tmp_path, caplog):
    model = pruned("mixtral")
    save_pretrained(model, tmp_path / "masked")
    assert SAVED_UNBARRED in caplog.text
    caplog.clear()
    save_pretrained(shrink(model), tmp_path / "shrunk")
    assert SAVED_UNBARRED not in caplog.text
