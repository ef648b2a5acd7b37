"""Which metric a run follows, which way it improves, and whether evaluations give it."""

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping

from transformers import TrainerState, TrainingArguments

from ..pacing.patience import Patience
from ..plan import Settings

FALLING = {
    *("loss", "perplexity", "ppl", "nll", "error", "errors", "err", "eer", "wer", "cer", "ter", "mer", "fid", "brier"),
    *("mse", "rmse", "mae", "mape", "bpb", "bpc", "bits"),
}
"""A metric with one of these words in its name (`eval_word_error_rate`) improves as it falls, unless the training
arguments say otherwise; and so does one whose name ends in "loss", as Trainer has it."""

logger = logging.getLogger(__name__)


class Monitor:
    """Which metrics evaluations have given.

    Attributes:
        seen: Their names.
    """

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def note_(self, metrics: Iterable[str]) -> None:
        """Notes what an evaluation has given."""
        self.seen |= {name for name in metrics if name.startswith("eval_")}

    def lacks(self, metric: str) -> bool:
        """Whether there were evaluations, and none gave a metric."""
        return bool(self.seen) and metric not in self.seen

    def require(self, metric: str) -> None:
        """Requires that an evaluation gave the metric that patience follows, if there was one.

        Raises:
            ValueError: if none gave it.
        """
        if self.lacks(metric):
            raise ValueError(
                f"patience follows {metric!r}, but the evaluation gives {', '.join(sorted(self.seen))}. Set metric in "
                "the config to one of them."
            )

    def measure_(self, metric: str, evaluate: Callable[..., Mapping[str, float]], prefix: str) -> float | None:
        """Measures a metric under a prefix of its own, so that nobody takes it for an evaluation of the run.

        Args:
            metric: As `metric_name` gives it.
            evaluate: `trainer.evaluate`.
            prefix: In place of `eval`.

        Returns:
            Its value; None if the evaluation does not give it.
        """
        metrics = evaluate(metric_key_prefix=prefix)
        self.seen |= {name.replace(prefix, "eval", 1) for name in metrics if name.startswith(prefix)}
        return metrics.get(metric.replace("eval", prefix, 1))


def metric_name(settings: Settings, args: TrainingArguments) -> str:
    """The metric of the config, else Trainer's `metric_for_best_model`, else the loss; with the prefix `eval_`."""
    return _prefixed(settings.config.metric or args.metric_for_best_model or "loss")


def improves_as_it_rises(metric: str, args: TrainingArguments) -> bool:
    """Whether greater is better: as the arguments say if it is their metric or they name none, else by its name."""
    falls = metric.endswith("loss") or not FALLING.isdisjoint(re.split(r"[^a-z0-9]+", metric.lower()))
    theirs = args.metric_for_best_model is None or _prefixed(args.metric_for_best_model) == metric
    if args.greater_is_better is None or not theirs:
        return not falls
    if falls and args.greater_is_better:
        logger.warning(
            "greater_is_better is True for %s, which improves as it falls: Trainer would keep the worst model. "
            "Set greater_is_better=False in the training arguments.",
            metric,
        )
    return args.greater_is_better


def require_evaluations(settings: Settings, args: TrainingArguments, state: TrainerState) -> None:
    """Requires evaluations before the run is over, and no other metric that decides what stays, as patience needs."""
    often = "Set eval_strategy and eval_steps in the training arguments, and eval_dataset in the Trainer."
    if args.eval_strategy == "no":
        raise ValueError(f"patience needs evaluations, and there are none. {often}")
    every = _steps_between_evaluations(args, state)
    delay = args.eval_delay * (1 if args.eval_strategy == "steps" else every)
    if max(every, delay) >= state.max_steps:
        raise ValueError(f"patience needs several evaluations, and there is none before the run's end. {often}")
    if args.load_best_model_at_end and settings.config.restore == "best":
        ours, theirs = metric_name(settings, args), _prefixed(str(args.metric_for_best_model))
        if ours != theirs:
            raise ValueError(
                f"patience brings the best {ours} back, and load_best_model_at_end the best {theirs}. Take the same "
                'metric for both, or restore="last" in the config.'
            )


def warn_of_few_evaluations(pacing: Patience, args: TrainingArguments, state: TrainerState) -> None:
    """Says so if no round before the last one has room for as many evaluations as its patience asks for."""
    longest = pacing.end - pacing.begin - (pacing.rounds - 1) * pacing.min_round_steps
    longest = min(longest, pacing.max_round_steps or longest)
    room, needed = longest / _steps_between_evaluations(args, state), pacing.patience[0] + 1
    if pacing.rounds > 1 and room < needed:
        logger.warning(
            "Patience will not end a round before the last: it takes %d evaluations, and a round of %d steps has room "
            "for %d. Evaluate more often, or set a later end.",
            needed, longest, room,
        )  # fmt: skip


def as_number(metric: str, value: object) -> float:
    """A metric's value as a number; NaN if it is None.

    Raises:
        ValueError: if it is something else.
    """
    try:
        return math.nan if value is None else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ValueError(f"the metric {metric!r} must be a number, got {value!r}.") from None


def _prefixed(name: str) -> str:
    """The name under which Trainer reports a metric."""
    return "eval_" + name.removeprefix("eval_")


def _steps_between_evaluations(args: TrainingArguments, state: TrainerState) -> float:
    # Where data have no length, Trainer makes the number of epochs huge, and an epoch is as long as the data are.
    return state.eval_steps if args.eval_strategy == "steps" else state.max_steps / state.num_train_epochs
