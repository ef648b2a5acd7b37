"""Patience: rounds that end when the metric has stopped improving.

This pacing and the even one are told of each cut (`cut_`) and each evaluation (`observe_`), and say whether the next
cut happens now (`is_due`), whether the run is over (`is_run_over`), and why a round ends (`why_round_ends`), in one of
these words:

`planned`           its end was set beforehand
`patience`          the metric has not improved for as many evaluations as patience allows
`max_round_steps`   it has had all the steps that a round may have
`reserve`           the steps that are left are those that later rounds need
`max_steps`         the run has no more steps

A caller that knows of yet another reason, such as another callback that stops training, has its own word for it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .timing import window

PATIENCE_SHARE = 0.5
"""As `EVEN_SHARE`: patience needs more room, to decide."""


def require_patience(asked: Mapping[str, Any], rounds: int) -> None:
    """Requires a patience that the rounds of a config can have.

    Args:
        asked: The fields of the config that do not have their defaults.
        rounds: Number of rounds.

    Raises:
        ValueError: if a value is outside of its range, or contradicts another.
    """
    patience, least, most = (asked.get(name) for name in ("patience", "min_round_steps", "max_round_steps"))
    for name, number in [
        *(("patience", n) for n in patience or []),
        ("max_round_steps", most),
        ("min_round_steps", least),
    ]:
        if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
            raise ValueError(f"{name} must be a whole number of at least 1, got {number!r}.")
    if not 0 <= (delta := asked.get("min_delta", 0.0)) < math.inf:
        raise ValueError(f"min_delta must be 0 or more, in units of the metric, got {delta}.")
    if patience is None:
        for name in ("min_delta", "max_round_steps", "min_round_steps", "restore"):
            if name in asked:
                raise ValueError(f"{name} needs patience: without it, rounds are spread evenly.")
        return
    if not rounds:
        raise ValueError("patience needs rounds to end, and with hold_zeros alone there are none. Give a sparsity.")
    if not 1 <= len(patience) <= rounds:
        raise ValueError(
            f"patience must have one number, or at most one for each of the {rounds} rounds, got {len(patience)}."
        )
    if most is not None and (least or 1) > most:
        raise ValueError(f"min_round_steps must be at most max_round_steps, got {least} and {most}.")


@dataclass
class Patience:
    """Rounds that end when the metric has stopped improving, within the steps of the run.

    Patience decides how the steps up to `end` are divided. As long as there are later rounds, a reserve of
    `min_round_steps` for each of them is left untouched, so that the last cut always comes before `end`. The last
    round may go on to the end of the run, which is over when that round ends.

    Attributes:
        rounds: Number of rounds.
        begin: The number of finished steps at which the first cut happens.
        end: The number of finished steps at which the rounds end, but for the last one, which may go on.
        max_steps: The number of steps of the run.
        patience: For each round, how many evaluations in a row may pass without improvement; the last repeats.
        min_delta: An improvement is a gain above this, in units of the metric.
        max_round_steps: The most steps that a round may take; no limit if None.
        min_round_steps: The steps that are kept for each later round.
        round: The current round, counted from 1; 0 before the first cut.
        start: The number of finished steps at which it began.
        waited: The evaluations in a row without improvement, up to now.
    """

    rounds: int
    begin: int
    end: int
    max_steps: int
    patience: Sequence[int]
    min_delta: float = 0.0
    max_round_steps: int | None = None
    min_round_steps: int = 1
    round: int = 0
    start: int = 0
    waited: int = 0

    @classmethod
    def plan(
        cls,
        rounds: int,
        begin: float,
        end: float | None,
        max_steps: int,
        patience: Sequence[int],
        *,
        max_round_steps: int | None = None,
        min_round_steps: int | None = None,
    ) -> "Patience":
        """Plans rounds for a run.

        Args:
            rounds: As in `Even.plan`.
            begin: As there.
            end: As there, with `PATIENCE_SHARE`.
            max_steps: As there.
            patience: For each round, evaluations without improvement; the last repeats.
            max_round_steps: The most steps that a round may take; no limit if None.
            min_round_steps: The steps to keep for each later round; an equal share if None.

        Raises:
            ValueError: if the rounds do not fit.

        Example:
            >>> pacing = Patience.plan(2, begin=0, end=0.8, max_steps=100, patience=[3])
            >>> pacing.cut_(0)
            >>> [pacing.why_round_ends(step) for step in (39, 40)]
            [None, 'reserve']
        """
        first, last = window(begin, end, max_steps, PATIENCE_SHARE, needed=rounds * (min_round_steps or 1))
        share = (last - first) // rounds
        least = min_round_steps or max(1, min(share, max_round_steps or share))
        if rounds * least > last - first:
            raise ValueError(
                f"{rounds} rounds of at least {least} steps do not fit into {last - first} steps (from step {first} "
                f"to {last} of {max_steps}). Take fewer rounds or a smaller min_round_steps, or train longer."
            )
        return cls(
            rounds, first, last, max_steps, list(patience), max_round_steps=max_round_steps, min_round_steps=least
        )

    def is_due(self, step: int) -> bool:
        """Whether the next cut happens now, after that many finished steps."""
        return self.round < self.rounds and self.why_round_ends(step) is not None

    def is_run_over(self, step: int) -> bool:
        """Whether the run has nothing left to do: the last round has ended."""
        return self.round == self.rounds and self.why_round_ends(step) is not None

    def why_round_ends(self, step: int) -> str | None:
        """Why the current round, or the time before the first one, ends now; None while it goes on."""
        if self.round == 0:
            return "planned" if step >= self.begin else None
        if self.waited >= self.patience[min(self.round, len(self.patience)) - 1]:
            return "patience"
        if step - self.start >= (self.max_round_steps or math.inf):
            return "max_round_steps"
        if step >= self._latest_end:
            return "reserve" if self.round < self.rounds else "max_steps"
        return None

    def steps_left(self, step: int) -> int:
        """The most steps that the current round may still take."""
        longest = self._latest_end - self.start
        return self.start + min(longest, self.max_round_steps or longest) - step

    @property
    def _latest_end(self) -> int:
        later = self.rounds - self.round
        return self.end - later * self.min_round_steps if later else self.max_steps

    def cut_(self, step: int) -> None:
        """Begins the next round; what has been the best before does not count any more."""
        self.round, self.start, self.waited = self.round + 1, step, 0

    def observe_(self, gain: float) -> None:
        """Hears of an evaluation.

        Args:
            gain: By how much the metric has improved on the round's best so far; infinity for the first value of a
                round, below zero if it got worse, NaN if the metric is.
        """
        self.waited = 0 if gain > self.min_delta else self.waited + 1

    def resize_(self, max_steps: int, step: int) -> None:
        """Goes on in a run of another length.

        Raises:
            ValueError: if the steps that are left do not suffice for the rounds that are left.
        """
        first, later = step if self.round else max(step, self.begin), self.rounds - self.round
        end = max_steps if self.end == self.max_steps else min(self.end, max_steps)
        if later and end - first < later * self.min_round_steps:
            raise ValueError(
                f"the run has {max_steps} steps, too few after step {first} for {later} more rounds of "
                f"{self.min_round_steps} steps. Resume with the same max_steps or num_train_epochs."
            )
        self.end, self.max_steps = end, max_steps
