import json
import math

import pytest

from hf_prune.reporting.history import PruningHistory, Round


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
            best_step=20,
            last=2.0,
            steps=30,
            samples=240,
            tokens=960,
            seconds=1.5,
        ),
        Round(2, 30, 0.75, 0.75, 75, 75, 100, "magnitude", after_cut=6.0, best=None, last=None, steps=70, samples=560),
    ]
    return PruningHistory(
        **{"dense": 1.25, "evaluations": [(10, 2.0), (20, 1.5), (30, 2.0)], "rounds": rounds, **values}
    )


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


def test_what_is_not_finite_is_strict_json(tmp_path):
    original = history(dense=math.nan, evaluations=[(1, math.inf), (2, -math.inf)])
    original.save(tmp_path / "history.json")

    def refuse(word):
        raise AssertionError(word)

    json.loads((tmp_path / "history.json").read_text(), parse_constant=refuse)
    again = PruningHistory.load(tmp_path / "history.json")
    assert math.isnan(again.dense)
    assert again.evaluations == [(1, math.inf), (2, -math.inf)]
    assert again.rounds == original.rounds


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


@pytest.mark.parametrize(
    "change",
    [
        {"costs": []}, {"costs": {"shrunk": {"parameters": 1}}}, {"metric": 5}, {"dense": "x"}, {"asked": 5},
        {"asked": ["x"]}, {"evaluations": [[1, None]]}, {"evaluations": [["a", "b"]]}, {"evaluations": [[10**400, 1]]},
        {"rounds": [5]}, {"reached": "x"}, {"reached": None}, {"step": None}, {"step": 1.5}, {"best": "x"},
        {"ended": 3},
    ],
)  # fmt: skip
def test_a_history_whose_values_are_none_of_a_history_is_an_error(change, tmp_path):
    values = history().to_dict()
    (name,) = change
    (values if name in values else values["rounds"][0]).update(change)
    (tmp_path / "history.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="is not a pruning history"):
        PruningHistory.load(tmp_path / "history.json")


def test_a_history_that_is_nested_too_deeply_is_an_error(tmp_path):
    (tmp_path / "history.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is not a pruning history"):
        PruningHistory.load(tmp_path / "history.json")


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


def test_a_history_of_an_earlier_version_is_read(tmp_path):
    values = PruningHistory().to_dict()
    del values["costs"]
    (tmp_path / "history.json").write_text(json.dumps(values))
    assert PruningHistory.load(tmp_path / "history.json").costs == {}
