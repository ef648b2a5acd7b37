"""Schedules: the target sparsity and a number of rounds → the sparsity after each round.

A schedule is a plain function that returns `[s_1, …, s_n]`, the absolute sparsity after each round, with `s_n` equal
to the target to the last bit. It takes what it needs of `rounds` and `initial_sparsity`; its own defaults hold where
the config leaves them out. One more schedule is one more function here and one more line in `SCHEDULES`.
"""

import inspect
import itertools
import math
from collections.abc import Callable, Sequence

AUTO_ONE_SHOT_UP_TO = 0.8
"""Targets up to this sparsity are reached in one cut by `schedule="auto"`."""


def one_shot(sparsity: float) -> list[float]:
    """Everything in one cut, then fine-tuning.

    `s_1 = T`

    Args:
        sparsity: The target `T`, fraction in `[0, 1)`.

    Returns:
        `[T]`.

    Example:
        >>> one_shot(0.8)
        [0.8]
    """
    return [sparsity]


def constant(sparsity: float, rounds: int = 5) -> list[float]:
    """The same share of the *original* weights in each round.

    `s_i = T · i / n`

    Args:
        sparsity: The target `T`, fraction in `[0, 1)`.
        rounds: The number of rounds `n`.

    Returns:
        `[s_1, …, s_n]`.

    Example:
        >>> constant(0.5, rounds=4)
        [0.125, 0.25, 0.375, 0.5]
    """
    return ending_at(sparsity, [sparsity * i / rounds for i in range(1, rounds + 1)])


def geometric(sparsity: float, rounds: int = 5) -> list[float]:
    """The same share `q = 1 − (1−T)^(1/n)` of the *remaining* weights in each round.

    `s_i = 1 − (1−T)^(i/n)`

    Args:
        sparsity: The target `T`, fraction in `[0, 1)`.
        rounds: The number of rounds `n`.

    Returns:
        `[s_1, …, s_n]`.

    Example:
        >>> [round(s, 3) for s in geometric(0.875, rounds=3)]
        [0.5, 0.75, 0.875]

    Source: the iterative geometric schedule of Janusz et al. 2025, arXiv 2508.13836.
    """
    return ending_at(sparsity, [1 - (1 - sparsity) ** (i / rounds) for i in range(1, rounds + 1)])


def hybrid(sparsity: float, rounds: int = 5, initial_sparsity: float | None = None) -> list[float]:
    """Few-shot: a large first cut to `S`, then geometric on what remains.

    `s_i = 1 − (1−S) · ((1−T)/(1−S))^((i−1)/(n−1))`, so `s_1 = S` and `s_n = T`.

    Args:
        sparsity: The target `T`, fraction in `[0, 1)`.
        rounds: The number of rounds `n`, at least 2.
        initial_sparsity: The first cut `S`, in `[0, T)`; if None, half of the way to `T` on a logarithmic scale of
            the weights kept, `S = 1 − (1−T)^(1/2)`.

    Returns:
        `[s_1, …, s_n]`.

    Raises:
        ValueError: if `rounds` is below 2, or `initial_sparsity` is not in `[0, T)`.

    Example:
        >>> [round(s, 3) for s in hybrid(0.96, rounds=3, initial_sparsity=0.75)]
        [0.75, 0.9, 0.96]

    Source: the hybrid (few-shot) schedule of Janusz et al. 2025, arXiv 2508.13836.
    """
    if rounds < 2:
        raise ValueError(f"hybrid needs at least 2 rounds, got {rounds}. For a single cut use schedule='one_shot'.")
    if initial_sparsity is not None and not 0 <= initial_sparsity < sparsity:
        raise ValueError(
            f"initial_sparsity must be in [0, sparsity), got {initial_sparsity} with sparsity={sparsity}. "
            "It is the sparsity after the first cut of the hybrid schedule."
        )
    first = 1 - math.sqrt(1 - sparsity) if initial_sparsity is None else initial_sparsity
    share = (1 - sparsity) / (1 - first)
    return ending_at(sparsity, [1 - (1 - first) * share ** (i / (rounds - 1)) for i in range(rounds)])


def cubic(sparsity: float, rounds: int = 5) -> list[float]:
    """Fast at first, ever slower towards the target.

    `s_i = T · (1 − (1 − i/n)³)`

    Args:
        sparsity: The target `T`, fraction in `[0, 1)`.
        rounds: The number of rounds `n`.

    Returns:
        `[s_1, …, s_n]`.

    Example:
        >>> cubic(0.5, rounds=2)
        [0.4375, 0.5]

    Source: Zhu and Gupta 2017, "To prune, or not to prune", arXiv 1710.01878.
    """
    return ending_at(sparsity, [sparsity * (1 - (1 - i / rounds) ** 3) for i in range(1, rounds + 1)])


def auto(sparsity: float, rounds: int | None = None, initial_sparsity: float | None = None) -> list[float]:
    """Picks a schedule from what is known.

    The rule: `one_shot` for a single round, and for a target of at most `AUTO_ONE_SHOT_UP_TO` when neither `rounds`
    nor `initial_sparsity` asks for more; `hybrid` otherwise. Up to 0.8 one cut is as good as several, and simpler;
    above, the few-shot hybrid is ahead. This is what the paper found, and what `recipes/study.py`
    measured (a small GPT-Neo on stories, magnitude, 300 steps each, test perplexity, mean and standard deviation over
    three seeds; learning rate and length of the rounds chosen on validation; dense 2.216):

    ========  =============  =============  =============  =============
    sparsity  one_shot       constant       geometric      hybrid
    ========  =============  =============  =============  =============
    0.5       2.219 ± 0.002  2.219 ± 0.002  2.219 ± 0.002  2.219 ± 0.001
    0.7       2.237 ± 0.002  2.237 ± 0.004  2.236 ± 0.003  2.233 ± 0.004
    0.8       2.259 ± 0.006  2.262 ± 0.005  2.264 ± 0.006  2.260 ± 0.008
    0.9       2.342 ± 0.009  2.345 ± 0.017  2.317 ± 0.004  2.301 ± 0.010
    0.95      2.500 ± 0.006  2.481 ± 0.022  2.400 ± 0.006  2.372 ± 0.010
    0.98      4.646 ± 0.597  2.858 ± 0.014  2.501 ± 0.014  2.492 ± 0.000
    ========  =============  =============  =============  =============

    On digits, with a small ViT, no schedule can be told from another up to 0.9, and hybrid is ahead at 0.95 and 0.98.
    With a criterion that loses less, rounds matter less: with fisher on stories one_shot and hybrid are even at 0.9
    (2.275 and 2.274), and hybrid is ahead at 0.95 (2.337 and 2.312).

    Args:
        sparsity: The target `T`, fraction in `[0, 1)`.
        rounds: The number of rounds, or None to leave it to the schedule.
        initial_sparsity: The first cut of `hybrid`, or None.

    Returns:
        `[s_1, …, s_n]`.

    Raises:
        ValueError: as `hybrid` does.

    Example:
        >>> auto(0.4)
        [0.4]
        >>> [round(s, 3) for s in auto(0.96)]
        [0.8, 0.866, 0.911, 0.94, 0.96]

    Source: the guidelines of Janusz et al. 2025, arXiv 2508.13836.
    """
    if initial_sparsity is None and (rounds == 1 or (rounds is None and sparsity <= AUTO_ONE_SHOT_UP_TO)):
        return one_shot(sparsity)
    return resolve("hybrid", sparsity, rounds, initial_sparsity)


SCHEDULES: dict[str, Callable[..., list[float]]] = {
    "auto": auto,
    "one_shot": one_shot,
    "constant": constant,
    "geometric": geometric,
    "hybrid": hybrid,
    "cubic": cubic,
}


def resolve(
    schedule: str, sparsity: float, rounds: int | None = None, initial_sparsity: float | None = None
) -> list[float]:
    """Calls the schedule of that name with what was given.

    Args:
        schedule: A key of `SCHEDULES`.
        sparsity: The target, fraction in `[0, 1)`.
        rounds: The number of rounds, or None for the schedule's own default.
        initial_sparsity: The sparsity after the first cut, or None for the schedule's own default.

    Returns:
        The absolute sparsity after each round.

    Raises:
        ValueError: if the schedule is unknown, does not take an argument that is given, refuses its value, or gives
            what is no schedule.

    Example:
        >>> resolve("constant", 0.5, rounds=2)
        [0.25, 0.5]
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}; got {schedule!r}.")
    if rounds is not None and rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}.")
    given = {k: v for k, v in {"rounds": rounds, "initial_sparsity": initial_sparsity}.items() if v is not None}
    if schedule == "one_shot" and rounds == 1:
        given.pop("rounds")
    for name in given:
        if name not in inspect.signature(SCHEDULES[schedule]).parameters:
            takers = [key for key, function in SCHEDULES.items() if name in inspect.signature(function).parameters]
            raise ValueError(
                f"{name}={given[name]} does not go with schedule={schedule!r}. "
                f"Leave it out, or take one of {', '.join(takers)}."
            )
    values = SCHEDULES[schedule](sparsity, **given)
    rises = bool(values) and values[0] >= 0 and all(a <= b for a, b in itertools.pairwise(values))
    if not rises or values[-1] != sparsity:
        raise ValueError(f"schedule {schedule!r} gave {values}; it has to rise, and to end at {sparsity}.")
    return values


def explicit(sparsities: Sequence[float]) -> list[float]:
    """A schedule written by hand.

    Args:
        sparsities: The absolute sparsity after each round, fractions in `[0, 1)` that rise.

    Returns:
        The same values as a list.

    Raises:
        ValueError: if there is none, or one does not rise above the one before.

    Example:
        >>> explicit([0.5, 0.9])
        [0.5, 0.9]
    """
    if not sparsities:
        raise ValueError("sparsities must name at least one round, got an empty list.")
    for before, after in itertools.pairwise(sparsities):
        if not after > before:
            raise ValueError(
                f"sparsities must rise from round to round, got {after} after {before}. "
                "They are absolute: what is pruned stays pruned."
            )
    return list(sparsities)


def ending_at(sparsity: float, values: list[float]) -> list[float]:
    """The values, of which the last is the target itself, not a formula's rounding of it: zeros are counted by it."""
    return [*values[:-1], sparsity]
