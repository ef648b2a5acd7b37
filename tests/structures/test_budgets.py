"""Budgets: what is left of a model's parameters, FLOPs and latency is what was asked for."""

import copy
import itertools
import json

import pytest
import torch
import transformers

from hf_prune import PruningConfig, PruningHistory, PruningTrainerCallback, prune, shrink
from hf_prune.calibration.costs import measure_costs
from hf_prune.plan import Plan
from hf_prune.structures import budgets
from hf_prune.structures.budgets import CLOSE, MEASURES, Budget
from hf_prune.structures.groups import KINDS
from hf_prune.weights.masks import MaskSet
from tests import tiny
from tests.structures.mixtures import build_mixture
from tests.structures.models import DECODER, MODELS, build, inputs_of, perturbed
from tests.structures.test_training import samples, without_dropout

CELLS = [(name, "head+neuron") for name in MODELS]
CELLS += [("gpt_neo", "neuron"), ("gpt_neo", "layer"), ("gpt_neo", "head+neuron+layer"), ("t5", "neuron+layer")]
CELLS += [("llama", kinds) for kinds in ("query", "width", "query+neuron", "neuron+width", "query+neuron+width+layer")]
CELLS += [("mixtral", "expert"), ("mixtral", "expert+neuron"), ("resnet", "channel")]


def model_of(name):
    if name == "mixtral":
        model = build_mixture("mixtral")
        model.config._experts_implementation = "eager"  # No kernel knows float64.
        return model
    return tiny.build(name).eval() if name == "resnet" else build(name)


def config_of(granularity, **others):
    kinds = set(granularity.split("+"))
    # A llama's width has to be a multiple of its heads.
    counted = {"multiple_of": 12 if "width" in kinds else 4} if {"neuron", "width", "channel"} & kinds else {}
    return PruningConfig(granularity=granularity, schedule="one_shot", **counted, **others)


def one_step(budget):
    """The largest share that one step of one group takes of the dense model."""
    shares = []
    for name, group in budget.structures.items():
        levels = group.counts_that_may_go()
        kept = {other: torch.ones(each.count, dtype=torch.bool) for other, each in budget.structures.items()}
        for before, after in itertools.pairwise(levels):
            shares.append(
                budget.left({**kept, name: group.without(before)}) - budget.left({**kept, name: group.without(after)})
            )
    return max(shares)


def test_the_cells_have_every_kind():
    assert {kind for _, kinds in CELLS for kind in kinds.split("+")} == set(KINDS)


@pytest.mark.parametrize(("name", "granularity"), CELLS, ids=str)
def test_so_many_parameters_are_left_once_it_is_shrunk(name, granularity):
    model, keep = model_of(name), 0.9
    config = config_of(granularity, keep_parameters=keep)
    before, step = model.num_parameters(), one_step(Plan.of(model, config).budget(model))
    report = prune(model, config)
    remaining = report.remaining
    assert (remaining.measure, remaining.asked) == ("parameters", keep)
    assert remaining.left == pytest.approx(keep, abs=step + 1e-9)
    assert f"{remaining.left:.4f} of the dense model's parameters are left; asked for {keep:.4g}" in str(report)
    assert report.to_dict()["remaining"] == {"measure": "parameters", "asked": keep, "left": remaining.left}
    if report.zeros:
        assert shrink(model).num_parameters() == round(remaining.left * before)


@pytest.mark.parametrize("granularity", ["neuron", "neuron+layer"])
def test_uniform_models_come_as_near_as_equal_layers_can(granularity):
    model, dense = build("llama"), build("llama")
    report = prune(model, config_of(granularity, keep_parameters=0.85, uniform=True))
    assert len({row.zeros for row in report.structures if row.kind == "neuron"}) == 1
    possible = []
    for sparsity in torch.linspace(0.0, 0.7, 29).tolist():
        other = copy.deepcopy(dense)
        zeros = prune(other, config_of(granularity, sparsity=sparsity, uniform=True)).model_zeros
        possible.append(1 - zeros / dense.num_parameters())
    best = min(abs(left - 0.85) for left in possible)
    assert abs(report.remaining.left - 0.85) <= best + 1e-9
    if granularity == "neuron":
        assert abs(report.remaining.left - 0.85) == pytest.approx(best)


@pytest.mark.parametrize(
    ("name", "granularity"), [("llama", "query+neuron"), ("vit", "head+neuron"), ("t5", "neuron")]
)
def test_so_many_operations_are_left(name, granularity):
    model = build(name)
    dense, batch = copy.deepcopy(model), inputs_of(model)
    config = config_of(granularity, keep_flops=0.8)
    report = prune(model, config, [batch])
    counted = measure_costs({"dense": dense, "smaller": shrink(model)}, batch, 0)
    assert report.remaining.left == counted["smaller"].flops / counted["dense"].flops
    step = one_step(Plan.of(dense, config).budget(dense, lambda: [batch]))
    assert report.remaining.left == pytest.approx(0.8, abs=step)


def test_experts_that_are_barred_are_no_part_of_what_is_counted():
    model = model_of("mixtral")
    batch = inputs_of(model)
    report = prune(model, config_of("expert+neuron", keep_flops=0.9), [batch])
    assert report.remaining.left == pytest.approx(0.9, abs=0.05)
    assert report.zeros


class Clock:
    """Costs whose seconds are those of a machine that takes a millisecond, and a nanosecond for each operation."""

    def __init__(self, monkeypatch):
        self.turns = []
        monkeypatch.setattr(budgets, "measure_costs", self.measure)

    def measure(self, models, batch, turns):
        self.turns.append(turns)
        costs = measure_costs(models, batch, 0)
        return {name: type(c)(c.parameters, c.flops, 1e-3 + c.flops * 1e-9) for name, c in costs.items()}


def test_so_much_time_is_left(monkeypatch):
    clock = Clock(monkeypatch)
    model = build("llama")
    batch = inputs_of(model)
    report = prune(model, config_of("query+neuron", keep_latency=0.9), [batch])
    assert report.remaining.left == pytest.approx(0.9, abs=CLOSE["latency"])
    assert set(clock.turns) == {budgets._TURNS}
    assert len(clock.turns) < 20


def test_it_is_the_model_without_what_is_pruned_that_is_timed(monkeypatch):
    """And not a copy that does the same work with zeros."""
    seen = []

    def measure(models, batch, turns):
        seen.append(sum(p.numel() for p in models["smaller"].parameters()))
        return Clock(monkeypatch).measure(models, batch, turns)

    model = build("llama")
    with monkeypatch.context() as patch:
        patch.setattr(budgets, "measure_costs", measure)
        prune(model, config_of("neuron", keep_latency=0.9), [inputs_of(model)])
    assert min(seen) < model.num_parameters()
    assert sum(p.numel() for p in model.parameters()) == build("llama").num_parameters()


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("keep", [0.9, 0.8, 0.6])
def test_where_a_layer_would_be_too_much_neurons_go(keep, scope):
    model = build("llama")
    step = one_step(Budget(model, "parameters", Plan.of(model, config_of("neuron", sparsity=0.5)).structures))
    report = prune(model, config_of("neuron+layer", keep_parameters=keep, criterion="magnitude", scope=scope))
    assert report.remaining.left == pytest.approx(keep, abs=step)


class Once:
    """Batches that can be read once, though not an iterator."""

    def __init__(self, batches):
        self.left = list(batches)

    def __iter__(self):
        while self.left:
            yield self.left.pop(0)


def test_a_batch_is_read_before_anything_is_pruned():
    model = build("llama")
    report = prune(model, config_of("neuron", keep_flops=0.9, criterion="magnitude"), Once([inputs_of(model)]))
    assert report.remaining.left == pytest.approx(0.9, abs=0.02)


def test_what_is_no_batch_is_an_error():
    model = build("llama")
    with pytest.raises(TypeError, match="batches must be dicts of tensors, with which the model is called; got 1"):
        prune(model, config_of("neuron", keep_flops=0.9, criterion="magnitude"), [1])


def test_experts_are_chosen_from_again_if_a_cut_fails():
    model = model_of("mixtral")
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises(ValueError, match="cannot be reached"):
        prune(model, config_of("expert", keep_parameters=0.01))
    with pytest.raises(ValueError, match="cannot be reached"):
        prune(model, config_of("expert", keep_flops=0.01, criterion="magnitude"), [inputs_of(model)])
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks


def test_a_share_that_is_kept_whole_prunes_nothing():
    model = build("llama")
    report = prune(model, config_of("neuron", keep_parameters=1.0))
    assert (report.zeros, report.remaining.left) == (0, 1.0)


def test_scores_in_several_steps_lead_there_too():
    model = build("llama")
    batches = [{**(batch := inputs_of(model)), "labels": batch["input_ids"]}]
    config = config_of("neuron", keep_parameters=0.8, criterion="taylor", score_steps=3)
    report = prune(model, config, batches)
    assert report.remaining.left == pytest.approx(0.8, abs=one_step(Plan.of(model, config).budget(model)))


def test_the_zeros_that_are_held_count_as_gone():
    model = build("llama")
    held = prune(model, config_of("neuron", sparsity=0.3))
    report = prune(model, config_of("neuron", keep_parameters=0.8, hold_zeros=True))
    assert report.zeros > held.zeros
    assert all(now.zeros >= row.zeros for now, row in zip(report.structures, held.structures, strict=True))
    assert report.remaining.left == pytest.approx(0.8, abs=0.02)


# In a training


ROUNDS = {"keep_parameters": 0.7, "granularity": "query+neuron", "multiple_of": 4, "schedule": "constant", "rounds": 3}


def test_each_round_has_the_share_of_the_schedule(make_trainer, tmp_path):
    model = without_dropout(build("llama"))
    before = model.num_parameters()
    pruning = PruningTrainerCallback(PruningConfig(**ROUNDS))
    make_trainer(model, pruning, train_dataset=samples(model)).train()
    history = pruning.history
    assert history.measure == "parameters"
    assert [1 - row.asked for row in history] == pytest.approx([0.9, 0.8, 0.7])
    assert [row.left for row in history] == pytest.approx([0.9, 0.8, 0.7], abs=0.02)
    assert model.num_parameters() == round(history[-1].left * before)
    assert history.shortfall() is None
    assert "parameters left" in str(history)
    assert history.rows()[0][2:5] == ["parameters asked", "left", "sparsity"]
    assert history.rows()[-1][2:4] == ["0.7000", f"{history[-1].left:.4f}"]
    history.save(tmp_path / "history.json")
    assert PruningHistory.load(tmp_path / "history.json") == history


def test_operations_are_counted_on_a_training_batch(make_trainer):
    model = without_dropout(build("llama"))
    config = PruningConfig(**{**ROUNDS, "keep_parameters": None, "keep_flops": 0.8})
    pruning = PruningTrainerCallback(config)
    make_trainer(model, pruning, train_dataset=samples(model)).train()
    costs = pruning.history.costs
    assert pruning.history[-1].left == pytest.approx(costs["shrunk"].flops / costs["masked"].flops)
    assert pruning.history[-1].left == pytest.approx(0.8, abs=0.03)


def test_a_training_that_ends_early_says_what_is_left(make_trainer):
    model = without_dropout(build("llama"))
    pruning = PruningTrainerCallback(PruningConfig(**ROUNDS, end=12, criterion="activation"))
    trainer = make_trainer(model, pruning, train_dataset=samples(model), max_steps=20)

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 5

    trainer.add_callback(Stop())
    trainer.train()
    assert "share of parameters that is left is 0.7952" in pruning.history.shortfall()
    assert "not the 0.7000 asked for" in pruning.history.shortfall()


@pytest.mark.parametrize("measure", ["parameters", "flops"])
def test_an_interrupted_run_goes_on_bit_for_bit(measure, make_trainer, tmp_path):
    config = PruningConfig(**{**ROUNDS, "keep_parameters": None, f"keep_{measure}": 0.7, "end": 9})
    results = []
    for stops in (False, True):
        model = without_dropout(build("llama"))
        options = dict(train_dataset=samples(model), max_steps=12, save_strategy="steps", save_steps=4,
                       output_dir=str(tmp_path / str(stops)))  # fmt: skip
        make_trainer(model, PruningTrainerCallback(config), **options).train()
        if stops:
            model = without_dropout(build("llama"))
            trainer = make_trainer(model, PruningTrainerCallback(config), **options)
            trainer.train(resume_from_checkpoint=str(tmp_path / "True" / "checkpoint-4"))
        results.append(model.state_dict())
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


# What cannot be


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"keep_parameters": 0.7, "sparsity": 0.5}, "keep_parameters says how much is pruned; leave out sparsity"),
        ({"keep_flops": 0.7, "sparsities": [0.5]}, "keep_flops says how much is pruned; leave out sparsities"),
        ({"keep_latency": 0.7, "layer_sparsity": {"a": 0.5}}, "leave out layer_sparsity"),
        ({"keep_parameters": 0.7, "keep_latency": 0.7}, "keep_parameters says how much .* leave out keep_latency"),
        ({"keep_parameters": 70}, r"keep_parameters must be in \(0, 1\], got 70. Did you mean 0.7\?"),
        ({"keep_flops": 0}, r"keep_flops must be in \(0, 1\], got 0"),
        ({"keep_parameters": 1e-17}, r"keep_parameters must be in \(0, 1\], got 1e-17"),
        ({"keep_parameters": 0.7, "granularity": "unstructured"}, "keep_parameters is about structures"),
        ({"keep_parameters": 0.7, "granularity": "2:4"}, "keep_parameters is about structures"),
    ],
)
def test_a_config_that_cannot_be(values, message):
    with pytest.raises(ValueError, match=message):
        PruningConfig(**{"granularity": "neuron", **values})


@pytest.mark.parametrize("measure", MEASURES)
def test_what_cannot_be_reached_is_an_error_that_names_the_least(measure, monkeypatch):
    Clock(monkeypatch)
    model, dense = build("llama"), build("llama")
    batch = inputs_of(model)
    fewest = copy.deepcopy(model)
    structures = Plan.of(model, config_of("neuron", sparsity=0.1)).structures
    kept = {name: group.without(group.counts_that_may_go()[-1]) for name, group in structures.items()}
    least = Budget(fewest, measure, structures, batch).left(kept)
    with pytest.raises(ValueError, match=f"keep_{measure}=0.05 cannot be reached.* {least:.4f} of the"):
        prune(model, config_of("neuron", **{f"keep_{measure}": 0.05}), [batch])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), dense.parameters(), strict=True))


def test_a_training_that_cannot_reach_it_is_refused_before_it_begins(make_trainer):
    model = build("llama")
    pruning = PruningTrainerCallback(config_of("neuron", keep_parameters=0.05))
    with pytest.raises(ValueError, match=r"keep_parameters=0.05 cannot be reached"):
        make_trainer(model, pruning, train_dataset=samples(model)).train()


@pytest.mark.parametrize("measure", ["flops", "latency"])
def test_what_is_measured_needs_a_batch(measure):
    with pytest.raises(ValueError, match=f"keep_{measure} is measured with a batch. Give a dataloader"):
        prune(build("llama"), config_of("neuron", **{f"keep_{measure}": 0.7}))


def test_uniform_says_when_no_config_can_have_what_is_left():
    config = transformers.LlamaConfig(**{**DECODER, "num_attention_heads": 8, "head_dim": 2})
    model = perturbed(transformers.LlamaForCausalLM(config))
    with pytest.raises(ValueError, match="uniform: no config of LlamaForCausalLM can say num_attention_heads="):
        prune(model, config_of("head", keep_flops=0.93, uniform=True), [inputs_of(model)])
    assert not MaskSet.from_zeros(model, Plan.of(model, PruningConfig(sparsity=0.5)).targets).masked


def test_a_miss_by_a_lot_is_said(caplog):
    model = build("llama")
    prune(model, config_of("layer", keep_parameters=0.97))
    assert "Asked for 0.97 of the parameters, but 1 are left" in caplog.text


def test_a_checkpoint_of_a_version_without_budgets_has_none(tmp_path):
    history = PruningHistory()
    values = {name: value for name, value in history.to_dict().items() if name != "measure"}
    (tmp_path / "history.json").write_text(json.dumps(values))
    assert PruningHistory.load(tmp_path / "history.json").measure is None
