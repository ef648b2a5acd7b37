"""Compensation against least squares, one projection after the other, with inputs that hooks have seen."""

import copy
import re
from collections import Counter

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_prune import PruningConfig, prune, shrink
from hf_prune.reconstruction import compensation
from hf_prune.reconstruction.compensation import RIDGE, solved
from hf_prune.reconstruction.stages import Stages
from tests.structures.mixtures import build_mixture
from tests.structures.models import build, inputs_of, logits_of


def config_of(granularity, **others):
    others = {"sparsity": 0.5, "scope": "layer", "criterion": "magnitude", **others}
    others |= {"multiple_of": 1} if "neuron" in granularity else {}
    return PruningConfig(granularity=granularity, schedule="one_shot", **others)


def samples_of(model, count=6):
    """Batches with a few samples each, all of other values."""
    batches = []
    for seed in range(count):
        torch.manual_seed(seed)
        batch = inputs_of(model, size=2)
        batches.append({n: torch.randint_like(v, 3, 60) if v.dtype == torch.int64 else torch.randn_like(v)
                        for n, v in batch.items()})  # fmt: skip
    return batches


def least_squares(weight, x, stays, missing=0.0):
    """`[out, in]` by `lstsq`: what stays makes up for what goes and what is missing, and is drawn to what it was."""
    inner = x[:, stays]
    ridge = (RIDGE * inner.square().sum(0).mean()).sqrt() * torch.eye(inner.shape[1], dtype=x.dtype)
    wanted = torch.cat([x @ weight.T + missing, ridge @ weight[:, stays].T])
    found = torch.zeros_like(weight)
    found[:, stays] = torch.linalg.lstsq(torch.cat([inner, ridge]), wanted, driver="gelsd").solution.T
    return found


def with_intercept(weight, bias, x, stays, missing=0.0):
    """The same of a projection with a bias, which is drawn to nothing."""
    inner = x[:, stays]
    ridge = (RIDGE * (inner - inner.mean(0)).square().sum(0).mean()).sqrt() * torch.eye(
        int(stays.sum()), dtype=x.dtype
    )
    system = torch.cat(
        [torch.cat([inner, torch.ones(len(x), 1)], 1), torch.cat([ridge, torch.zeros(len(ridge), 1)], 1)]
    )
    wanted = torch.cat([x @ weight.T + bias + missing, ridge @ weight[:, stays].T])
    solution = torch.linalg.lstsq(system, wanted, driver="gelsd").solution
    found = torch.zeros_like(weight)
    found[:, stays] = solution[:-1].T
    return found, solution[-1]


def correlated(positions, inputs):
    mix = torch.randn(inputs, inputs, dtype=torch.float64) + torch.rand(inputs, 1, dtype=torch.float64)
    return torch.randn(positions, inputs, dtype=torch.float64) @ mix


@pytest.mark.parametrize("positions", [5, 12, 200])
@pytest.mark.parametrize("gone", [1, 5, 11])
def test_rows_are_those_of_ridge_regression(positions, gone):
    torch.manual_seed(gone)
    weight, x = torch.randn(7, 12, dtype=torch.float64), correlated(positions, 12)
    stays = torch.arange(12) >= gone
    found = solved(weight, x.T @ x, stays, torch.float64)
    torch.testing.assert_close(found, least_squares(weight, x, stays), rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_error_of_no_row_is_above_that_of_zeros(dtype):
    for seed in range(20):
        torch.manual_seed(seed)
        weight, x = torch.randn(64, 24), correlated(4 + 10 * seed, 24).float()
        if seed % 2:  # There is nothing to gain where inputs have nothing to do with each other.
            x = torch.linalg.qr(torch.randn(40, 24)).Q
        weight = weight.to(dtype).float()
        stays = torch.rand(24) < 0.6
        found, without = solved(weight, x.T @ x, stays, dtype), weight * stays
        assert torch.equal(found, found.to(dtype).float())
        error = ((weight - found).double() @ x.double().T).square().sum(1)
        assert (error <= (1 + 1e-6) * ((weight - without).double() @ x.double().T).square().sum(1)).all()
        assert not found[:, ~stays].any()


def test_what_cannot_be_factorized_only_loses_what_goes():
    weight, stays = torch.randn(3, 4), torch.tensor([True, True, False, False])
    moments = torch.tensor([[1.0, 9, 1, 1], [9, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]])  # Those of nothing.
    assert torch.equal(solved(weight, moments, stays, torch.float32), weight * stays)


def projections_of(model):
    """Projection → its weight, as `[out, in]`, and its mask's."""
    kinds = (nn.Linear, Conv1D)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def as_rows(module, values):
    return values.T if isinstance(module, Conv1D) else values


@torch.no_grad()
def inputs_of_module(model, module, batches):
    """`[positions, in]`: what goes into a module."""
    seen = []
    hook = module.register_forward_hook(lambda m, args, _: seen.append(args[0].flatten(0, -2)))
    for batch in batches:
        model(**batch)
    hook.remove()
    return torch.cat(seen)


@torch.no_grad()
def sums_of(model, batches, readers):
    """Projection → `[positions, out]`: what the first reader behind it reads, which is the residual stream."""
    open_, sums = [], {}

    def read(_, args):
        for name in open_:
            sums.setdefault(name, []).append(args[0].flatten(0, -2))
        open_.clear()

    hooks = [
        module.register_forward_hook(lambda *_, name=name: open_.append(name))
        for name, module in projections_of(model).items()
    ]
    hooks += [reader.register_forward_pre_hook(read) for reader in readers(model)]
    for batch in batches:
        model(**batch)
        open_.clear()
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(each) for name, each in sums.items()}


def norms_of(model):
    return [module for module in model.modules() if type(module).__name__.endswith("Norm")]


def by_hooks(model, masks, batches, readers=norms_of):
    """Each projection that reads what goes is solved anew, in the order of their first calls."""
    order, dense = [], sums_of(model, batches, readers)
    hooks = [m.register_forward_hook(lambda m, *_: order.append(m)) for m in projections_of(model).values()]
    names = {module: name for name, module in projections_of(model).items()}
    with torch.no_grad():
        model(**batches[0])
    for hook in hooks:
        hook.remove()
    for module in dict.fromkeys(order):
        mask = masks.get(f"{names[module]}.weight")
        if mask is None or (stays := as_rows(module, mask).any(0)).all() or not stays.any():
            continue
        with torch.no_grad():
            weight, x = as_rows(module, module.weight), inputs_of_module(model, module, batches)
            now = sums_of(model, batches, readers)
            missing = dense[names[module]] - now[names[module]] if names[module] in now else 0.0
            if module.bias is None:
                weight.copy_(least_squares(weight.clone(), x, stays, missing))
            else:
                rows, bias = with_intercept(weight.clone(), module.bias.clone(), x, stays, missing)
                weight.copy_(rows)
                module.bias.copy_(bias)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter *= masks.get(name, torch.ones(()))
    return model


FAMILIES = ["llama", "llama with biases", "gpt2", "opt", "bert", "vit", "t5 with gates", "bart"]
CASES = [(name, kinds) for name in FAMILIES for kinds in ("head", "neuron", "head+neuron")]
CASES += [("gpt_neox", "head+neuron"), ("gemma2", "query+neuron")]
CASES += [("llama", "query"), ("llama", "query+neuron")]  # Of the others each query has a key of its own.
READERS = {
    # Attention and feed-forward are added to the stream together.
    "gpt_neox": lambda model: [
        *(layer.input_layernorm for layer in model.gpt_neox.layers),
        model.gpt_neox.final_layer_norm,
    ],
    "gemma2": lambda _: [],  # What is added is the output of another norm.
}
FAST = [("llama", "query+neuron"), ("gpt2", "head+neuron"), ("bert", "neuron"), ("t5 with gates", "head")]
MARKED = [case if case in FAST else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize(("name", "granularity"), MARKED)
def test_a_model_is_what_least_squares_make_of_it_one_after_the_other(name, granularity):
    dense = build(name, torch.float64)
    batches = samples_of(dense)
    masked, found = copy.deepcopy(dense), copy.deepcopy(dense)
    prune(masked, config_of(granularity))
    masks = {n: p != 0 for n, p in masked.named_parameters() if not (p != 0).all()}
    prune(found, config_of(granularity, reconstruct=True, calibration_samples=12), batches)
    expected = by_hooks(copy.deepcopy(dense), masks, batches, READERS.get(name, norms_of))
    changed = 0
    for path, parameter in found.named_parameters():
        torch.testing.assert_close(parameter, expected.get_parameter(path), rtol=0, atol=1e-8, msg=path)
        changed += not torch.equal(parameter, masked.get_parameter(path))
    assert changed >= 3
    before = logits_of(found)
    shrink(found)
    torch.testing.assert_close(logits_of(found), before)


@pytest.mark.parametrize(("name", "granularity"), MARKED)
def test_it_takes_at_most_twice_the_passes_it_needs(name, granularity):
    model, products = build(name), Counter()
    for module in projections_of(model).values():
        module.register_forward_hook(
            lambda m, args, _: products.update({m: args[0][..., 0].numel() * m.weight.numel()})
        )
    batches = samples_of(model, count=12)
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    needed = 2 * products.total()  # A pass of the model as it changes, and one of the dense model.
    products.clear()
    prune(model, config_of(granularity, reconstruct=True, calibration_samples=24), batches)
    # BART looks, behind its encoder, for padding of the decoder. So all batches are seen before anything is solved.
    assert products.total() <= (2.5 if name == "bart" else 2) * needed


@pytest.mark.parametrize("name", ["mixtral", "switch_transformers"])
def test_experts_are_solved_anew_each_by_the_tokens_that_come_to_it(name):
    dense = build_mixture(name, torch.float32)
    batches = samples_of(dense, 40)
    errors = {}
    for reconstruct in (False, True):
        model = copy.deepcopy(dense)
        how = dict(reconstruct=True, calibration_samples=80) if reconstruct else {}
        prune(model, config_of("neuron", **how), batches if reconstruct else None)
        with torch.no_grad():
            errors[reconstruct] = sum((model(**b).logits - dense(**b).logits).square().sum().item() for b in batches)
    assert errors[True] < 0.8 * errors[False]


def test_layers_that_go_are_gone_from_the_beginning():
    """What is solved behind them sees the stream without them."""
    dense = build("llama", torch.float64)
    batches = samples_of(dense)
    kinds = dict(sparsity=0.34, scope="auto")
    together, masked = copy.deepcopy(dense), copy.deepcopy(dense)
    prune(together, config_of("layer+neuron", **kinds, reconstruct=True, calibration_samples=12), batches)
    prune(masked, config_of("layer+neuron", **kinds))
    masks = {n: p != 0 for n, p in masked.named_parameters() if not (p != 0).all()}
    assert any(not mask.any() for mask in masks.values())
    first = copy.deepcopy(dense)
    with torch.no_grad():
        for name, mask in masks.items():
            first.get_parameter(name).mul_(mask.any())
    for name, parameter in by_hooks(first, masks, batches).named_parameters():
        torch.testing.assert_close(together.get_parameter(name), parameter, rtol=0, atol=1e-8, msg=name)


def test_later_cuts_leave_alone_what_went_before():
    model = build("llama", torch.float64)
    batches = samples_of(model)
    prune(model, config_of("neuron", sparsity=0.25, reconstruct=True, calibration_samples=12), batches)
    before = copy.deepcopy(model.state_dict())
    again = config_of("neuron", sparsity=0.25, reconstruct=True, calibration_samples=12, hold_zeros=True)
    prune(model, again, batches)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_stream_that_overflows_is_left_alone(monkeypatch):
    dense = build("llama")
    batches = samples_of(dense)
    found, expected = copy.deepcopy(dense), copy.deepcopy(dense)
    run = Stages.run_beside_dense

    def cut(model, change):
        def beside(stages, stage, on_product):
            run(stages, stage, lambda *given: lambda difference: on_product(*given)(change(difference)))

        monkeypatch.setattr(Stages, "run_beside_dense", beside)
        prune(model, config_of("neuron", reconstruct=True, calibration_samples=12), batches)

    cut(found, lambda difference: difference + torch.inf)
    cut(expected, lambda _: None)
    assert all(torch.equal(p, q) for p, q in zip(found.parameters(), expected.parameters(), strict=True))
    cut(together := copy.deepcopy(dense), lambda difference: difference)
    assert any(not torch.equal(p, q) for p, q in zip(together.parameters(), expected.parameters(), strict=True))


def test_few_tokens_are_said(caplog):
    model = build("llama")
    config = config_of("neuron", sparsity=1 / 24, reconstruct=True, calibration_samples=2)
    prune(model, config, samples_of(model, 1))
    assert "3 projections were solved anew from fewer tokens than they have inputs (20 for 23)" in caplog.text
    caplog.clear()
    prune(build("llama"), config_of("neuron", reconstruct=True, calibration_samples=12), samples_of(model))
    assert "solved anew" not in caplog.text


def test_experts_that_no_token_reaches_are_said_and_only_lose_what_goes(caplog):
    dense = build_mixture("mixtral", torch.float32)
    model, masked = copy.deepcopy(dense), copy.deepcopy(dense)
    batches = [{"input_ids": torch.tensor([[3]])}]  # Two experts are reached.
    prune(model, config_of("neuron", reconstruct=True, calibration_samples=1), batches)
    prune(masked, config_of("neuron"))
    assert "No calibration sample was seen to reach 6 of the 8 parts of" in caplog.text
    weight, zeroed = (each.model.layers[0].mlp.experts.down_proj for each in (model, masked))
    assert sum(torch.equal(one, other) for one, other in zip(weight, zeroed, strict=True)) >= 6


def test_an_error_behind_the_first_layer_leaves_all_as_it_was(monkeypatch):
    model = build("gpt2")
    before, calls = copy.deepcopy(model.state_dict()), []

    def fail(*args):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return solved(*args)

    monkeypatch.setattr(compensation, "solved", fail)
    config = config_of("head+neuron", reconstruct=True, calibration_samples=12)
    with pytest.raises(RuntimeError, match="out of memory"):
        prune(model, config, samples_of(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("dtype", "score_steps"), [(torch.float32, 2), (torch.bfloat16, 1)])
def test_steps_and_half_precision_lose_less_too(dtype, score_steps):
    dense = build("llama", dtype)
    batches, errors = samples_of(dense), {}
    for reconstruct in (False, True):
        model = copy.deepcopy(dense)
        how = dict(criterion="activation", calibration_samples=12, score_steps=score_steps, reconstruct=reconstruct)
        prune(model, config_of("neuron", **how), batches)
        with torch.no_grad():
            gaps = [(model(**batch).logits - dense(**batch).logits).float().square().sum() for batch in batches]
        errors[reconstruct] = sum(gaps)
    assert errors[True] < 0.8 * errors[False]


ERRORS = {
    "weights": (dict(granularity="unstructured"), "reconstruct is about structures"),
    "layers": (
        dict(granularity="layer"),
        r"reconstruct is about what a projection reads \(.*\), and .*'layer' has none",
    ),
    "experts": (dict(granularity="expert"), "reconstruct is about what a projection reads"),
    "channels": (dict(granularity="channel"), "reconstruct is about what a projection reads"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_nothing_can_make_up_for(name):
    fields, match = ERRORS[name]
    with pytest.raises(ValueError, match=match):
        PruningConfig(sparsity=0.5, reconstruct=True, **fields)


def test_without_samples_nothing_is_touched():
    model = build("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=re.escape("reconstruct=True looks at data (what goes into each layer)")):
        prune(model, config_of("neuron", reconstruct=True))
    broken = {"inputs_embeds": torch.full((1, 4, 24), float("nan"))}
    with pytest.raises(ValueError, match="is NaN or infinite over the calibration samples"):
        prune(model, config_of("neuron", reconstruct=True, calibration_samples=1), [broken])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
