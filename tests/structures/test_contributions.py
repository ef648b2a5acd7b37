"""What structures contribute, against plain loops over what goes into the projections that read them."""

import pytest
import torch

from hf_prune import PruningConfig, prune
from hf_prune.calibration.statistics import calibrate
from hf_prune.plan import Plan, resolve
from hf_prune.structures.contributions import Contribution
from tests.structures.mixtures import EXPERTS, build_mixture
from tests.structures.models import build, inputs_of
from tests.structures.test_routed import batch_of, by_a_loop, mixtral_expert

READ_BY = [
    ("llama", "head", "self_attn.o_proj", 3),
    ("llama", "query", "self_attn.o_proj", 12),
    ("llama", "neuron", "mlp.down_proj", 24),
    ("gpt2", "head", "attn.c_proj", 4),
    ("gpt2", "neuron", "mlp.c_proj", 64),
    ("bert", "head", "attention.output.dense", 4),
]
"""Model, kind, the projection that reads it, and how many there are in a layer."""


def contribution_of(model, granularity, batches):
    multiple = {"multiple_of": 1} if set(granularity.split("+")) & {"neuron", "width"} else {}
    config = PruningConfig(sparsity=0.5, granularity=granularity, criterion="activation", **multiple)
    plan = Plan.of(model, config)
    gather = {"it": lambda: Contribution(model, plan.structures, plan.targets)}
    return calibrate(model, plan.targets, batches, (), 100, others=gather)["it"], plan.structures


def products_of(model, batch):
    """Module → what goes into it, `[tokens, in]`, of all linear layers."""
    found, hooks = {}, []
    for name, module in model.named_modules():
        if hasattr(module, "weight") and module.weight.ndim == 2 and not isinstance(module, torch.nn.Embedding):
            hooks.append(module.register_forward_pre_hook(lambda _, args, name=name: found.update({name: args[0]})))
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return {name: value.flatten(0, -2).double() for name, value in found.items()}


def columns_of(module):
    weight = module.weight.detach().double()
    return weight if isinstance(module, torch.nn.Linear) else weight.T


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("name", "granularity", "projection", "count"),
    [
        *READ_BY,
        ("bert", "neuron", "output.dense", 24),
    ],
)
def test_heads_queries_and_neurons(name, granularity, projection, count, padded):
    model, batch = build(name), inputs_of(build(name))
    keep = torch.ones(batch["input_ids"].shape, dtype=torch.bool)
    if padded:
        keep[0, 5:] = False
        batch["attention_mask"] = keep.long()
    found, structures = contribution_of(model, granularity, [batch])
    inputs = products_of(model, batch)
    assert found
    for place, values in found.items():
        layer = next(part for part in inputs if part.endswith(projection) and part.split(".")[:-2] and
                     place.startswith(part.removesuffix(projection).rstrip(".")))  # fmt: skip
        x, columns = inputs[layer][keep.flatten()], columns_of(model.get_submodule(layer))
        assert len(values) == count == structures[place].count
        each = x.shape[1] // count
        for s in range(count):
            own = slice(s * each, (s + 1) * each)
            expected = (x[:, own] @ columns[:, own].T).square().sum(1).mean().sqrt()
            assert float(values[s]) == pytest.approx(float(expected), rel=1e-4)


def test_widths_count_for_all_that_read_them():
    model, batch = build("llama"), inputs_of(build("llama"))
    found, _ = contribution_of(model, "width", [batch])
    inputs = products_of(model, batch)
    energy = torch.zeros(24, dtype=torch.float64)
    for name, x in inputs.items():
        module = model.get_submodule(name)
        if name != "lm_head" and name.rpartition(".")[2] not in ("o_proj", "down_proj"):
            energy += x.square().mean(0) * columns_of(module).square().sum(0)
    ((_, values),) = found.items()
    assert torch.allclose(values, energy.sqrt(), rtol=1e-4)


@pytest.mark.parametrize("padded", [False, True])
def test_experts(padded):
    model, batch = build_mixture("mixtral", torch.float32), batch_of(padded)
    found, _ = contribution_of(model, "expert", [batch, batch])
    with torch.no_grad():
        squares = by_a_loop(model, list(found), batch, mixtral_expert, power=2)
    for place, values in found.items():
        assert torch.allclose(values, (squares[0][place] / squares[2]).sqrt(), rtol=1e-4)


def test_neurons_of_experts_beside_experts():
    model, batch = build_mixture("mixtral", torch.float32), batch_of(False)
    found, structures = contribution_of(model, "expert+neuron", [batch])
    neurons = {place: values for place, values in found.items() if structures[place].kind == "neuron"}
    assert len(neurons) == 2
    assert {place: len(values) for place, values in found.items() if place not in neurons} == dict.fromkeys(
        (place.removesuffix(".down_proj") for place in neurons), EXPERTS
    )
    for values in neurons.values():
        assert (values.view(EXPERTS, -1).sum(1) > 0).sum() >= 2
    prune(
        model,
        PruningConfig(sparsity=0.25, granularity="expert+neuron", criterion="activation", multiple_of=2),
        [batch],
    )


def test_the_neuron_that_does_least_goes():
    model = build("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, 5] *= 1e-4
            layer.mlp.down_proj.weight[:, 6] *= 1e3
            layer.mlp.up_proj.weight[6] *= 1e-6  # Its column is large, what goes into it is not.
    config = PruningConfig(sparsity=2 / 24, granularity="neuron", criterion="activation", scope="layer", multiple_of=2)
    prune(model, config, [inputs_of(model)])
    for layer in model.model.layers:
        gone = (layer.mlp.down_proj.weight == 0).all(0).nonzero().flatten().tolist()
        assert gone == [5, 6]


def test_neurons_of_experts_that_are_gone_are_seen_no_more():
    """Of Switch, whose experts are networks in a list: later rounds find some of them at zero."""
    model = build_mixture("switch_transformers", torch.float32)
    gone = [
        model.encoder.block[1].layer[1].mlp.experts["expert_3"],
        model.decoder.block[1].layer[2].mlp.experts["expert_5"],
    ]
    with torch.no_grad():
        for expert in gone:
            for parameter in expert.parameters():
                parameter.zero_()
    config = PruningConfig(sparsity=0.5, granularity="neuron", criterion="activation", multiple_of=2)
    plan = Plan.of(model, config)
    gatherer = Contribution(model, plan.structures, plan.targets)
    for reader in (each for readers in gatherer._readers.values() for each in readers):
        if reader.target.weight.any():  # As if a token had come to all others.
            reader.add_(torch.ones(1, 2, reader.target.in_features), slice(None))
    found = gatherer.statistic()
    assert sum(not values.any() for values in found.values()) == len(gone)


def test_what_no_sample_reaches_is_an_error():
    model = build("t5")
    model.encoder.block[1].layer[1].DenseReluDense.wo = torch.nn.Linear(24, 16, bias=False)
    batch = inputs_of(model)
    with torch.no_grad():
        model.encoder.block[1].layer[1].DenseReluDense.wi.weight.zero_()
    with pytest.raises(
        ValueError, match=r"no calibration sample was seen to go through the neurons of 'encoder\.block"
    ):
        contribution_of(model, "neuron", [batch])


def test_padding_does_not_count_on_either_side_of_an_encoder_decoder():
    model = build("t5")
    generator = torch.Generator().manual_seed(3)
    tokens, target = (torch.randint(3, 60, (2, n), generator=generator) for n in (6, 5))

    def padded(ids, to):
        return torch.cat([ids, torch.full((2, to - ids.shape[1]), 7)], 1)

    def ones(ids, to):
        return padded(torch.ones_like(ids), to) == 1

    plain = {"input_ids": tokens, "decoder_input_ids": target}
    more = {
        "input_ids": padded(tokens, 9),
        "attention_mask": ones(tokens, 9).long(),
        "decoder_input_ids": padded(target, 9),
        "decoder_attention_mask": ones(target, 9).long(),
    }
    for granularity in ("head", "neuron"):
        expected, found = (contribution_of(model, granularity, [batch])[0] for batch in (plain, more))
        for place in expected:
            assert torch.allclose(found[place], expected[place], rtol=1e-4), place


@pytest.mark.parametrize(("criterion", "scope"), [("activation", "layer"), ("taylor", "global")])
def test_each_place_loses_the_same_share_by_default(criterion, scope):
    assert resolve(PruningConfig(sparsity=0.5, granularity="neuron", criterion=criterion)).scope.name == scope
    config = PruningConfig(sparsity=0.5, granularity="neuron", criterion=criterion, scope="global")
    assert resolve(config).scope.name == "global"


@pytest.mark.parametrize("granularity", ["layer", "channel", "unstructured", "2:4"])
def test_what_it_does_not_score(granularity):
    with pytest.raises(ValueError, match="criterion 'activation' scores whole heads and queries and neurons and"):
        PruningConfig(
            **({} if granularity == "2:4" else {"sparsity": 0.5}), granularity=granularity, criterion="activation"
        )
