"""Pacing: when a round happens. State machines over step numbers; nothing here knows a Trainer."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Even:
    """Rounds of equal length from one step to another; what the run has left after them is recovery.

    Attributes:
        cuts: The number of finished steps at which each round's cut happens; 0 is before the first step.
    """

    cuts: tuple[int, ...]

    @classmethod
    def spread(cls, rounds: int, begin: float, end: float | None, max_steps: int) -> "Even":
        """Spreads rounds evenly over a run.

        Args:
            rounds: Number of rounds.
            begin: Where the first round begins: 1 or more is a number of steps, below 1 a fraction of `max_steps`.
            end: Where the last round ends, in the same words; the end of the run if None.
            max_steps: Number of optimizer steps of the run.

        Returns:
            The pacing, with a step or more between cuts and after the last one.

        Raises:
            ValueError: if the rounds do not fit.

        Example:
            >>> Even.spread(4, begin=0, end=0.8, max_steps=100).cuts
            (0, 20, 40, 60)
        """
        if rounds == 0:
            return cls(())
        first, last = _steps(begin, max_steps), max_steps if end is None else _steps(end, max_steps)
        if last > max_steps:
            raise ValueError(
                f"end={end} is after the end of the run. Take an end of at most {max_steps} steps, or train longer."
            )
        if first >= last:
            raise ValueError(
                f"begin must be before end, got begin={begin} (step {first}) and end={end} (step {last}) "
                f"in a run of {max_steps} steps."
            )
        if rounds > last - first:
            raise ValueError(
                f"{rounds} rounds do not fit into {last - first} steps (from step {first} to {last} of {max_steps}). "
                "Take fewer rounds, or train longer; begin and end count steps from 1 on, and are fractions below."
            )
        return cls(tuple(first + i * (last - first) // rounds for i in range(rounds)))

    def is_due(self, finished_rounds: int, step: int) -> bool:
        """Whether the next cut happens now.

        Args:
            finished_rounds: Number of cuts made.
            step: Number of optimizer steps finished.

        Returns:
            True if the next round's step is reached; False before, and when there is no round left.
        """
        return finished_rounds < len(self.cuts) and step >= self.cuts[finished_rounds]


def _steps(value: float, max_steps: int) -> int:
    # As Trainer reads `logging_steps`; 0.07 of 100 steps is 7.000000000000001 in floating point.
    return int(value) if value >= 1 else math.ceil(round(value * max_steps, 9))
