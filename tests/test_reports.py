import builtins
import json
import math
import struct
import sys

import pytest
import torch
from torch import nn

from hf_prune.config import PruningConfig
from hf_prune.masks import MaskSet
from hf_prune.reports import ModuleSparsity, PruningHistory, Round, SparsityReport, sparsity_report


class Net(nn.Module):
    """Two targets, of which one is initialised with zeros, an embedding, a norm and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 4)
        self.up = nn.Linear(4, 8)
        self.down = nn.Linear(8, 4)
        self.norm = nn.LayerNorm(4)
        self.classifier = nn.Linear(4, 3)
        nn.init.zeros_(self.down.weight)
        self.embed.weight.data[0] = 0.0


def count(model, names=None):
    """Zeros and weights, one by one."""
    values = [v for n, p in model.named_parameters() if names is None or n in names for v in p.flatten().tolist()]
    return sum(v == 0 for v in values), len(values)


def masked(net):
    mask = torch.ones(8, 4, dtype=torch.bool)
    mask[2, 1] = mask[7, 3] = mask[0, 0] = False
    masks = MaskSet({"up.weight": mask, "down.weight": torch.rand(4, 8) < 0.75})
    masks.apply_(net)
    return masks


# SparsityReport


def test_a_report_is_what_counting_gives():
    net = Net()
    net.up.weight.data[2, 1] = -0.0
    net.up.weight.data[3] = 0.0
    report = sparsity_report(net)
    assert report.modules == (
        ModuleSparsity("up", (8, 4), 5, 32, None),
        ModuleSparsity("down", (4, 8), 32, 32, None),
    )
    assert [module.sparsity for module in report.modules] == [5 / 32, 1.0]
    assert (report.zeros, report.total) == count(net, ["up.weight", "down.weight"]) == (37, 64)
    assert report.sparsity == 37 / 64
    assert (report.model_zeros, report.model_total) == count(net)
    assert report.model_sparsity == report.model_zeros / report.model_total
    assert report.model_zeros == 37 + 4 + 4  # A row of the embedding, the bias of the norm.
    assert report.masked is None


def test_zeros_beyond_the_masks_are_told_apart():
    net = Net()
    masks = masked(net)
    report = sparsity_report(net, masks=masks)
    assert [(m.name, m.masked) for m in report.modules] == [("up", 3), ("down", masks.masked - 3)]
    assert report.masked == masks.masked < report.zeros == 3 + 32
    beyond = 35 - masks.masked
    assert str(report).endswith(f"\n{beyond} of the zeros are not pruned: they were zero before.")


def test_a_mask_that_is_not_held_shows_too():
    """The report counts zeros in the weights; it does not take the mask's word for them."""
    net = Net()
    masks = MaskSet({"up.weight": torch.zeros(8, 4, dtype=torch.bool)})
    report = sparsity_report(net, masks=masks)
    assert (report.masked, report.zeros, report.total) == (32, 0, 32)


def test_the_config_says_which_weights_are_targets():
    net = Net()
    report = sparsity_report(net, PruningConfig(sparsity=0.5, target_modules=["up", "classifier"]))
    assert [module.name for module in report.modules] == ["up", "classifier"]
    report = sparsity_report(net, PruningConfig(sparsity=0.5, exclude_modules=["up"]))
    assert [module.name for module in report.modules] == ["down"]
    with pytest.raises(ValueError, match="target_modules='nothing' matches no prunable module"):
        sparsity_report(net, PruningConfig(sparsity=0.5, target_modules="nothing"))


def test_a_tied_parameter_is_counted_once():
    net = Net()
    net.up_again = nn.Linear(4, 8, bias=False)
    net.up_again.weight = net.up.weight
    assert sparsity_report(net).model_total == sparsity_report(Net()).model_total


def test_a_report_does_not_touch_the_model():
    net = Net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    masks = masked(Net())
    sparsity_report(net, masks=masks)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_report_prints_as_a_table():
    net = nn.Sequential(nn.Linear(100, 300), nn.Conv2d(2, 4, 3))
    net[0].weight.data[:150] = 0.0
    assert str(sparsity_report(net)) == "\n".join(
        [
            "module               shape   zeros  sparsity",
            "--------------------------------------------",
            "0                300 x 100  15,000    0.5000",
            "1            4 x 2 x 3 x 3       0    0.0000",
            "--------------------------------------------",
            "targets             30,072  15,000    0.4988",
            "whole model         30,376  15,000    0.4938",
        ]
    )


def test_a_table_says_nothing_of_zeros_beyond_the_masks_if_there_are_none():
    net = nn.Sequential(nn.Linear(4, 4))
    masks = MaskSet({"0.weight": torch.tensor([[True, False, True, True]] * 4)})
    masks.apply_(net)
    assert "not pruned" not in str(sparsity_report(net, masks=masks))


def test_a_report_is_json():
    net = Net()
    report = sparsity_report(net, masks=masked(net))
    values = report.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert values["modules"][0] == {
        "name": "up",
        "shape": [8, 4],
        "zeros": 3,
        "total": 32,
        "masked": 3,
        "sparsity": 3 / 32,
    }
    keys = ("sparsity", "zeros", "masked", "total", "model_sparsity", "model_zeros", "model_total")
    assert {key: value for key, value in values.items() if key not in ("modules", "structures")} == {
        k: getattr(report, k) for k in keys
    }
    assert json.loads(json.dumps(sparsity_report(net).to_dict()))["masked"] is None


def test_a_report_on_no_weights_prints():
    report = sparsity_report(Net(), masks=MaskSet())
    assert (report.zeros, report.total, report.masked, report.sparsity) == (0, 0, 0, 0.0)
    assert "targets" in str(report)
    assert SparsityReport((ModuleSparsity("empty", (0, 3), 0, 0),), 0, 0).to_dict()["model_sparsity"] == 0.0


# PruningHistory


def history(**values):
    rounds = [
        Round(
            1,
            0,
            0.5,
            0.5,
            50,
            51,
            100,
            "magnitude",
            4.0,
            1.5,
            last=2.0,
            steps=30,
            samples=240,
            tokens=960,
            seconds=1.5,
        ),
        Round(2, 30, 0.75, 0.75, 75, 75, 100, "magnitude", after_cut=6.0, best=None, last=None, steps=70, samples=560),
    ]
    return PruningHistory(**{"dense": 1.25, "evaluations": [(10, 1.5), (20, 2.0)], "rounds": rounds, **values})


HISTORIES = {
    "full": history(),
    "empty": PruningHistory(),
    "language model": history(language_model=True),
    "accuracy": history(metric="eval_accuracy", greater_is_better=True, dense=None),
    "held zeros": PruningHistory(rounds=[Round(0, 0, None, 0.3, 30, 30, 100, "random")]),
    "not finite": history(dense=math.inf, evaluations=[(5, math.inf), (6, 1.0)]),
}
KINDS = pytest.mark.parametrize("kind", HISTORIES)


def test_a_history_is_a_sequence_of_rounds():
    rounds = history().rounds
    assert list(history()) == rounds
    assert len(history()) == 2
    assert history()[-1] == rounds[1]
    assert history()[:1] == rounds[:1]
    assert list(reversed(history())) == rounds[::-1]
    assert rounds[0] in history()
    assert not PruningHistory()
    with pytest.raises(IndexError, match="index out of range"):
        history()[2]


def test_two_histories_do_not_share_their_rounds():
    PruningHistory().rounds.append(history()[0])
    PruningHistory().evaluations.append((1, 1.0))
    assert PruningHistory() == PruningHistory(rounds=[], evaluations=[])


@KINDS
def test_a_history_comes_back_from_json_and_from_disk(tmp_path, kind):
    original = HISTORIES[kind]
    assert PruningHistory.from_dict(original.to_dict()) == original
    assert PruningHistory.from_dict(json.loads(json.dumps(original.to_dict()))) == original
    original.save(tmp_path / "history.json")
    assert PruningHistory.load(str(tmp_path / "history.json")) == original


def test_a_history_that_came_back_is_another_object():
    original = history()
    copy = PruningHistory.from_dict(original.to_dict())
    copy[0].steps += 1
    copy.evaluations.append((30, 1.0))
    assert original == history()


@pytest.mark.parametrize(
    "text",
    [
        *["", "{", "[]", "null", "3", '"text"', "{}", "\x00\x01", '{"rounds": []}'],
        '{"rounds": 3, "evaluations": []}',
        '{"rounds": [3], "evaluations": []}',
        '{"rounds": [{"round": 1}], "evaluations": []}',
        '{"rounds": [], "evaluations": [1]}',
        '{"rounds": [], "evaluations": [], "unknown": 1}',
    ],
)
def test_a_damaged_history_is_an_error(tmp_path, text):
    path = tmp_path / "pruning_history.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"pruning_history\.json is not a pruning history \("):
        PruningHistory.load(path)


def test_a_history_cut_off_anywhere_is_an_error(tmp_path):
    history().save(tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    for length in range(0, len(whole) - 2, 37):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is not a pruning history"):
            PruningHistory.load(tmp_path / "cut")


def test_a_history_that_is_not_text_is_an_error(tmp_path):
    (tmp_path / "history").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match="is not a pruning history"):
        PruningHistory.load(tmp_path / "history")


def test_a_missing_history_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        PruningHistory.load(tmp_path / "missing")


@pytest.mark.parametrize(("greater_is_better", "better", "worse"), [(False, 1.0, 3.0), (True, 3.0, 1.0)])
def test_which_way_a_metric_improves(greater_is_better, better, worse):
    history = PruningHistory(greater_is_better=greater_is_better)
    assert history.gain(better, over=worse) == 2.0
    assert history.gain(worse, over=better) == -2.0
    assert history.gain(better, over=better) == 0.0
    assert history.gain(worse, over=None) == math.inf


@pytest.mark.parametrize("greater_is_better", [False, True])
def test_nan_is_no_improvement_on_anything(greater_is_better):
    history = PruningHistory(greater_is_better=greater_is_better)
    assert math.isnan(history.gain(math.nan, over=1.0))
    assert math.isnan(history.gain(math.nan, over=None))


def test_a_history_prints_as_a_table():
    assert str(history(metric="eval_accuracy")) == "\n".join(
        [
            "round  step  sparsity  eval_accuracy after the cut    best    last",
            "------------------------------------------------------------------",
            "dense          0.0000                       1.2500                ",
            "1         0    0.5000                       4.0000  1.5000  2.0000",
            "2        30    0.7500                       6.0000                ",
        ]
    )


@pytest.mark.parametrize(
    ("rows", "said"),
    [(1, "after round 1 of 2: the sparsity is 0.5000"), (0, "after round 0 of 2: the sparsity is 0.0000")],
)
def test_a_run_that_ended_before_its_target_says_so(rows, said):
    whole = history(asked=[0.5, 0.75], ended="stopped")
    assert "Training ended" not in str(whole)
    whole.rounds = whole.rounds[:rows]
    assert str(whole).endswith(f"\nTraining ended {said}, not the 0.7500 asked for.")
    whole.ended = None
    assert "Training ended" not in str(whole)


def test_why_rounds_ended_is_shown_where_it_was_not_planned():
    planned = history()
    planned[0].ended, planned[1].ended = "planned", "max_steps"
    assert "ended" not in str(planned)
    planned[0].ended = "patience"
    assert [line.split()[-1] for line in str(planned).splitlines()[3:]] == ["patience", "max_steps"]


def test_the_exponential_of_a_language_models_loss_is_shown_and_marked_for_what_it_is():
    lines = str(history(language_model=True)).splitlines()
    assert lines[0].endswith("last  exp(last)*")
    assert [line.split()[-1] for line in lines[2:4]] == [f"{math.exp(1.25):.4f}", f"{math.exp(2.0):.4f}"]
    assert lines[4].endswith("6.0000                            ")  # No evaluation, no perplexity.
    assert lines[-1] == "* the exponential of a mean of batch means, not weighted by tokens"


@pytest.mark.parametrize(
    "values",
    [
        {"language_model": False},
        {"language_model": True, "metric": "eval_perplexity"},
        {"language_model": True, "metric": "eval_accuracy"},
    ],
)
def test_the_exponential_is_shown_of_a_language_models_loss_only(values):
    assert "*" not in str(history(**values))
    assert "exp" not in str(history(**values))


@KINDS
def test_every_history_prints(kind):
    lines = str(HISTORIES[kind]).splitlines()
    assert lines[2].startswith("dense")
    rows = [line for line in lines if not line.startswith("*")]
    assert len({len(line) for line in rows}) == 1
    assert len(rows) == 3 + len(HISTORIES[kind])


def test_a_large_loss_does_not_overflow():
    lines = str(history(language_model=True, dense=1e6)).splitlines()
    assert lines[2].split()[-2:] == ["1e+06", "inf"]


# The plot


@KINDS
def test_a_plot_is_an_image(tmp_path, kind):
    path = tmp_path / "history.png"
    HISTORIES[kind].plot(path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", content[16:24]) == (1200, 750)


def test_a_plot_shows_what_the_history_holds(tmp_path):
    history().plot(tmp_path / "history.svg")
    HISTORIES["empty"].plot(str(tmp_path / "empty.svg"))
    full, empty = ((tmp_path / f"{name}.svg").read_text() for name in ("history", "empty"))
    for label in ("while training", "right after a cut", "dense"):
        assert f"<!-- {label} -->" in full
        assert f"<!-- {label} -->" not in empty
    for label in ("eval_loss", "sparsity", "step"):
        assert f"<!-- {label} -->" in full
        assert f"<!-- {label} -->" in empty


def test_a_plot_leaves_the_users_own_figures_alone(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure = pyplot.figure()
    history().plot(tmp_path / "history.svg")
    assert pyplot.get_fignums() == [figure.number]
    pyplot.close(figure)


def test_a_plot_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ModuleNotFoundError, match=r"^plots need matplotlib: pip install matplotlib\.$"):
        history().plot(tmp_path / "history.png")
    assert not (tmp_path / "history.png").exists()


def test_masks_that_are_not_applied_are_said():
    model = nn.Sequential(nn.Linear(4, 4))
    report = sparsity_report(model, masks={"0.weight": torch.zeros(4, 4, dtype=torch.bool)})
    assert "At least 16 masked weights are not zero. Set them to zero with MaskSet.apply_." in str(report)


def test_a_history_of_an_earlier_version_is_read(tmp_path):
    values = PruningHistory().to_dict()
    del values["costs"]
    (tmp_path / "history.json").write_text(json.dumps(values))
    assert PruningHistory.load(tmp_path / "history.json").costs == {}
