import dataclasses
import itertools
import json
import math
import random

import pytest

from hf_prune.pacing.even import Even
from hf_prune.pacing.patience import Patience


def test_rounds_are_spread_evenly():
    assert Even.plan(4, begin=0, end=100, max_steps=100).cuts == [0, 25, 50, 75]
    assert Even.plan(3, begin=0, end=10, max_steps=10).cuts == [0, 3, 6]
    assert Even.plan(1, begin=0, end=None, max_steps=1).cuts == [0]


@pytest.mark.parametrize(
    ("rounds", "begin", "max_steps", "cuts", "end"),
    [
        (5, 0, 100, [0, 5, 10, 15, 20], 50),
        (2, 20, 100, [20, 30], 60),
        (2, 0.2, 100, [20, 30], 60),
        (5, 0, 8, [0, 1, 2, 3, 4], 5),  # A quarter of the run would be too short, and so would half.
        (5, 5, 10, [5, 6, 7, 8, 9], 10),
    ],
)
def test_where_end_does_not_say_it_rounds_take_a_share_or_what_they_need(rounds, begin, max_steps, cuts, end):
    assert Even.plan(rounds, begin, None, max_steps).cuts == cuts
    assert Patience.plan(rounds, begin, None, max_steps, [9], min_round_steps=1).end == end


def test_where_end_does_not_say_it_patience_keeps_its_reserve():
    assert Patience.plan(3, 10, None, 100, [9], min_round_steps=20).end == 70


@pytest.mark.parametrize(
    ("begin", "end", "cuts"),
    [
        (10, 100, [10, 40, 70]),
        (10, 40, [10, 20, 30]),
        (0.25, 100, [25, 50, 75]),
        (0.25, 0.75, [25, 41, 58]),
        (10, 0.25, [10, 15, 20]),
        (0.5, 80, [50, 60, 70]),
        (0, 100, [0, 33, 66]),
        (1, 4, [1, 2, 3]),
        (97, None, [97, 98, 99]),
        (0.97, 100, [97, 98, 99]),
    ],
)
def test_begin_and_end_are_steps_or_fractions_of_the_run(begin, end, cuts):
    assert Even.plan(3, begin, end, max_steps=100).cuts == cuts


def test_a_fraction_that_is_a_whole_number_of_steps_is_that_step():
    """0.29 · 100 is 28.999999999999996 in floating point, and step 29 all the same."""
    cuts = [Even.plan(1, begin=percent / 100, end=None, max_steps=100).cuts for percent in range(1, 100)]
    assert cuts == [[percent] for percent in range(1, 100)]


@pytest.mark.parametrize(("begin", "step"), [(0.25, 3), (0.2, 2), (0.201, 3), (0.001, 1), (0.0, 0)])
def test_a_fraction_that_is_not_is_the_next_step_as_trainer_reads_it(begin, step):
    assert Even.plan(1, begin=begin, end=None, max_steps=10).cuts == [step]


def test_cuts_rise_from_begin_and_leave_each_round_its_share():
    rng = random.Random(0)
    for _ in range(500):
        max_steps = rng.choice([1, 2, 5, 17, 100, 12_345])
        first = rng.randrange(max_steps)
        last = rng.randint(first + 1, max_steps)
        rounds = rng.randint(1, min(last - first, 40))
        cuts = Even.plan(rounds, first, last, max_steps).cuts
        assert len(cuts) == rounds
        assert all(type(cut) is int for cut in cuts)
        lengths = [b - a for a, b in itertools.pairwise([*cuts, last])]
        assert min(lengths) >= 1
        assert max(lengths) - min(lengths) <= 1
        assert cuts[0] == first
        assert cuts[-1] < last <= max_steps


def test_no_round_is_no_cut():
    pacing = Even.plan(0, begin=0, end=None, max_steps=10)
    assert pacing.cuts == []
    assert not any(pacing.is_due(step) for step in range(11))
    assert [pacing.is_run_over(step) for step in (9, 10)] == [False, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (3, 0, None, 2),
            r"3 rounds do not fit into 2 steps \(from step 0 to 2 of 2\)\. Take fewer rounds, or train longer",
        ),
        ((11, 0.5, 0.6, 100), r"11 rounds do not fit into 10 steps \(from step 50 to 60 of 100\)"),
        ((6, 95, None, 100), r"6 rounds do not fit into 5 steps \(from step 95 to 100 of 100\)"),
        (
            (1, 50, 20, 100),
            r"begin must be before end, got begin=50 \(step 50\) and end=20 \(step 20\) in a run of 100 steps\.",
        ),
        ((1, 20, 20, 100), r"begin must be before end, got begin=20 \(step 20\) and end=20 \(step 20\)"),
        ((1, 0.5, 0.25, 100), r"begin must be before end, got begin=0\.5 \(step 50\) and end=0\.25 \(step 25\)"),
        ((1, 0.5, 25, 100), r"begin must be before end, got begin=0\.5 \(step 50\) and end=25 \(step 25\)"),
        ((1, 50, 0.25, 100), r"begin must be before end, got begin=50 \(step 50\) and end=0\.25 \(step 25\)"),
        (
            (1, 100, None, 100),
            r"begin=100 \(step 100\) is not before the end of the run \(100 steps\)\. Begin earlier",
        ),
        ((1, 1000, None, 100), r"begin=1000 \(step 1000\) is not before the end of the run"),
        ((1, 0, None, 0), r"begin=0 \(step 0\) is not before the end of the run \(0 steps\)"),
        ((1, 0, 101, 100), r"end=101 is after the end of the run\. Take an end of at most 100 steps"),
        ((1, 50, 300, 100), r"end=300 is after the end of the run\. Take an end of at most 100 steps"),
    ],
)
def test_rounds_that_do_not_fit_the_run_are_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        Even.plan(*arguments)


def test_a_round_is_due_once_its_step_is_reached():
    pacing = Even([0, 5, 7], max_steps=10)
    due = {}
    for done in range(4):
        due[done] = [step for step in range(10) if pacing.is_due(step)]
        pacing.cut_(pacing.cuts[done] if done < 3 else 10)
    assert due == {0: list(range(10)), 1: [5, 6, 7, 8, 9], 2: [7, 8, 9], 3: []}


def test_even_rounds_end_as_planned_whatever_the_metric_does():
    pacing = Even([0, 5], max_steps=10)
    pacing.cut_(0)
    for _ in range(10):
        pacing.observe_(-1.0)
    assert [pacing.why_round_ends(step) for step in (4, 5)] == [None, "planned"]
    assert pacing.steps_left(2) == 3
    pacing.cut_(5)
    assert [pacing.why_round_ends(step) for step in (5, 9, 10)] == [None, None, "max_steps"]
    assert [pacing.is_run_over(step) for step in (9, 10)] == [False, True]
    assert pacing.steps_left(7) == 3


def test_even_rounds_in_a_run_of_another_length():
    pacing = Even([0, 5], max_steps=10, round=1)
    pacing.resize_(20, step=3)
    assert (pacing.max_steps, pacing.cuts) == (20, [0, 5])
    with pytest.raises(ValueError, match="the run has 5 steps, but the checkpoint's last cut comes after step 5"):
        pacing.resize_(5, step=3)


# Patience


def drive(pacing: Patience, metric, every: int = 1) -> list[tuple[int, str | None]]:
    """A run in which the metric (a function of round and steps in the round; lower is better) is seen every so often.

    Returns:
        The step and the reason of each cut, and of the end.
    """
    events: list[tuple[int, str | None]] = []
    best = math.inf
    for step in range(pacing.max_steps + 1):
        if step and step % every == 0 and pacing.round:
            value = metric(pacing.round, step - pacing.start)
            pacing.observe_(math.nan if math.isnan(value) else best - value)
            best = min(best, value) if not math.isnan(value) else best
        if pacing.is_run_over(step):
            return [*events, (step, pacing.why_round_ends(step))]
        if pacing.is_due(step):
            events.append((step, pacing.why_round_ends(step)))
            pacing.cut_(step)
            best = math.inf
    raise AssertionError("the run is at its end, and the pacing does not know")


def v_shaped(turning_point: int):
    """Improves until some step of each round, and gets worse from there."""
    return lambda _, step: abs(step - turning_point)


def test_a_round_ends_when_the_metric_has_not_improved_for_so_many_evaluations():
    pacing = Patience.plan(3, 0, 100, 100, [2], min_round_steps=1)
    assert drive(pacing, v_shaped(4)) == [(0, "planned"), (6, "patience"), (12, "patience"), (18, "patience")]


def test_each_round_has_its_patience_and_the_last_repeats():
    pacing = Patience.plan(4, 0, 100, 100, [1, 3], min_round_steps=1)
    cuts = [0, 5, 12, 19, 26]
    assert [step for step, _ in drive(pacing, v_shaped(4))] == cuts


def test_patience_counts_evaluations_not_steps():
    pacing = Patience.plan(2, 0, 1000, 1000, [2], min_round_steps=1)
    assert drive(pacing, v_shaped(40), every=10) == [(0, "planned"), (60, "patience"), (120, "patience")]


def test_what_was_best_before_a_cut_does_not_count_after_it():
    """Each round begins far worse than the one before it ended, and improves all the same."""
    pacing = Patience.plan(2, 0, 100, 100, [2], min_round_steps=1)
    events = drive(pacing, lambda number, step: 100 * number + abs(step - 4))
    assert events == [(0, "planned"), (6, "patience"), (12, "patience")]


def test_a_gain_of_min_delta_is_no_improvement_and_one_above_it_is():
    def run(delta: float) -> int:
        pacing = dataclasses.replace(Patience.plan(1, 0, 20, 20, [2]), min_delta=delta)
        return drive(pacing, lambda _, step: -0.5 * step)[-1][0]

    assert run(0.5) == 3  # The first value is an improvement on nothing.
    assert run(0.49) == 20


def test_nan_is_no_improvement():
    pacing = Patience.plan(1, 0, 20, 20, [3])
    assert drive(pacing, lambda _, step: math.nan) == [(0, "planned"), (3, "patience")]


def test_a_round_has_at_most_max_round_steps():
    pacing = Patience.plan(3, 0, 100, 100, [5], max_round_steps=7)
    improving = drive(pacing, lambda _, step: -step)
    assert improving == [(0, "planned"), (7, "max_round_steps"), (14, "max_round_steps"), (21, "max_round_steps")]


def test_a_reserve_is_left_to_later_rounds():
    pacing = Patience.plan(3, 0, 100, 100, [5], min_round_steps=10)
    assert drive(pacing, lambda _, step: -step) == [
        (0, "planned"),
        (80, "reserve"),
        (90, "reserve"),
        (100, "max_steps"),
    ]


def test_without_being_told_the_reserve_is_an_equal_share():
    assert Patience.plan(4, 20, 100, 100, [5]).min_round_steps == 20
    assert Patience.plan(4, 20, 60, 100, [5]).min_round_steps == 10
    assert Patience.plan(4, 20, 100, 100, [5], max_round_steps=6).min_round_steps == 6
    assert Patience.plan(4, 0, 5, 5, [5]).min_round_steps == 1


def test_the_last_cut_comes_before_end_and_the_last_round_goes_on():
    pacing = Patience.plan(3, 0, 0.5, 100, [5], min_round_steps=10)
    assert drive(pacing, lambda _, step: -step) == [
        (0, "planned"),
        (30, "reserve"),
        (40, "reserve"),
        (100, "max_steps"),
    ]


def test_a_round_that_ends_early_leaves_its_steps_to_later_ones():
    pacing = Patience.plan(3, 0, 60, 100, [2, 50])
    assert drive(pacing, v_shaped(4), every=2) == [
        (0, "planned"),
        (8, "patience"),
        (40, "reserve"),
        (100, "max_steps"),
    ]


def test_rounds_begin_at_begin():
    assert drive(Patience.plan(1, 0.25, None, 100, [3]), v_shaped(4)) == [(25, "planned"), (32, "patience")]


def test_the_target_is_always_reached_inside_the_budget():
    rng = random.Random(0)
    for _ in range(500):
        max_steps = rng.choice([1, 2, 7, 40, 333])
        rounds = rng.randint(1, min(max_steps, 20))
        begin = rng.randint(0, max_steps - rounds)
        patience = [rng.randint(1, 9) for _ in range(rng.randint(1, rounds))]
        most = rng.choice([None, rng.randint(1, max_steps)])
        end = rng.choice([None, rng.randint(begin + rounds, max_steps)])
        last = end or min(begin + max(rounds, math.ceil((max_steps - begin) / 2)), max_steps)
        least = rng.choice([None, rng.randint(1, max(1, min(most or max_steps, (last - begin) // rounds)))])
        pacing = Patience.plan(rounds, begin, end, max_steps, patience, max_round_steps=most, min_round_steps=least)
        values = {}

        def metric(number, step, values=values, rng=rng):
            return values.setdefault((number, step), rng.random())

        *cuts, (end, _) = drive(pacing, metric, every=rng.randint(1, 5))
        steps = [step for step, _ in cuts]
        assert len(cuts) == rounds
        assert steps[0] == begin
        lengths = [b - a for a, b in itertools.pairwise([*steps, end])]
        assert min(lengths) >= 1
        assert max(lengths) <= (most or max_steps)
        assert last - steps[-1] >= pacing.min_round_steps
        assert end <= max_steps


def test_steps_left_are_those_that_a_round_may_take_at_most():
    pacing = Patience.plan(3, 0, 100, 100, [5], min_round_steps=10)
    pacing.cut_(0)
    assert pacing.steps_left(0) == 80
    assert pacing.steps_left(30) == 50
    pacing.max_round_steps = 35
    assert pacing.steps_left(30) == 5


def test_steps_left_of_the_last_round_are_those_of_the_run():
    pacing = Patience.plan(2, 0, 40, 100, [5], min_round_steps=10)
    pacing.cut_(0)
    assert pacing.steps_left(5) == 25
    pacing.cut_(30)
    assert pacing.steps_left(30) == 70


@pytest.mark.parametrize(
    ("rounds", "begin", "end", "max_steps", "least", "message"),
    [
        (5, 0, None, 4, None, r"5 rounds of at least 1 steps do not fit into 4 steps \(from step 0 to 4 of 4\)"),
        (5, 60, None, 100, 9, r"5 rounds of at least 9 steps do not fit into 40 steps .* a smaller min_round_steps"),
        (5, 0, 40, 100, 9, r"5 rounds of at least 9 steps do not fit into 40 steps \(from step 0 to 40 of 100\)"),
        (1, 100, None, 100, None, r"begin=100 \(step 100\) is not before the end of the run"),
        (1, 0, 101, 100, None, r"end=101 is after the end of the run"),
    ],
)
def test_rounds_with_patience_that_do_not_fit_the_run_are_an_error(rounds, begin, end, max_steps, least, message):
    with pytest.raises(ValueError, match=message):
        Patience.plan(rounds, begin, end, max_steps, [1], min_round_steps=least)


def test_patience_in_a_run_of_another_length():
    pacing = Patience.plan(3, 0, 100, 100, [2], min_round_steps=10)
    pacing.cut_(0)
    pacing.resize_(200, step=50)
    assert [pacing.why_round_ends(step) for step in (179, 180)] == [None, "reserve"]
    with pytest.raises(ValueError, match="the run has 60 steps, too few after step 50 for 2 more rounds of 10 steps"):
        pacing.resize_(60, step=50)
    later = Patience.plan(2, 50, 100, 100, [2], min_round_steps=10)
    with pytest.raises(ValueError, match="the run has 60 steps, too few after step 50 for 2 more rounds of 10 steps"):
        later.resize_(60, step=10)


def test_an_end_stays_where_it_was_in_a_longer_run():
    pacing = Patience.plan(3, 0, 50, 100, [2], min_round_steps=10)
    pacing.cut_(0)
    pacing.resize_(200, step=20)
    assert (pacing.end, pacing.max_steps) == (50, 200)
    pacing.resize_(40, step=20)
    assert (pacing.end, pacing.max_steps) == (40, 40)


def test_the_last_round_goes_on_after_end_in_a_run_that_is_resumed():
    pacing = Patience.plan(2, 0, 20, 100, [2], min_round_steps=10)
    pacing.cut_(0)
    pacing.cut_(10)
    pacing.resize_(100, step=60)
    assert [pacing.why_round_ends(step) for step in (60, 100)] == [None, "max_steps"]


@pytest.mark.parametrize("pacing", [Even.plan(3, 0, None, 10), Patience.plan(3, 0, 10, 10, [1, 2], max_round_steps=5)])
def test_a_pacing_survives_json(pacing):
    pacing.cut_(0)
    pacing.observe_(-1.0)
    assert type(pacing)(**json.loads(json.dumps(dataclasses.asdict(pacing)))) == pacing
