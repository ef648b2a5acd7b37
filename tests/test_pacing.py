import dataclasses
import itertools
import random

import pytest

from hf_prune.pacing import Even


def test_rounds_are_spread_over_the_whole_run():
    assert Even.spread(4, begin=0, end=None, max_steps=100).cuts == (0, 25, 50, 75)
    assert Even.spread(3, begin=0, end=None, max_steps=10).cuts == (0, 3, 6)
    assert Even.spread(1, begin=0, end=None, max_steps=1).cuts == (0,)


@pytest.mark.parametrize(
    ("begin", "end", "cuts"),
    [
        (10, None, (10, 40, 70)),
        (10, 40, (10, 20, 30)),
        (0.25, None, (25, 50, 75)),
        (0.25, 0.75, (25, 41, 58)),
        (10, 0.25, (10, 15, 20)),
        (0.5, 80, (50, 60, 70)),
        (0, 100, (0, 33, 66)),
        (1, 4, (1, 2, 3)),
        (97, None, (97, 98, 99)),
        (0.97, 100, (97, 98, 99)),
    ],
)
def test_begin_and_end_are_steps_or_fractions_of_the_run(begin, end, cuts):
    assert Even.spread(3, begin, end, max_steps=100).cuts == cuts


def test_a_fraction_that_is_a_whole_number_of_steps_is_that_step():
    """0.29 · 100 is 28.999999999999996 in floating point, and step 29 all the same."""
    cuts = [Even.spread(1, begin=percent / 100, end=None, max_steps=100).cuts for percent in range(1, 100)]
    assert cuts == [(percent,) for percent in range(1, 100)]


@pytest.mark.parametrize(("begin", "step"), [(0.25, 3), (0.2, 2), (0.201, 3), (0.001, 1), (0.0, 0)])
def test_a_fraction_that_is_not_is_the_next_step_as_trainer_reads_it(begin, step):
    assert Even.spread(1, begin=begin, end=None, max_steps=10).cuts == (step,)


def test_cuts_rise_from_begin_and_leave_each_round_its_share():
    rng = random.Random(0)
    for _ in range(500):
        max_steps = rng.choice([1, 2, 5, 17, 100, 12_345])
        first = rng.randrange(max_steps)
        last = rng.randint(first + 1, max_steps)
        rounds = rng.randint(1, min(last - first, 40))
        cuts = Even.spread(rounds, first, last, max_steps).cuts
        assert len(cuts) == rounds
        assert all(type(cut) is int for cut in cuts)
        lengths = [b - a for a, b in itertools.pairwise([*cuts, last])]
        assert min(lengths) >= 1
        assert max(lengths) - min(lengths) <= 1
        assert cuts[0] == first
        assert cuts[-1] < last <= max_steps


def test_no_round_is_no_cut():
    pacing = Even.spread(0, begin=0, end=None, max_steps=10)
    assert pacing.cuts == ()
    assert not pacing.is_due(0, 5)


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
        ((1, 100, None, 100), r"begin must be before end, got begin=100 \(step 100\) and end=None \(step 100\)"),
        ((1, 1000, None, 100), r"begin must be before end, got begin=1000 \(step 1000\)"),
        ((1, 0, None, 0), r"begin must be before end, .* in a run of 0 steps"),
        ((1, 0, 101, 100), r"end=101 is after the end of the run\. Take an end of at most 100 steps"),
        ((1, 200, 300, 100), r"end=300 is after the end of the run\. Take an end of at most 100 steps"),
    ],
)
def test_rounds_that_do_not_fit_the_run_are_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        Even.spread(*arguments)


def test_a_round_is_due_once_its_step_is_reached():
    pacing = Even((0, 5, 7))
    due = {done: [step for step in range(10) if pacing.is_due(done, step)] for done in range(5)}
    assert due == {0: list(range(10)), 1: [5, 6, 7, 8, 9], 2: [7, 8, 9], 3: [], 4: []}


def test_pacing_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Even((0,)).cuts = (1,)
