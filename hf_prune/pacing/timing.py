"""Timing: what a config says of steps, checked, and as the steps of a run."""

import math
from collections.abc import Mapping
from typing import Protocol


class Timing(Protocol):
    """What a config says of time: see `PruningConfig`."""

    @property
    def round_sparsities(self) -> list[float]:
        """The absolute sparsity after each round."""

    @property
    def begin(self) -> float:
        """Where the first round begins."""

    @property
    def end(self) -> float | None:
        """Where the rounds end."""

    @property
    def patience(self) -> list[int] | None:
        """Evaluations without improvement that end a round."""

    @property
    def min_delta(self) -> float:
        """An improvement is a gain above this."""

    @property
    def max_round_steps(self) -> int | None:
        """The most steps that a round may take."""

    @property
    def min_round_steps(self) -> int | None:
        """The steps that are kept for each later round."""

    @property
    def restore(self) -> str:
        """What a round hands on: "best" or "last" weights."""

    @property
    def metric(self) -> str | None:
        """The evaluation metric that is followed."""


def require_timing(timing: Timing, asked: Mapping[str, object]) -> None:
    """Requires what can be told without a run.

    Args:
        timing: What a config says.
        asked: The fields of the config that do not have their defaults.

    Raises:
        ValueError: if a value is outside of its range, or contradicts another.
    """
    _require_begin_and_end(timing.begin, timing.end)
    _require_patience(timing, asked)


def _require_begin_and_end(begin: float, end: float | None) -> None:
    if not 0 <= begin < math.inf:
        raise ValueError(f"begin must be 0 or more (steps, or below 1 a fraction of the run), got {begin}.")
    if end is not None and not 0 < end < math.inf:
        raise ValueError(f"end must be above 0 (steps, or below 1 a fraction of the run), got {end}.")
    for name, value in (("begin", begin), ("end", end)):
        if value is not None and value >= 1 and value % 1:
            raise ValueError(f"{name} must be a whole number of steps where it is not below 1, got {value}.")
    # Steps and fractions compare only when the length of the run is known.
    if end is not None and (begin >= 1) == (end >= 1) and begin >= end:
        raise ValueError(f"begin must be before end, got begin={begin} and end={end}.")


def _require_patience(timing: Timing, asked: Mapping[str, object]) -> None:
    patience, least, most = timing.patience, timing.min_round_steps, timing.max_round_steps
    numbers: list[tuple[str, object]] = [("patience", number) for number in patience or []]
    numbers += [("max_round_steps", most), ("min_round_steps", least)]
    for name, number in numbers:
        if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
            raise ValueError(f"{name} must be a whole number of at least 1, got {number!r}.")
    if not 0 <= timing.min_delta < math.inf:
        raise ValueError(f"min_delta must be 0 or more, in units of the metric, got {timing.min_delta}.")
    if patience is None:
        for name in ("min_delta", "max_round_steps", "min_round_steps", "restore"):
            if name in asked:
                raise ValueError(f"{name} needs patience: without it, rounds are spread evenly.")
        return
    rounds = len(timing.round_sparsities)
    if not rounds:
        raise ValueError("patience needs rounds to end, and with hold_zeros alone there are none. Give a sparsity.")
    if not 1 <= len(patience) <= rounds:
        raise ValueError(
            f"patience must have one number, or at most one for each of the {rounds} rounds, got {len(patience)}."
        )
    if most is not None and (least or 1) > most:
        raise ValueError(f"min_round_steps must be at most max_round_steps, got {least} and {most}.")


def window(begin: float, end: float | None, max_steps: int, share: float, needed: int) -> tuple[int, int]:
    """The steps from which and to which rounds may be; without `end`, at least as many as `needed`, if there are."""
    first = _steps(begin, max_steps)
    if first >= max_steps:
        raise ValueError(
            f"begin={begin} (step {first}) is not before the end of the run ({max_steps} steps). "
            "Begin earlier, or train longer."
        )
    if end is None:
        last = min(first + max(needed, _steps(share, max_steps - first)), max_steps)
    else:
        last = _steps(end, max_steps)
    if last > max_steps:
        raise ValueError(
            f"end={end} is after the end of the run. Take an end of at most {max_steps} steps, or train longer."
        )
    if first >= last:
        raise ValueError(
            f"begin must be before end, got begin={begin} (step {first}) and end={end} (step {last}) in a run of "
            f"{max_steps} steps."
        )
    return first, last


def _steps(value: float, max_steps: int) -> int:
    # As Trainer reads `logging_steps`; 0.07 of 100 steps is 7.000000000000001 in floating point.
    return int(value) if value >= 1 else math.ceil(round(value * max_steps, 9))
