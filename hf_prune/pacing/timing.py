"""Timing: `begin` and `end`, checked, and as steps of a run."""

import math


def require_begin_and_end(begin: float, end: float | None) -> None:
    """Requires a window that a run may have.

    Raises:
        ValueError: if it cannot be, whatever the number of steps.
    """
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
