"""Gates behind structures, against gates that are really there: a factor for each position, by autograd."""

import pytest
import torch
from torch.nn import functional

from hf_prune import PruningConfig, prune
from hf_prune.calibration.statistics import calibrate
from hf_prune.plan import Plan, resolve
from hf_prune.structures.gates import GateFisher
from tests.structures.mixtures import build_mixture
from tests.structures.models import build, inputs_of
from tests.structures.test_contributions import READ_BY


def config_of(granularity, **others):
    multiple = {"multiple_of": 1} if "neuron" in granularity else {}
    return PruningConfig(granularity=granularity, criterion="gate_fisher", **{"sparsity": 0.5, **multiple, **others})


def gates_of(model, granularity, batches):
    plan = Plan.of(model, config_of(granularity))
    gather = {"it": lambda: GateFisher(model, plan.structures, plan.targets)}
    return calibrate(model, plan.targets, batches, (), 100, others=gather)["it"]


def labelled(model, seed=0):
    torch.manual_seed(seed)
    inputs = {n: torch.randint_like(v, 3, 60) if v.dtype == torch.int64 else v for n, v in inputs_of(model).items()}
    if "SequenceClassification" in type(model).__name__:
        return {**inputs, "labels": torch.tensor([0, 2])}
    return {**inputs, "labels": inputs.get("decoder_input_ids", inputs["input_ids"])}


def by_gates(model, batches, projection, count, first):
    """Module → `[count]`: the mean over labels of squared gradients of real gates, of a `[tokens, count]` factor."""
    totals, labels = {}, 0
    for batch in batches:
        gates, hooks = {}, []

        def multiply(module, args, name=None, gates=gates):
            x = args[0]
            gate = torch.ones(*x.shape[:-1], count, dtype=x.dtype, requires_grad=True)
            gates[name] = gate
            return (x * gate.repeat_interleave(x.shape[-1] // count, -1), *args[1:])

        for name, module in model.named_modules():
            if name.endswith(projection):
                hooks.append(module.register_forward_pre_hook(lambda m, a, n=name, f=multiply: f(m, a, n)))
        loss = model(**batch).loss
        seen = int(batch["labels"].view(2, -1)[:, first:].ne(-100).sum())  # Nothing predicts the first token.
        (loss * seen).backward()
        labels += seen
        for hook in hooks:
            hook.remove()
        for name, gate in gates.items():
            totals[name] = totals.get(name, 0) + gate.grad.double().square().flatten(0, -2).sum(0)
        model.zero_grad()
    return {name: total / labels for name, total in totals.items()}


@pytest.mark.parametrize(
    ("name", "granularity", "projection", "count"),
    [
        *READ_BY,
        ("t5", "neuron", "DenseReluDense.wo", 24),
    ],
)
def test_they_are_what_real_gates_give(name, granularity, projection, count):
    model = build(name)
    batches = [labelled(model, seed) for seed in range(2)]
    if name != "bert":
        batches[0]["labels"] = batches[0]["labels"].clone()
        batches[0]["labels"][0, 4:] = -100  # Labels count, not tokens.
    found = gates_of(model, granularity, batches)
    expected = by_gates(model, batches, projection, count, first=int(name in ("llama", "gpt2")))
    assert len(found) == len(expected)
    for values, wanted in zip(found.values(), expected.values(), strict=True):
        assert values.dtype == torch.float64
        torch.testing.assert_close(values, wanted, rtol=1e-4, atol=1e-12)
        assert (values > 0).any()


def test_neurons_of_experts_have_gates_of_their_own(monkeypatch):
    model = build_mixture("mixtral")
    model.config._experts_implementation = "eager"  # No kernel knows float64.
    batch = labelled(model)
    found = gates_of(model, "neuron", [batch])
    linear, gates = functional.linear, []
    weights = {layer.mlp.experts.down_proj: i for i, layer in enumerate(model.model.layers)}
    places = {weight.untyped_storage()._cdata: (i, weight) for weight, i in weights.items()}

    def gated(x, weight, bias=None):
        if (place := places.get(weight.untyped_storage()._cdata)) is not None:
            gate = torch.ones_like(x, requires_grad=True)
            gates.append((place[0], weight.storage_offset() // weight.numel(), gate))
            x = x * gate
        return linear(x, weight, bias)

    monkeypatch.setattr(functional, "linear", gated)
    labels = batch["labels"][:, 1:].numel()
    (model(**batch).loss * labels).backward()
    expected = [torch.zeros(len(w), w.shape[-1], dtype=torch.float64) for w in weights]
    for layer, expert, gate in gates:
        expected[layer][expert] += gate.grad.square().sum(0) / labels
    assert len(found) == len(expected)
    for values, wanted in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(values.view_as(wanted), wanted, rtol=1e-4, atol=1e-12)


def test_structures_of_all_layers_compete():
    config = config_of("head+neuron")
    assert resolve(config).scope.name == "global"
    model = build("llama")
    report = prune(model, config, [labelled(model, seed) for seed in range(4)])
    assert len({row.zeros for row in report.structures if row.kind == "neuron"}) > 1


def test_the_least_are_pruned():
    model = build("llama")
    batches = [labelled(model, seed) for seed in range(4)]
    scores = gates_of(model, "neuron", batches)
    prune(model, config_of("neuron", scope="layer"), batches)
    for name, values in scores.items():
        lost = model.get_submodule(name).down_proj.weight.eq(0).all(0)
        assert int(lost.sum()) == 12
        assert values[lost].max() <= values[~lost].min()


@pytest.mark.parametrize("kind", ["width", "layer", "expert", "channel"])
def test_kinds_that_have_no_gates(kind):
    with pytest.raises(ValueError, match="'gate_fisher' scores whole heads and queries and neurons, not"):
        PruningConfig(sparsity=0.5, granularity=kind, criterion="gate_fisher")


def test_it_needs_labels():
    model = build("llama")
    with pytest.raises(ValueError, match="gives no loss for calibration batches"):
        prune(model, config_of("neuron"), [inputs_of(model)])


def test_a_layer_that_gradients_do_not_reach_is_named():
    model = build("llama")
    batch = labelled(model)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    with pytest.raises(ValueError, match=r"no gradient was seen to reach the neurons of 'model.layers.0.mlp'"):
        prune(model, config_of("neuron"), [batch])


class OwnBackward(torch.autograd.Function):
    """A projection whose product autograd does not see."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return functional.linear(x, weight)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.flatten(0, -2).T @ x.flatten(0, -2)


def test_projections_with_a_backward_pass_of_their_own_are_an_error():
    model = build("llama")
    projection = model.model.layers[1].mlp.down_proj
    projection.forward = lambda x: OwnBackward.apply(x, projection.weight)
    with pytest.raises(ValueError, match=r"the gradient of what 'model\.layers\.1\.mlp\.down_proj' gives"):
        prune(model, config_of("neuron"), [labelled(model)])
