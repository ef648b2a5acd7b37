"""Which metric a run follows, which way it improves, and whether Trainer will give it."""

import logging
import math

from transformers import TrainerState, TrainingArguments

from .config import PruningConfig

FALLING = ("loss", "perplexity", "error", "wer", "cer", "mse", "mae")
"""A metric whose name ends so improves as it falls, unless the training arguments say otherwise."""

logger = logging.getLogger(__name__)


def metric_name(config: PruningConfig, args: TrainingArguments) -> str:
    """The metric of the config, else Trainer's `metric_for_best_model`, else the loss; with the prefix `eval_`."""
    return "eval_" + (config.metric or args.metric_for_best_model or "loss").removeprefix("eval_")


def improves_as_it_rises(metric: str, args: TrainingArguments) -> bool:
    """Whether greater is better: as the training arguments say if it is their metric or they name none, else by name.

    Args:
        metric: As `metric_name` gives it.
        args: The training arguments.
    """
    falls = metric.endswith(FALLING)
    theirs = args.metric_for_best_model in (None, metric, metric.removeprefix("eval_"))
    if args.greater_is_better is None or not theirs:
        return not falls
    if falls and args.greater_is_better:
        logger.warning(
            "greater_is_better is True for %s, which improves as it falls: Trainer would keep the worst model. "
            "Set greater_is_better=False in the training arguments.",
            metric,
        )
    return args.greater_is_better


def require_evaluations(config: PruningConfig, args: TrainingArguments, state: TrainerState) -> None:
    """Requires what patience needs: evaluations before the run is over, and no other metric that decides what stays.

    Args:
        config: A config with patience.
        args: The training arguments.
        state: The trainer's state, in which fractions have become steps.

    Raises:
        ValueError: if it cannot work.
    """
    often = "Set eval_strategy and eval_steps in the training arguments, and eval_dataset in the Trainer."
    if args.eval_strategy == "no":
        raise ValueError(f"patience needs evaluations, and there are none. {often}")
    if (args.eval_strategy == "steps" and state.eval_steps >= state.max_steps) or (
        args.eval_strategy == "epoch" and state.num_train_epochs <= 1
    ):
        raise ValueError(f"patience needs several evaluations, and there is none before the run's end. {often}")
    if args.load_best_model_at_end and config.restore == "best":
        ours, theirs = metric_name(config, args), f"eval_{str(args.metric_for_best_model).removeprefix('eval_')}"
        if ours != theirs:
            raise ValueError(
                f"patience brings the best {ours} back, and load_best_model_at_end the best {theirs}. Take the same "
                'metric for both, or restore="last" in the config.'
            )


def as_number(metric: str, value: object) -> float:
    """A metric's value as a number; NaN if it is None.

    Raises:
        ValueError: if it is something else.
    """
    try:
        return math.nan if value is None else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ValueError(f"the metric {metric!r} must be a number, got {value!r}.") from None
