"""Rounds: what they were to reach, what the metric says, what they cost, and what comes back when one ends."""

import logging
import math
import time

from torch import nn

from .best import BestWeights
from .config import PruningConfig
from .pacing import Even, Patience
from .reports import PruningHistory, Round

logger = logging.getLogger(__name__)


class Rounds:
    """The rounds of a run, as far as they are.

    Args:
        config: The pruning config.
        pacing: When rounds begin and end.
        history: What was written down so far.
        best: The best weights of the current round so far.

    Attributes:
        config: As given.
        pacing: As given.
        history: As given.
        best: A copy of the model at the round's best metric, where `config.restore` wants it back; None before there
            is one.
    """

    def __init__(
        self,
        config: PruningConfig,
        pacing: Even | Patience,
        history: PruningHistory,
        best: BestWeights | None = None,
    ) -> None:
        self.config = config
        self.pacing = pacing
        self.history = history
        self.best = best
        self._clock = time.monotonic()
        self._nan_is_said = False

    @classmethod
    def plan(cls, config: PruningConfig, history: PruningHistory, max_steps: int) -> "Rounds":
        """Plans the rounds of a config for a run.

        Raises:
            ValueError: if they do not fit.
        """
        rounds = len(config.round_sparsities)
        if config.patience is None:
            return cls(config, Even.spread(rounds, config.begin, config.end, max_steps), history)
        limits = {name: getattr(config, name) for name in ("min_delta", "max_round_steps", "min_round_steps")}
        return cls(config, Patience.plan(rounds, config.begin, max_steps, config.patience, **limits), history)

    @property
    def next_sparsity(self) -> float:
        """The sparsity that the next cut is to reach."""
        return self.config.round_sparsities[self.pacing.round]

    def begin_(self, row: Round) -> None:
        """Begins a round with its row of the history."""
        self.count_seconds_()
        self.history.rounds.append(row)

    def observe_(self, step: int, value: float, model: nn.Module) -> None:
        """Hears of an evaluation.

        Args:
            step: Number of finished steps.
            value: The metric; NaN is no improvement.
            model: The model that was evaluated, unwrapped; copied if it is the best of its round.
        """
        history = self.history
        if history and step == history[-1].step:
            history[-1].after_cut = value
            return
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
                self.best = BestWeights.of(model)

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

    def end_(self, why: str | None, model: nn.Module) -> None:
        """Writes down why the current round has ended, and brings its best weights back."""
        self.count_seconds_()
        if not self.history:
            return
        row = self.history[-1]
        row.ended = why
        if self.best is not None:
            self.best.restore_(model)
            self.best = None
            logger.info(
                "Round %d ended (%s) with %s %.4f; its best, %.4f at step %d, comes back.",
                row.round, why, self.history.metric, row.last, row.best, row.best_step,
            )  # fmt: skip

    def finish_(self, step: int, model: nn.Module) -> None:
        """Ends the run: "stopped" is what ended it if it was not over."""
        self.history.ended = self.pacing.why_over(step) if self.pacing.is_over(step) else "stopped"
        self.end_(self.history.ended, model)
