"""Sensitivity: every number is that of a real cut, and the model is left as it was."""

import copy
import json
import re

import pytest
import torch

from hf_prune import PruningConfig, SensitivityReport, collect_statistics, prune, sensitivity
from hf_prune.analysis import sensitivity as sweep
from hf_prune.calibration.passes import loss_of
from tests import tiny
from tests.structures.mixtures import build_mixture
from tests.structures.models import build, inputs_of

LEVELS = (0.25, 0.5)
CONFIGS = {
    "magnitude": PruningConfig(sparsity=0.9),
    "wanda": PruningConfig(sparsity=0.9, criterion="wanda"),
    "sparsegpt": PruningConfig(
        sparsity=0.9, criterion="sparsegpt", scope="layer", target_modules=["up_proj", "down_proj"]
    ),
    "blocks": PruningConfig(sparsity=0.9, granularity="block:2x2", scope="erk"),
    "neurons": PruningConfig(sparsity=0.9, granularity="neuron", criterion="activation", multiple_of=4),
    "solved anew": PruningConfig(
        sparsity=0.9, granularity="query+neuron", criterion="activation", reconstruct=True, multiple_of=4
    ),
    "with layers": PruningConfig(sparsity=0.9, granularity="neuron+layer", criterion="taylor", multiple_of=4),
    "widths": PruningConfig(sparsity=0.9, granularity="width", criterion="taylor", multiple_of=12),
    "a budget": PruningConfig(keep_parameters=0.8, granularity="neuron", multiple_of=4),
}


def batches_of(model, count=4):
    batches = []
    for seed in range(count):
        torch.manual_seed(seed)
        inputs = {n: torch.randint_like(v, 3, 60) for n, v in inputs_of(model).items()}
        batches.append({**inputs, "labels": inputs["input_ids"]})
    return batches


def loss(model, batches):
    """The mean over batches, all of which have as many labels."""
    with torch.no_grad():
        return sum(float(loss_of(model.eval(), batch)) for batch in batches) / len(batches)


def without_targets(config, **values):
    return PruningConfig(**{**config.to_dict(), "sparsity": 0.0, "keep_parameters": None, **values})


@pytest.mark.parametrize("name", CONFIGS)
def test_each_number_is_that_of_a_real_cut(name):
    model, config = build("llama"), PruningConfig(**{**CONFIGS[name].to_dict(), "calibration_samples": 8})
    batches, seen = batches_of(model), []

    def metric(pruned):
        seen.append({n: p.detach().clone() for n, p in pruned.named_parameters()})
        return float(len(seen))

    before = copy.deepcopy(model.state_dict())
    report = sensitivity(model, config, batches, levels=LEVELS, metric=metric)
    assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())
    places = [row for row in report.rows if not row.is_kind]
    assert bool(places) == (name != "widths")
    for row in report.rows:
        for level, number in zip(LEVELS, row.values, strict=True):
            if row.is_kind and row.name in ("all layers", "all widths"):
                kind = row.name.removeprefix("all ").removesuffix("s")
                counted = {} if kind == "width" else {"multiple_of": 8}
                asked = without_targets(config, granularity=kind, sparsity=level, **counted)
            elif row.is_kind:
                of_kind = [p.name for p in places if _is_of(p.name, row.name)]
                asked = without_targets(config, layer_sparsity={re.escape(p): level for p in of_kind})
            else:
                asked = without_targets(config, layer_sparsity={re.escape(row.name): level})
            real = build("llama")
            prune(real, asked, batches)
            mine = seen[int(number) - 1]
            assert all(torch.equal(p, mine[n]) for n, p in real.named_parameters()), (row.name, level)


def _is_of(place, kind):
    kinds = {"all queries": "self_attn", "all neurons": "mlp"}
    return kinds[kind] in place if kind in kinds else place.endswith(kind.removeprefix("all "))


def test_the_loss_is_the_mean_over_labels():
    model, config = build("llama"), PruningConfig(sparsity=0.5, calibration_samples=8)
    batches = batches_of(model)
    report = sensitivity(model, config, batches, levels=[0.5])
    assert report.dense == pytest.approx(loss(model, batches), rel=1e-6)
    row = report.rows[0]
    pruned = build("llama")
    prune(pruned, PruningConfig(sparsity=0.0, layer_sparsity={re.escape(row.name): 0.5}))
    assert row.values[0] == pytest.approx(loss(pruned, batches), rel=1e-6)
    # Of samples of different lengths, each label counts as much as any other.
    batches[0] = {name: value[:, :4] for name, value in batches[0].items()}
    sizes = [batch["labels"][:, 1:].numel() for batch in batches]
    losses = [loss(model, [batch]) for batch in batches]
    mean = sum(size * value for size, value in zip(sizes, losses, strict=True)) / sum(sizes)
    assert sensitivity(model, config, batches, levels=[0.5]).dense == pytest.approx(mean, rel=1e-6)


def test_it_takes_a_calibration_and_a_pass_for_each_number():
    model, passes = build("llama"), []
    model.register_forward_hook(lambda module, args, output: passes.append(1))
    config = PruningConfig(sparsity=0.5, granularity="neuron", criterion="activation", calibration_samples=8)
    report = sensitivity(model, config, batches_of(model, 4), levels=(0.25, 0.5, 0.75))
    numbers = 1 + sum(len(row.values) for row in report.rows)
    needed = 4 * (numbers + 1)  # Four batches each; and the calibration.
    assert needed <= len(passes) <= needed + 4  # How labels count is tried on one.


def test_kept_statistics_are_enough_for_it():
    model = build("llama")
    config = PruningConfig(sparsity=0.5, criterion="taylor", calibration_samples=8)
    batches = batches_of(model)
    kept = collect_statistics(model, config, batches)
    assert sensitivity(model, config, batches, levels=[0.5], statistics=kept) == sensitivity(
        model, config, batches, levels=[0.5]
    )


def test_experts_are_barred_meanwhile_and_not_afterwards():
    model = build_mixture("mixtral")
    model.config._experts_implementation = "eager"  # No kernel knows float64.
    pruned = copy.deepcopy(model)
    config = PruningConfig(sparsity=0.5, granularity="expert", criterion="reap", calibration_samples=8)
    batches = batches_of(model)
    hooks = [len(module._forward_hooks) for module in model.modules()]
    report = sensitivity(model, config, batches, levels=[0.5])
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    prune(pruned, without_targets(config, layer_sparsity={re.escape(report.rows[0].name): 0.5}), batches)
    assert report.rows[0].values[0] == pytest.approx(loss(pruned, batches), rel=1e-9)
    assert report.rows[0].values[0] != report.dense


def test_an_error_on_the_way_leaves_the_model_as_it_was():
    model, before = build("llama"), build("llama").state_dict()

    def metric(pruned):
        if any((p == 0).any() for p in pruned.parameters()):
            raise RuntimeError("on the way")
        return 0.0

    with pytest.raises(RuntimeError, match="on the way"):
        sensitivity(model.train(), PruningConfig(sparsity=0.5), batches_of(model), metric=metric)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_cannot_go_has_no_number(tmp_path):
    model = tiny.build("llama")  # One head of keys and values in each layer, and two layers.
    batches = [{name: torch.stack([s[name] for s in tiny.batch(model)]) for name in ("input_ids", "labels")}]
    config = PruningConfig(sparsity=0.5, granularity="head+neuron+layer", multiple_of=4, calibration_samples=4)
    report = sensitivity(model, config, batches)
    values = {row.name: row.values for row in report.rows}
    assert values["model.layers.0.self_attn"][2] is values["all heads"][2] is None  # 0.5 rounds to none.
    assert None not in values["model.layers.0.mlp"]
    assert values["all layers"][2] is None
    report.save(tmp_path / "sensitivity.json")
    assert SensitivityReport.load(tmp_path / "sensitivity.json") == report
    report.plot(tmp_path / "sensitivity.png")
    str(report)


def test_a_metric_that_trains_the_model_is_none_of_the_next_ones_business():
    model, modes = build("llama"), []

    def metric(pruned):
        modes.append(pruned.training)
        pruned.train()
        return 0.0

    sensitivity(model, PruningConfig(sparsity=0.5, calibration_samples=8), batches_of(model), metric=metric)
    assert not any(modes)
    assert not model.training


def test_numbers_that_are_not_finite():
    model = build("llama")
    config, batches = PruningConfig(sparsity=0.5, calibration_samples=8), batches_of(model)
    with pytest.raises(ValueError, match="metric of the dense model is not finite"):
        sensitivity(model, config, batches, metric=metric_of(float("nan")))
    report = sensitivity(model, config, batches, levels=[0.5], metric=metric_of(1.0, float("inf")))
    assert {row.values for row in report.rows} == {(None,)}


def metric_of(first, others=0.0):
    values = [first]

    def metric(model):
        return values.pop() if values else others

    return metric


def test_it_needs_samples():
    with pytest.raises(ValueError, match=r"sensitivity is measured on samples\. Give a dataloader"):
        sensitivity(build("llama"), PruningConfig(sparsity=0.5), None)


def test_images_too():
    model = tiny.build("resnet")
    samples = tiny.batch(model)
    batches = [{name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}]
    config = PruningConfig(sparsity=0.5, granularity="channel", multiple_of=1, calibration_samples=4)
    report = sensitivity(model, config, batches, levels=[0.5])
    assert {row.name for row in report.rows if row.is_kind} == {"all channels"}
    assert "all channels" in str(report)


@pytest.mark.parametrize(
    ("values", "levels", "message"),
    [
        ({"sparsity": 0.5}, [], "levels must rise between 0 and 1, got none"),
        ({"sparsity": 0.5}, [0.5, 0.25], "levels must rise between 0 and 1, got 0.5, 0.25"),
        ({"sparsity": 0.5}, [0.5, 1.0], "levels must rise between 0 and 1"),
        ({"granularity": "2:4"}, [0.5], "granularity '2:4' has one sparsity, and sensitivity tries several"),
        (
            {"sparsity": 0.5, "granularity": "neuron", "uniform": True},
            [0.5],
            "uniform wants all to be equal. Leave uniform out",
        ),
    ],
)
def test_bad_input(values, levels, message):
    model = build("llama")
    with pytest.raises(ValueError, match=message):
        sensitivity(model, PruningConfig(**values), batches_of(model), levels=levels)


def test_batches_that_can_be_read_once():
    model = build("llama")
    with pytest.raises(ValueError, match="which can be read once"):
        sensitivity(model, PruningConfig(sparsity=0.5), iter(batches_of(model)))


# The report


@pytest.fixture(scope="module")
def report():
    model = build("llama")
    config = PruningConfig(sparsity=0.5, criterion="wanda", calibration_samples=8)
    return sensitivity(model, config, batches_of(model), levels=LEVELS)


def test_a_report_comes_back_from_disk(report, tmp_path):
    report.save(tmp_path / "sensitivity.json")
    assert SensitivityReport.load(tmp_path / "sensitivity.json") == report
    assert json.loads((tmp_path / "sensitivity.json").read_text()) == json.loads(json.dumps(report.to_dict()))


def test_a_report_says_what_was_measured(report):
    text = str(report)
    for row in report.rows:
        assert row.name in text
    assert f"dense: {report.dense:.4f}" in text
    assert f"{report.rows[0].values[0] - report.dense:+.4f}" in text
    assert (report.granularity, report.criterion, report.metric) == ("unstructured", "wanda", "loss")


def test_harm_is_loss_that_rises_and_accuracy_that_falls(report):
    row = report.rows[0]
    assert report.harm(row) == [value - report.dense for value in row.values]
    other = SensitivityReport.from_dict({**report.to_dict(), "greater_is_better": True})
    assert other.harm(other.rows[0]) == [-value for value in report.harm(row)]


def test_a_report_is_drawn(report, tmp_path):
    report.plot(tmp_path / "sensitivity.png")
    assert (tmp_path / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    axes = report.figure().axes[0]
    rows = [label.get_text() for label in axes.get_yticklabels()]
    assert "model.layers.*.self_attn.q_proj at 0.25" in rows
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2"]


@pytest.mark.parametrize(
    "text",
    ["no JSON", "[]", "{}", '{"dense": 1, "levels": [0.5, 0.25], "rows": [], "greater_is_better": false}'],
)
def test_a_file_of_something_else_is_an_error(text, tmp_path):
    (tmp_path / "sensitivity.json").write_text(text)
    with pytest.raises(ValueError, match="is not a sensitivity report"):
        SensitivityReport.load(tmp_path / "sensitivity.json")


def test_a_report_with_an_unknown_field_is_an_error(report, tmp_path):
    (tmp_path / "sensitivity.json").write_text(json.dumps({**report.to_dict(), "more": 1}))
    with pytest.raises(ValueError, match=r"is not a sensitivity report .*more"):
        SensitivityReport.load(tmp_path / "sensitivity.json")


def test_levels_have_a_default():
    assert sweep.LEVELS == (0.25, 0.5, 0.75)
