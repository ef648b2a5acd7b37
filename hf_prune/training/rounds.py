"""Rounds: what they were to reach, what the metric says, what they cost, and what comes back when one ends."""

import logging
import math
import time

from torch import nn

from ..pacing.even import Even
from ..pacing.patience import Patience
from ..plan import Settings
from ..reporting.history import PruningHistory, Round
from ..reporting.reports import SparsityReport
from ..weights.snapshot import Snapshot

logger = logging.getLogger(__name__)


class Rounds:
    """Where the rounds of a run are: which one it is in, what it has cost, and its best weights.

    Args:
        settings: What the config means.
        pacing: When rounds begin and end.
        history: What was written down so far.

    Attributes:
        config: The config, for what it says of time.
        pacing: As given.
        history: As given.
        best: A copy of the model at the round's best metric, where `config.restore` wants it back; None before there
            is one.
    """

    def __init__(self, settings: Settings, pacing: Even | Patience, history: PruningHistory) -> None:
        self.config = settings.config
        self.pacing = pacing
        self.history = history
        self.best: Snapshot | None = None
        self._clock = time.monotonic()
        self._nan_is_said = False

    @classmethod
    def plan(cls, settings: Settings, history: PruningHistory, max_steps: int) -> "Rounds":
        """Plans the rounds for a run.

        Raises:
            ValueError: if they do not fit.
        """
        config, rounds = settings.config, len(settings.config.round_sparsities)
        if config.patience is None:
            return cls(settings, Even.plan(rounds, config.begin, config.end, max_steps), history)
        pacing = Patience.plan(
            rounds,
            config.begin,
            config.end,
            max_steps,
            config.patience,
            max_round_steps=config.max_round_steps,
            min_round_steps=config.min_round_steps,
        )
        pacing.min_delta = config.min_delta
        return cls(settings, pacing, history)

    @property
    def next_sparsity(self) -> float:
        """The sparsity that the next cut is to reach."""
        return self.config.round_sparsities[self.pacing.round]

    def begin_(self, step: int, asked: float | None, report: SparsityReport, criterion: str) -> Round:
        """Begins the next round after its cut.

        Args:
            step: Number of finished steps.
            asked: The sparsity that was asked for; None for round 0, the zeros that are held from the start.
            report: How sparse the model is after the cut, with its masks.
            criterion: Name of what scored the weights.

        Returns:
            Its row of the history.
        """
        self.count_seconds_()
        if asked is not None:
            self.pacing.cut_(step)
        masked, total = report.masked or 0, report.total
        row = Round(self.pacing.round, step, asked, masked / max(total, 1), masked, report.zeros, total, criterion)
        self.history.rounds.append(row)
        return row

    def observe_(self, step: int, value: float, model: nn.Module) -> None:
        """Hears of an evaluation.

        Args:
            step: Number of finished steps.
            value: The metric; NaN is no improvement.
            model: The model that was evaluated, unwrapped; copied if it is the best of its round.
        """
        history = self.history
        if history and step == history[-1].step:  # Trainer's own, as with `eval_on_start`
            history[-1].after_cut = value
            return
        if history.evaluations and step == history.evaluations[-1][0]:
            return  # Once is enough: a second look at the same weights says nothing about patience.
        history.evaluations.append((step, value))
        if not history:
            history.dense = value
            return
        row = history[-1]
        gain = history.gain(value, over=row.best)
        row.last, row.evaluations = value, row.evaluations + 1
        if math.isnan(value) and not self._nan_is_said:
            logger.warning("%s is NaN at step %d: no improvement.", history.metric, step)
            self._nan_is_said = True
        if gain > 0:
            row.best, row.best_step = value, step
        if self.pacing.round > 0:
            self.pacing.observe_(gain)
            if gain > 0 and self.config.patience and self.config.restore == "best":
                self.best = Snapshot.of(model)

    def count_step_(self, samples: int, tokens: int | None) -> None:
        """Counts what a step has cost; tokens are None where nobody counts them."""
        self.count_seconds_()
        if self.history:
            row = self.history[-1]
            row.steps, row.samples = row.steps + 1, row.samples + samples
            row.tokens = row.tokens if tokens is None else (row.tokens or 0) + tokens

    def count_seconds_(self) -> None:
        """Counts the time since it was last counted towards the current round."""
        now = time.monotonic()
        if self.history:
            self.history[-1].seconds += now - self._clock
        self._clock = now

    def end_(self, why: str | None, model: nn.Module) -> str | None:
        """Writes down why the current round has ended, and brings its best weights back.

        Returns:
            A sentence that says what came back; None if nothing did.
        """
        self.count_seconds_()
        if not self.history:
            return None
        row = self.history[-1]
        row.ended = why
        if self.best is None:
            return None
        self.best.restore_(model)
        self.best = None
        return (
            f"Round {row.round} ended ({why}) with {self.history.metric} {row.last:.4f}; its best, {row.best:.4f} at "
            f"step {row.best_step}, comes back."
        )

    def finish_(self, step: int, model: nn.Module) -> str | None:
        """Ends the run: "stopped" is what ended it if it was not over. Returns what `end_` does."""
        self.history.ended = self.pacing.why_round_ends(step) if self.pacing.is_run_over(step) else "stopped"
        return self.end_(self.history.ended, model)
