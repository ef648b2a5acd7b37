"""What routers give experts, against plain loops over tokens and experts."""

import pytest
import torch
from torch import nn

from hf_prune import PruningConfig, prune
from hf_prune.calibration.statistics import calibrate
from hf_prune.plan import Plan
from hf_prune.structures.routed import Routed
from hf_prune.structures.statistics import RoutedOutput, RoutedShare
from tests.structures.mixtures import EXPERTS, build_mixture

CONFIG = PruningConfig(sparsity=0.375, granularity="expert", schedule="one_shot", criterion="reap")


def batch_of(padded):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 60, (3, 11), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, 6:] = mask[2, 9:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


def statistic_of(model, kind, batches):
    structures = Plan.of(model, CONFIG).structures
    return calibrate(model, {}, batches, (), 100, others={"it": lambda: kind(model, structures, {})})["it"]


def inputs_of(model, names, batch):
    """What the blocks with these experts are called with."""
    found = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kwargs, name=name: found.__setitem__(name, [*args, *kwargs.values()]), with_kwargs=True
        )
        for name in names
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return found


def mixtral_expert(experts, e, x):
    gate, up = (experts.gate_up_proj[e] @ x).chunk(2)
    return experts.down_proj[e] @ (nn.functional.silu(gate) * up)


def gpt_oss_expert(experts, e, x):
    both = x @ experts.gate_up_proj[e] + experts.gate_up_proj_bias[e]
    gate, up = both[::2].clamp(max=experts.limit), both[1::2].clamp(-experts.limit, experts.limit)
    return ((up + 1) * gate * torch.sigmoid(gate * experts.alpha)) @ experts.down_proj[e] + experts.down_proj_bias[e]


def by_a_loop(model, names, batch, expert, power=1):
    """`Σ (g ‖f(x)‖)^power`, and how many tokens, token by token and expert by expert."""
    given, real = inputs_of(model, names, batch), batch["attention_mask"].flatten().bool()
    sums, counts = {}, {}
    for name in names:
        states, index, weights = given[name]
        states, experts = states.reshape(len(real), -1), model.get_submodule(name)
        sums[name], counts[name] = torch.zeros(EXPERTS).double(), torch.zeros(EXPERTS).double()
        for t in range(len(real)):
            for e in range(EXPERTS):
                for k in range(index.shape[1]):
                    if real[t] and index[t, k] == e:
                        out = expert(experts, e, states[t])
                        sums[name][e] += (float(weights[t, k]) * float(out.norm())) ** power
                        counts[name][e] += 1
    return sums, counts, int(real.sum())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("mixtral", mixtral_expert),
        ("qwen3_moe", mixtral_expert),
        ("deepseek_v3", mixtral_expert),
        ("gpt_oss", gpt_oss_expert),
    ],
)
def test_reap_and_frequency_are_what_a_loop_gives(name, expert, padded):
    model, batch = build_mixture(name, torch.float32), batch_of(padded)
    reap = statistic_of(model, RoutedOutput, [batch, batch])
    share = statistic_of(model, RoutedShare, [batch, batch])
    with torch.no_grad():
        sums, counts, tokens = by_a_loop(model, list(reap), batch, expert)
    for place, values in reap.items():
        expected = sums[place] / counts[place].clamp_min(1)
        assert values.dtype == torch.float64
        assert torch.allclose(values, expected, rtol=1e-4), place
        assert torch.allclose(share[place], counts[place] / tokens, rtol=1e-6)
        assert (values > 0).sum() >= 2


def test_experts_of_a_list_are_seen_too():
    """Switch chooses one expert for each token; its outputs are seen at the experts themselves."""
    model = build_mixture("switch_transformers", torch.float32)
    batch = {**batch_of(False), "decoder_input_ids": batch_of(False)["input_ids"][:, :5]}
    del batch["labels"]
    found, share = statistic_of(model, RoutedOutput, [batch]), statistic_of(model, RoutedShare, [batch])
    for place, values in found.items():
        experts, outputs = model.get_submodule(place), {}
        hooks = [
            each.register_forward_hook(lambda _, args, out, key=key, outputs=outputs: outputs.__setitem__(key, out))
            for key, each in experts.named_children()
        ]
        ((_, chosen, weights),) = [inputs_of(model, [place], batch)[place]]
        for hook in hooks:
            hook.remove()
        for e in range(EXPERTS):
            tokens = chosen[:, 0, e].nonzero().flatten()
            expected = 0.0
            if len(tokens):
                expected = (weights[tokens, 0] * outputs[f"expert_{e}"].norm(dim=-1)).mean()
            assert float(values[e]) == pytest.approx(float(expected), rel=1e-4)
            assert float(share[place][e]) == pytest.approx(len(tokens) / len(chosen))


@torch.no_grad()
def test_experts_that_read_scaled_states_are_seen_too():
    """Llama 4 multiplies what an expert reads, so that its output is what it adds."""
    model, batch = build_mixture("llama4_text", torch.float32), batch_of(False)
    found = statistic_of(model, RoutedOutput, [batch])
    for place, values in found.items():
        (states,) = inputs_of(model, [place], batch)[place]
        experts, states = model.get_submodule(place), states.view(EXPERTS, -1, states.shape[-1])
        for e in range(EXPERTS):
            norms = []
            for x in states[e]:
                if x.any():
                    gate, up = (x @ experts.gate_up_proj[e]).chunk(2)
                    norms.append(float(((up * experts.act_fn(gate)) @ experts.down_proj[e]).norm()))
            assert float(values[e]) == pytest.approx(sum(norms) / max(len(norms), 1), rel=1e-4)


def test_planted_experts_are_the_ones_that_go():
    model = build_mixture("mixtral", torch.float32)
    batch = {
        "input_ids": torch.randint(3, 60, (16, 40), generator=torch.Generator().manual_seed(5))
    }  # All are chosen.
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.down_proj[[1, 4, 6]] *= 1e-3
    prune(model, CONFIG, [batch])
    for layer in model.model.layers:
        assert (layer.mlp.experts.down_proj == 0).flatten(1).all(1).nonzero().flatten().tolist() == [1, 4, 6]


def test_an_expert_that_no_token_reaches_goes_first():
    model, batch = build_mixture("gpt_oss", torch.float32), batch_of(False)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.router.bias[[0, 3, 5]] = -1e4
    for kind in (RoutedOutput, RoutedShare):
        assert all(values[[0, 3, 5]].tolist() == [0, 0, 0] for values in statistic_of(model, kind, [batch]).values())
    prune(model, CONFIG, [batch])
    for layer in model.model.layers:
        assert (layer.mlp.experts.down_proj == 0).flatten(1).all(1).nonzero().flatten().tolist() == [0, 3, 5]


def test_other_granularities_are_an_error():
    for criterion in ("reap", "frequency"):
        for granularity in ("neuron", "expert+neuron", "unstructured"):
            with pytest.raises(ValueError, match=f"criterion '{criterion}' scores whole experts, not "):
                PruningConfig(sparsity=0.5, granularity=granularity, criterion=criterion)


def test_they_look_at_data():
    with pytest.raises(ValueError, match=r"'reap' .* looks at data"):
        prune(build_mixture("mixtral", torch.float32), CONFIG)


def test_experts_that_are_called_in_a_way_of_their_own_are_an_error():
    model = build_mixture("jetmoe", torch.float32)
    for length in (8, 11):  # As many tokens as experts, or a multiple of them, and others.
        batch = {"input_ids": torch.randint(3, 60, (2, length), generator=torch.Generator().manual_seed(5))}
        with pytest.raises(ValueError, match="no token was seen on its way to the experts 'model"):
            prune(model, CONFIG, [batch])


def test_what_experts_are_called_with_may_be_something_else():
    states, fused = torch.ones(6, 4), nn.ParameterDict({"w": nn.Parameter(torch.ones(3, 4, 4))})
    assert Routed.of(fused, (), 3) is None
    assert Routed.of(fused, (states, torch.ones(6, 2), torch.ones(6, 2)), 3) is None  # No numbers of experts.
    assert Routed.of(fused, (torch.ones(5, 4),), 3) is None  # No multiple of their number.
    behind = Routed.of(fused, (states, torch.tensor([[0, 3]] * 6), torch.ones(6, 2)), 3)  # Those of another process.
    assert behind.numbers.tolist() == [0] * 6
