import dataclasses
import math

import pytest
import torch
from torch import nn

from hf_prune import PruningConfig, PruningHistory, SparsityReport
from hf_prune.plan import resolve
from hf_prune.reporting.history import Round
from hf_prune.reporting.reports import ModuleSparsity
from hf_prune.training.rounds import Rounds

PATIENT = PruningConfig(sparsity=0.75, schedule="constant", rounds=3, patience=2, min_round_steps=1, end=100)


def start(config: PruningConfig = PATIENT, max_steps: int = 100) -> Rounds:
    return Rounds.plan(resolve(config), PruningHistory(asked=config.round_sparsities), max_steps)


def pruned(masked: int, zeros: int | None = None) -> SparsityReport:
    zeros = masked if zeros is None else zeros
    return SparsityReport((ModuleSparsity("layer", (4,), zeros, 4, masked),), zeros, 4)


def cut(rounds: Rounds, step: int) -> Round:
    return rounds.begin_(step, rounds.next_sparsity, pruned(rounds.pacing.round + 1), criterion="magnitude")


def weight(value: float) -> nn.Module:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


def test_the_config_says_which_pacing():
    assert type(start().pacing).__name__ == "Patience"
    even = PruningConfig(sparsity=0.75, schedule="constant", rounds=3, begin=10, end=40)
    assert start(even).pacing.cuts == [10, 20, 30]


def test_the_next_sparsity_is_that_of_the_next_cut():
    rounds = start()
    assert rounds.next_sparsity == 0.25
    cut(rounds, 0)
    assert rounds.next_sparsity == 0.5


def test_an_evaluation_belongs_to_where_it_was_made():
    rounds, model = start(dataclasses.replace(PATIENT, begin=5)), weight(1.0)
    rounds.observe_(2, 9.0, model)  # before the first cut
    row = cut(rounds, 5)
    rounds.observe_(5, 8.0, model)  # right after it
    rounds.observe_(6, 7.0, model)
    rounds.observe_(7, 7.5, model)
    assert rounds.history.dense == 9.0
    assert (row.after_cut, row.best, row.best_step, row.last, row.evaluations) == (8.0, 7.0, 6, 7.5, 2)
    assert rounds.history.evaluations == [(2, 9.0), (6, 7.0), (7, 7.5)]


def test_the_best_comes_back_when_the_round_ends():
    rounds, model = start(), weight(1.0)
    row = cut(rounds, 0)
    for step, value in enumerate([3.0, 2.0, 4.0, 5.0], start=1):
        nn.init.constant_(model.weight, float(step))
        rounds.observe_(step, value, model)
    assert rounds.pacing.is_due(4)
    said = rounds.end_("patience", model)
    assert model.weight.item() == 2.0
    assert row.ended == "patience"
    assert rounds.best is None
    assert said == "Round 1 ended (patience) with eval_loss 5.0000; its best, 2.0000 at step 2, comes back."


@pytest.mark.parametrize("changes", [{"restore": "last"}, {"patience": None, "min_round_steps": None}])
def test_nothing_is_copied_where_nothing_is_to_come_back(changes):
    rounds, model = start(dataclasses.replace(PATIENT, **changes)), weight(1.0)
    cut(rounds, 0)
    rounds.observe_(1, 3.0, model)
    assert rounds.best is None


def test_zeros_that_are_held_before_the_first_round_have_no_patience():
    rounds, model = start(dataclasses.replace(PATIENT, begin=50, hold_zeros=True)), weight(1.0)
    rounds.begin_(0, None, pruned(1), criterion="magnitude")
    for step in range(1, 10):
        rounds.observe_(step, float(step), model)
    assert rounds.best is None
    assert not rounds.pacing.is_due(10)
    assert rounds.history[0].best == 1.0


def test_a_round_begins_with_its_row_of_the_history():
    rounds = start()
    row = rounds.begin_(0, 0.25, pruned(1, zeros=2), criterion="random")
    assert rounds.history.rounds == [row]
    assert row == Round(1, 0, 0.25, 0.25, 1, 2, 4, "random")
    assert rounds.pacing.round == 1


def test_a_second_evaluation_at_the_same_step_does_not_count():
    rounds, model = start(), weight(1.0)
    cut(rounds, 0)
    for _ in range(3):
        rounds.observe_(1, 3.0, model)
    assert rounds.history[0].evaluations == 1
    assert not rounds.pacing.is_due(1)


def test_nan_is_said_once(caplog):
    rounds, model = start(), weight(1.0)
    cut(rounds, 0)
    for step in (1, 2):
        rounds.observe_(step, math.nan, model)
    assert caplog.text.count("eval_loss is NaN at step 1: no improvement.") == 1
    assert rounds.history[0].best is None
    assert rounds.pacing.is_due(2)


def test_what_a_round_costs(monkeypatch):
    now = 100.0
    monkeypatch.setattr("hf_prune.training.rounds.time.monotonic", lambda: now)
    rounds = start()
    now = 103.0  # Before the first cut, time is nobody's.
    row = cut(rounds, 0)
    now = 105.0
    rounds.count_step_(samples=8, tokens=None)
    rounds.count_step_(samples=8, tokens=100)
    now = 106.0
    other = cut(rounds, 2)
    now = 107.0
    rounds.count_step_(samples=4, tokens=50)
    assert (row.steps, row.samples, row.tokens, row.seconds) == (2, 16, 100, 3.0)
    assert (other.steps, other.samples, other.tokens, other.seconds) == (1, 4, 50, 1.0)


@pytest.mark.parametrize(("step", "why"), [(100, "max_steps"), (40, "stopped")])
def test_how_a_run_ended(step, why):
    rounds, model = start(), weight(1.0)
    for at in (0, 1, 2):
        row = cut(rounds, at)
    rounds.observe_(3, 1.0, model)
    with torch.no_grad():
        model.weight.add_(1)
    rounds.finish_(step, model)
    assert (rounds.history.ended, row.ended) == (why, why)
    assert model.weight.item() == 1.0


def test_a_run_that_ended_before_its_first_round():
    rounds = start()
    rounds.finish_(0, weight(1.0))
    assert rounds.history.ended == "stopped"
