"""Even pacing: rounds of equal length."""

from collections.abc import Sequence
from dataclasses import dataclass

from .timing import window

EVEN_SHARE = 0.25
"""Of the steps after `begin`, the share that rounds take where `end` does not say it; the rest is recovery.

Measured: a long recovery is worth more than long rounds, but patience needs room to decide.
"""


@dataclass
class Even:
    """Rounds of equal length from one step to another; what the run has left after them is recovery.

    Attributes:
        cuts: The number of finished steps at which each round's cut happens; 0 is before the first step.
        max_steps: The number of steps of the run.
        round: The current round, counted from 1; 0 before the first cut.
    """

    cuts: Sequence[int]
    max_steps: int
    round: int = 0

    @classmethod
    def plan(cls, rounds: int, begin: float, end: float | None, max_steps: int) -> "Even":
        """Spreads rounds evenly over a run.

        Args:
            rounds: Number of rounds.
            begin: Where the first round begins: 1 or more is a number of steps, below 1 a fraction of `max_steps`.
            end: Where the rounds end, in the same words; if None, after `EVEN_SHARE` of the steps that follow `begin`,
                or as many as the rounds need.
            max_steps: Number of optimizer steps of the run.

        Returns:
            The pacing, with a step or more between cuts and after the last one.

        Raises:
            ValueError: if the rounds do not fit.

        Example:
            >>> Even.plan(4, begin=0, end=0.8, max_steps=100).cuts
            [0, 20, 40, 60]
            >>> Even.plan(5, begin=0, end=None, max_steps=100).cuts
            [0, 5, 10, 15, 20]
        """
        if rounds == 0:
            return cls([], max_steps)
        first, last = window(begin, end, max_steps, EVEN_SHARE, needed=rounds)
        if rounds > last - first:
            raise ValueError(
                f"{rounds} rounds do not fit into {last - first} steps (from step {first} to {last} of {max_steps}). "
                "Take fewer rounds, or train longer; begin and end count steps from 1 on, and are fractions below."
            )
        return cls([first + i * (last - first) // rounds for i in range(rounds)], max_steps)

    def is_due(self, step: int) -> bool:
        """Whether the next cut happens now, after that many finished steps."""
        return self.round < len(self.cuts) and step >= self.cuts[self.round]

    def is_run_over(self, step: int) -> bool:
        """Whether the run has nothing left to do."""
        return step >= self.max_steps

    def why_round_ends(self, step: int) -> str | None:
        """Why the current round, or the time before the first one, ends now; None while it goes on."""
        return "planned" if self.is_due(step) else "max_steps" if self.is_run_over(step) else None

    def steps_left(self, step: int) -> int:
        """The number of steps that the current round may still take."""
        return (self.max_steps if self.round == len(self.cuts) else self.cuts[self.round]) - step

    def cut_(self, step: int) -> None:
        """Begins the next round."""
        self.round += 1

    def observe_(self, gain: float) -> None:
        """Hears of an evaluation; the rounds do not depend on it."""

    def resize_(self, max_steps: int, step: int) -> None:
        """Goes on in a run of another length.

        Raises:
            ValueError: if it ends before the last cut.
        """
        if self.round < len(self.cuts) and self.cuts[-1] >= max_steps:
            raise ValueError(
                f"the run has {max_steps} steps, but the checkpoint's last cut comes after step {self.cuts[-1]}. "
                "Resume with the same max_steps or num_train_epochs."
            )
        self.max_steps = max_steps
