"""Prunes in one cut: what is left of a model by one criterion, and by another, and after some training?

python recipes/criteria.py tinystories
python recipes/criteria.py vit --criteria wanda sparsegpt sparsegpt+scope=owl --levels 0.5 2:4
python recipes/criteria.py vit --criteria fisher+granularity=neuron --levels 0.5 --steps 200

Data and dense model are those of the study (`STUDY` of the recipe), the metric is that of validation. All criteria
are given the same draws of calibration samples; those that look at no data give the same each time, but for random.
With `--steps`, each cut model is trained afterwards, once as it is and once with the dense model as its teacher; what
is pruned stays zero.
"""

import copy
import csv
import dataclasses
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments, set_seed

import efficientnet
import resnet
import tinystories
import vit
from common import masked_language
from common.arguments import parse_task, split_settings
from common.dense import dense_model
from common.tables import markdown, spread
from common.task import Task
from hf_prune import PruningConfig, PruningTrainerCallback, prune
from hf_prune.recovery.distillation import DistillationTrainer

RECIPES: dict[str, Any] = {
    "tinystories": tinystories, "vit": vit, "resnet": resnet, "efficientnet": efficientnet,
    "masked_language": masked_language,
}  # fmt: skip
Results = dict[tuple[str, str], list[float]]
"""The metric of each draw, by criterion and level."""


@dataclass
class CriteriaArguments:
    """What is compared."""

    criteria: list[str] = field(
        default_factory=lambda: [
            *("magnitude", "lamp", "wanda", "taylor", "fisher", "fisher+score_steps=8"),
            *("sparsegpt", "sparsegpt+scope=layer", "sparsegpt+scope=owl"),
        ],
        metadata={"help": "With other fields of PruningConfig behind them, as in fisher+score_steps=8."},
    )
    levels: list[str] = field(
        default_factory=lambda: ["0.5", "0.6", "0.7", "0.8", "2:4"],
        metadata={"help": "Sparsities, and granularities that say it themselves."},
    )
    draws: int = field(default=3, metadata={"help": "Draws of calibration samples."})
    steps: int = field(default=0, metadata={"help": "Steps of training after each cut, without and with a teacher."})
    rate: float = field(default=1.0, metadata={"help": "Their learning rate, in units of that of the dense model."})


def config_of(criterion: str, level: str) -> PruningConfig | None:
    """The config of a cell of the table; None if the level leaves no choice of the criterion's settings."""
    name, settings = split_settings(criterion)
    if ":" not in level:
        return PruningConfig.from_dict({"criterion": name, "sparsity": float(level), **settings})
    if "scope" in settings:
        return None  # A pattern says how sparse each layer is.
    return PruningConfig.from_dict({"criterion": name, "granularity": level, **settings})


def table(results: Results, criteria: Sequence[str], levels: Sequence[str]) -> str:
    """Mean and standard deviation over the draws, as Markdown."""
    rows = {c: [spread(results[c, level]) if (c, level) in results else "" for level in levels] for c in criteria}
    return "\n".join(markdown("criterion", levels, rows))


def trained(
    model: nn.Module,
    is_pruned: bool,
    task: Task,
    training: TrainingArguments,
    wanted: CriteriaArguments,
    kind: Callable[..., Trainer],
) -> nn.Module:
    """A copy of a model after some steps, with the zeros of a pruned one."""
    model = copy.deepcopy(model)
    callbacks = [PruningTrainerCallback(PruningConfig(hold_zeros=True))] if is_pruned else []
    with tempfile.TemporaryDirectory() as folder:
        args = dataclasses.replace(
            training, output_dir=folder, max_steps=wanted.steps, learning_rate=wanted.rate * training.learning_rate,
            eval_strategy="no", save_strategy="no", logging_strategy="no", load_best_model_at_end=False,
            report_to="none", disable_tqdm=True,
        )  # fmt: skip
        task.trainer(model, args, kind, callbacks=callbacks).train()
    return model


def main() -> None:
    """Prunes a copy of the dense model for each criterion, level and draw, and measures it."""
    name, wanted, script, training = parse_task(CriteriaArguments, RECIPES, "criteria", left_out=["budget"])
    configs = {(c, level): config_of(c, level) for c in wanted.criteria for level in wanted.levels}  # or an error now

    set_seed(training.seed)
    task = RECIPES[name].load_task(script, training)
    dense = dense_model(task, script, training)
    metric = f"eval_{training.metric_for_best_model}"
    distilled = functools.partial(DistillationTrainer, teacher=copy.deepcopy(dense))
    ways: dict[str, Callable[..., Trainer]] = {"trained": Trainer, "distilled": distilled} if wanted.steps else {}

    def measure(model: nn.Module) -> float:
        return task.trainer(model, training).evaluate()[metric]

    def measure_all(model: nn.Module, is_pruned: bool) -> list[float]:
        """The metric of a model, and after each way of training it."""
        after = [measure(trained(model, is_pruned, task, training, wanted, way)) for way in ways.values()]
        return [measure(model), *after]

    dense_metrics = measure_all(copy.deepcopy(dense), is_pruned=False)
    rows: list[list[object]] = [["dense", "", "", dense_metrics[0], "", *dense_metrics[1:]]]
    results: list[Results] = [{} for _ in dense_metrics]
    for (criterion, level), config in configs.items():
        if config is None:
            continue
        for draw in range(wanted.draws):
            samples = task.samples(training.per_device_train_batch_size, draw)
            model, began = copy.deepcopy(dense), time.monotonic()
            prune(model, config, samples, seed=draw)
            seconds = round(time.monotonic() - began, 2)
            metrics = measure_all(model, is_pruned=True)
            for found, value in zip(results, metrics, strict=True):
                found.setdefault((criterion, level), []).append(value)
            rows.append([criterion, level, draw, metrics[0], seconds, *metrics[1:]])
        means = [f"{statistics.mean(found[criterion, level]):.4f}" for found in results]
        print(f"{criterion} at {level}: {metric} {', '.join(means)}", flush=True)

    folder = Path(str(training.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    texts = []
    for when, found, of_dense in zip(["after the cut", *ways], results, dense_metrics, strict=True):
        head = f"Validation {metric.removeprefix('eval_')}, {when}; dense: {of_dense:.3f}."
        texts.append(f"{head}\n\n{table(found, wanted.criteria, wanted.levels)}\n")
    text = "\n".join(texts)
    (folder / "tables.md").write_text(text, encoding="utf-8")
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["criterion", "level", "draw", metric, "seconds", *ways], *rows])
    print(f"\n{text}\nBoth tables are in {folder}.")


if __name__ == "__main__":
    main()
