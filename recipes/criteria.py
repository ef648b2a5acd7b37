"""Prunes in one cut and trains no further: what is left of a model by one criterion, and by another?

python recipes/criteria.py tinystories
python recipes/criteria.py vit --criteria wanda sparsegpt sparsegpt+scope=owl --levels 0.5 2:4

Data and dense model are those of the study (`STUDY` of the recipe), the metric is that of validation. All criteria
are given the same draws of calibration samples; those that look at no data give the same each time, but for random.
"""

import copy
import csv
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import default_data_collator, set_seed

import efficientnet
import resnet
import tinystories
import vit
from common.arguments import parse_task, split_settings
from common.dense import dense_model
from common.tables import markdown, spread
from hf_prune import PruningConfig, prune

RECIPES = {"tinystories": tinystories, "vit": vit, "resnet": resnet, "efficientnet": efficientnet}


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


def config_of(criterion: str, level: str) -> PruningConfig | None:
    """The config of a cell of the table; None if the level leaves no choice of the criterion's settings."""
    name, settings = split_settings(criterion)
    if ":" not in level:
        return PruningConfig.from_dict({"criterion": name, "sparsity": float(level), **settings})
    if "scope" in settings:
        return None  # A pattern says how sparse each layer is.
    return PruningConfig.from_dict({"criterion": name, "granularity": level, **settings})


def table(results: Mapping[tuple[str, str], Sequence[float]], criteria: Sequence[str], levels: Sequence[str]) -> str:
    """Mean and standard deviation over the draws, as Markdown."""
    rows = {c: [spread(results[c, level]) if (c, level) in results else "" for level in levels] for c in criteria}
    return "\n".join(markdown("criterion", levels, rows))


def main() -> None:
    """Prunes a copy of the dense model for each criterion, level and draw, and measures it."""
    name, wanted, script, training = parse_task(CriteriaArguments, RECIPES, "criteria", left_out=["budget"])
    configs = {(c, level): config_of(c, level) for c in wanted.criteria for level in wanted.levels}  # or an error now

    set_seed(training.seed)
    task = RECIPES[name].load_task(script, training)
    dense = dense_model(task, script, training)
    metric = f"eval_{training.metric_for_best_model}"

    def measure(model: torch.nn.Module) -> float:
        return task.trainer(model, training).evaluate()[metric]

    dense_metric = measure(copy.deepcopy(dense))
    rows: list[list[object]] = [["dense", "", "", dense_metric, ""]]
    results: dict[tuple[str, str], list[float]] = {}
    for (criterion, level), config in configs.items():
        if config is None:
            continue
        for draw in range(wanted.draws):
            samples = DataLoader(
                task.trainer_kwargs["train_dataset"],
                batch_size=training.per_device_train_batch_size,
                shuffle=True,
                generator=torch.Generator().manual_seed(draw),
                collate_fn=task.trainer_kwargs.get("data_collator", default_data_collator),
            )
            model, began = copy.deepcopy(dense), time.monotonic()
            prune(model, config, samples, seed=draw)
            seconds = time.monotonic() - began
            results.setdefault((criterion, level), []).append(measure(model))
            rows.append([criterion, level, draw, results[criterion, level][-1], round(seconds, 2)])
        print(f"{criterion} at {level}: {metric} {statistics.mean(results[criterion, level]):.4f}", flush=True)

    folder = Path(str(training.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    text = f"Validation {metric.removeprefix('eval_')}; dense: {dense_metric:.3f}.\n\n"
    text += table(results, wanted.criteria, wanted.levels) + "\n"
    (folder / "tables.md").write_text(text, encoding="utf-8")
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["criterion", "level", "draw", metric, "seconds"], *rows])
    print(f"\n{text}\nBoth tables are in {folder}.")


if __name__ == "__main__":
    main()
