import inspect
import itertools
import math
from decimal import Decimal, localcontext
from fractions import Fraction

import pytest

from hf_prune import schedules
from hf_prune.schedules import auto, constant, cubic, explicit, geometric, hybrid, one_shot, resolve

TARGETS = [1e-6, 0.05, 0.1, 1 / 3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 1 - 1e-9]
ROUNDS = [1, 2, 3, 4, 5, 7, 10, 16, 33, 50]
SEVERAL = [n for n in ROUNDS if n > 1]
ITERATIVE = [constant, geometric, cubic]


def power(base, exponent):
    """`base ** exponent` of fractions, to fifty digits."""
    with localcontext() as context:
        context.prec = 50
        base, exponent = (Decimal(x.numerator) / Decimal(x.denominator) for x in (base, exponent))
        return Fraction(base**exponent)


# The equations that the docstrings give, with numbers that do not round.
EQUATIONS = {
    constant: lambda t, n, i: t * Fraction(i, n),
    geometric: lambda t, n, i: 1 - power(1 - t, Fraction(i, n)),
    cubic: lambda t, n, i: t * (1 - (1 - Fraction(i, n)) ** 3),
}


def hybrid_equation(t, s, n, i):
    return 1 - (1 - s) * power((1 - t) / (1 - s), Fraction(i - 1, n - 1))


def close(values, exact):
    return all(abs(Fraction(v) - e) < Fraction(1, 10**13) for v, e in zip(values, exact, strict=True))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("schedule", ITERATIVE)
def test_an_iterative_schedule_is_its_equation(schedule, target):
    for n in ROUNDS:
        exact = [EQUATIONS[schedule](Fraction(target), n, i) for i in range(1, n + 1)]
        assert close(schedule(target, rounds=n), exact)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.999])
def test_hybrid_is_its_equation(target, share):
    first = target * share
    for n in SEVERAL:
        exact = [hybrid_equation(Fraction(target), Fraction(first), n, i) for i in range(1, n + 1)]
        values = hybrid(target, rounds=n, initial_sparsity=first)
        assert close(values, exact)
        assert values[0] == pytest.approx(first, abs=1e-15)


@pytest.mark.parametrize("target", TARGETS)
def test_hybrid_by_default_first_goes_half_of_the_way_on_a_logarithmic_scale(target):
    first = 1 - power(1 - Fraction(target), Fraction(1, 2))
    for n in SEVERAL:
        assert close(hybrid(target, rounds=n), [hybrid_equation(Fraction(target), first, n, i + 1) for i in range(n)])


def test_the_geometric_schedule_removes_the_same_share_of_what_remains():
    remaining = [1.0, *(1 - s for s in geometric(0.97, rounds=6))]
    shares = [1 - after / before for before, after in itertools.pairwise(remaining)]
    assert shares == pytest.approx([1 - 0.03 ** (1 / 6)] * 6)


def test_the_constant_schedule_removes_the_same_share_of_the_original():
    values = [0.0, *constant(0.9, rounds=6)]
    assert [b - a for a, b in itertools.pairwise(values)] == pytest.approx([0.15] * 6)


def lists(target, n):
    every = [schedule(target, rounds=n) for schedule in ITERATIVE] + [one_shot(target), auto(target)]
    if n > 1:
        every += [hybrid(target, rounds=n), hybrid(target, n, target / 3), auto(target, rounds=n)]
    return every


@pytest.mark.parametrize("n", ROUNDS)
def test_every_schedule_rises_and_ends_at_the_target_to_the_last_bit(n):
    for target in [*TARGETS, *(k / 997 for k in range(1, 997, 7))]:
        for values in lists(target, n):
            assert values[-1] == target
            assert all(a < b for a, b in itertools.pairwise([0.0, *values]))
            assert all(type(value) is float for value in values)
        assert [len(values) for values in lists(target, n)[:3]] == [n, n, n]


@pytest.mark.parametrize("target", [1e-12, 1 - 2**-52, 1 - 2**-53])
def test_at_the_ends_of_floating_point_a_schedule_may_stand_still_but_never_falls(target):
    for n in ROUNDS:
        for values in lists(target, n):
            assert values[-1] == target
            assert all(a <= b for a, b in itertools.pairwise([0.0, *values]))


@pytest.mark.parametrize("schedule", [s for s in schedules.SCHEDULES.values() if s is not one_shot])
def test_a_target_of_zero_is_no_error(schedule):
    assert set(schedule(0.0)) == {0.0}


def test_one_shot_is_one_cut():
    assert one_shot(0.9) == [0.9]


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_every_schedule_works_with_the_sparsity_alone(name):
    values = resolve(name, 0.9)
    assert values[-1] == 0.9
    assert name != "one_shot" or len(values) == 1


def test_the_schedules_of_the_study_are_known():
    assert {"auto", "one_shot", "constant", "geometric", "hybrid", "cubic"} <= set(schedules.SCHEDULES)


@pytest.mark.parametrize("schedule", [*schedules.SCHEDULES.values(), resolve, explicit])
def test_every_schedule_shows_an_example(schedule):
    assert ">>>" in inspect.getdoc(schedule)


# auto


@pytest.mark.parametrize("target", [0.0, 0.2, 0.5, 0.8])
def test_auto_takes_one_cut_up_to_eight_tenths(target):
    assert auto(target) == [target]


def test_auto_takes_the_hybrid_above_eight_tenths():
    target = math.nextafter(0.8, 1)
    assert auto(target) == hybrid(target, rounds=5)
    assert auto(0.9) == hybrid(0.9, rounds=5)


def test_auto_takes_one_cut_if_one_round_is_asked_for():
    assert auto(0.95, rounds=1) == [0.95]


def test_auto_takes_the_hybrid_if_rounds_or_a_first_cut_ask_for_it():
    assert auto(0.3, rounds=4) == hybrid(0.3, rounds=4)
    assert auto(0.3, initial_sparsity=0.1) == hybrid(0.3, 5, 0.1)
    assert auto(0.9, rounds=6, initial_sparsity=0.0) == hybrid(0.9, 6, 0.0)


def test_auto_does_not_drop_a_first_cut_for_want_of_rounds():
    with pytest.raises(ValueError, match=r"hybrid needs at least 2 rounds, got 1\. For a single cut use"):
        auto(0.9, rounds=1, initial_sparsity=0.5)


# resolve and explicit


@pytest.mark.parametrize("schedule", ITERATIVE)
def test_resolve_hands_over_the_rounds(schedule):
    assert resolve(schedule.__name__, 0.8, rounds=7) == schedule(0.8, rounds=7)


def test_resolve_hands_over_the_first_cut():
    assert resolve("hybrid", 0.8, rounds=4, initial_sparsity=0.0) == hybrid(0.8, 4, 0.0)


def test_one_shot_of_one_round_is_no_contradiction():
    assert resolve("one_shot", 0.8, rounds=1) == [0.8]


def test_explicit_is_a_copy_of_what_was_given():
    given = [0.0, 0.25, 0.9]
    values = explicit(given)
    values.append(1.0)
    assert given == [0.0, 0.25, 0.9]
    assert explicit((0.25, 0.9)) == [0.25, 0.9]


# Errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: resolve("linear", 0.5),
            rf"schedule must be one of {', '.join(schedules.SCHEDULES)}; got 'linear'\.",
        ),
        (lambda: resolve("", 0.5), r"schedule must be one of .*; got ''\."),
        (lambda: resolve("constant", 0.5, rounds=0), r"rounds must be at least 1, got 0\."),
        (lambda: resolve("auto", 0.5, rounds=-2), r"rounds must be at least 1, got -2\."),
        (
            lambda: resolve("one_shot", 0.5, rounds=2),
            r"rounds=2 does not go with schedule='one_shot'\. Leave it out, or take one of "
            r"auto, constant, geometric, hybrid, cubic",
        ),
        (
            lambda: resolve("geometric", 0.5, initial_sparsity=0.1),
            r"initial_sparsity=0\.1 does not go with schedule='geometric'\. .* take one of auto, hybrid",
        ),
        (lambda: resolve("one_shot", 0.5, 1, 0.1), r"initial_sparsity=0\.1 does not go with schedule='one_shot'"),
        (lambda: hybrid(0.9, rounds=1), r"hybrid needs at least 2 rounds, got 1\. .* use schedule='one_shot'\."),
        (lambda: resolve("hybrid", 0.9, rounds=1), r"hybrid needs at least 2 rounds, got 1"),
        (
            lambda: hybrid(0.8, initial_sparsity=0.8),
            r"initial_sparsity must be in \[0, sparsity\), got 0\.8 with sparsity=0\.8\. It is the sparsity after the",
        ),
        (lambda: hybrid(0.8, initial_sparsity=0.9), r"initial_sparsity must be in .* got 0\.9 with sparsity=0\.8"),
        (lambda: hybrid(0.8, initial_sparsity=-0.1), r"initial_sparsity must be in .* got -0\.1 with"),
        (lambda: hybrid(0.8, initial_sparsity=math.nan), r"initial_sparsity must be in .* got nan with"),
        (lambda: auto(0.2, initial_sparsity=0.3), r"initial_sparsity must be in .* got 0\.3 with sparsity=0\.2"),
        (lambda: explicit([]), r"sparsities must name at least one round, got an empty list\."),
        (
            lambda: explicit([0.5, 0.4]),
            r"sparsities must rise from round to round, got 0\.4 after 0\.5\. They are absolute: what is pruned stays",
        ),
        (lambda: explicit([0.1, 0.5, 0.5]), r"sparsities must rise .* got 0\.5 after 0\.5"),
        (lambda: explicit([0.1, math.nan]), r"sparsities must rise .* got nan after 0\.1"),
    ],
)
def test_a_schedule_that_cannot_be_is_an_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("values", [[], [0.5, 0.25, 0.9], [0.5, 0.8], [-0.1, 0.9], [0.1, 1.2, 0.9], [math.nan, 0.9]])
def test_a_schedule_that_is_none_is_an_error(values, monkeypatch):
    monkeypatch.setitem(schedules.SCHEDULES, "mine", lambda sparsity: values)
    with pytest.raises(ValueError, match=r"schedule 'mine' gave .*; it has to rise, and to end at 0\.9"):
        resolve("mine", 0.9)
