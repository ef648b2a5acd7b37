"""The command line of a recipe: its own flags, those of `PruningConfig`, those of `TrainingArguments`."""

import json
import sys
from argparse import Namespace
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import HfArgumentParser, TrainingArguments

from hf_prune import PruningConfig

Script = TypeVar("Script")
Own = TypeVar("Own")

EVALUATIONS = 20  # of a run: one in each of five rounds in its first quarter, however long it is
TRAINING_DEFAULTS = {
    "eval_strategy": "steps",
    "eval_steps": 1 / EVALUATIONS,
    "logging_steps": 1 / EVALUATIONS,
    "save_steps": 0.1,
    "save_total_limit": 2,
    "dataloader_pin_memory": torch.accelerator.is_available(),
}


def parse(
    script: type[Script],
    defaults: Mapping[str, object],
    small_model: Mapping[str, object],
    pruning: Mapping[str, object],
) -> tuple[Script, PruningConfig, TrainingArguments]:
    """Parses the command line. Any flag overrides any of the defaults.

    Args:
        script: The recipe's own flags, a dataclass with a field `model_name_or_path`.
        defaults: Defaults that always hold.
        small_model: Defaults that suit the small model with random weights, but no pretrained one.
        pruning: Defaults of how sparse the model becomes.

    Raises:
        ValueError: A value is out of its range or contradicts another.
    """
    parser = HfArgumentParser((script, PruningConfig, TrainingArguments))  # type: ignore[arg-type]
    given = set_defaults(parser, defaults, small_model)
    # These three say themselves how sparse the model becomes, and a default would contradict them.
    if given.sparsities is None and given.granularity == PruningConfig.granularity and not given.hold_zeros:
        parser.set_defaults(**pruning)
    return parser.parse_args_into_dataclasses()  # type: ignore[return-value]


def set_defaults(
    parser: HfArgumentParser,
    defaults: Mapping[str, object],
    small_model: Mapping[str, object],
    argv: Sequence[str] | None = None,
) -> Namespace:
    """Gives a parser its defaults, as far as they do not depend on what else is given.

    Returns:
        What the command line gives with them.
    """
    parser.set_defaults(**TRAINING_DEFAULTS, **defaults)
    given, _ = parser.parse_known_args(argv)
    if given.model_name_or_path is None:
        parser.set_defaults(**small_model)
        given, _ = parser.parse_known_args(argv)
    return given


def split_settings(text: str) -> tuple[str, dict[str, Any]]:
    """Reads a word with settings behind it, `word+name=value+…`; a value is JSON or a plain word."""
    word, *settings = text.split("+")
    values: dict[str, Any] = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        try:
            values[name] = json.loads(value)
        except ValueError:
            values[name] = value
    return word, values


def parse_task(
    own: type[Own],
    tasks: Mapping[str, Any],
    output: str,
    *,
    left_out: Collection[str] = (),
    quick: Mapping[str, object] | None = None,
) -> tuple[str, Own, Any, TrainingArguments]:
    """Parses the command line of a script whose first argument is a task, and the rest are flags.

    Args:
        own: The script's own flags, a dataclass.
        tasks: Name → recipe of each task.
        output: What the folder of the output is called.
        left_out: Fields of the recipe's `STUDY` that are no flags here.
        quick: Further defaults where the script's own flag `quick` is given.

    Returns:
        The task, the script's own flags, those of the recipe, and those of Trainer.

    Raises:
        SystemExit: There is no such task.
    """
    name, *flags = sys.argv[1:] or [""]
    if name not in tasks:
        script = Path(sys.argv[0]).name
        raise SystemExit(f"usage: {script} {{{','.join(tasks)}}} [flags]; --help after a task lists them")
    recipe = tasks[name]
    parser = HfArgumentParser((own, recipe.ScriptArguments, TrainingArguments))  # type: ignore[arg-type]
    study = {key: value for key, value in recipe.STUDY.items() if key not in left_out}
    defaults = {**recipe.DEFAULTS, "output_dir": f"output/{output}/{name}"}
    given = set_defaults(parser, defaults, {**recipe.SMALL_MODEL, **study}, flags)
    if quick and given.quick:
        parser.set_defaults(**quick)
    return name, *parser.parse_args_into_dataclasses(flags)  # type: ignore[return-value]
