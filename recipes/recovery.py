"""Recovers a pruned model in several ways: all weights are trained, LoRA, or biases and norms, also with a teacher.

python recipes/recovery.py tinystories
python recipes/recovery.py vit --levels 0.9 --seeds 0 --trainable full lora

All ways begin from the same pruned model of a seed (`prune` at the level, by magnitude), keep its zeros, and have the
same steps; the teacher is the dense model. The learning rate of each way is the one, among `--rates` times that of the
recipe, whose validation metric is best with the first seed at the level `--choose_at`, without a teacher. LoRA is
measured after it was merged. Data and dense model are those of the study.
"""

import copy
import csv
import dataclasses
import functools
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed

import resnet
import tinystories
import vit
from common.arguments import parse_task
from common.cells import keep_settings, run_cells
from common.dense import dense_model
from common.findings import rank
from common.memory import peak_of
from common.recoveries import Cell, Result, table
from common.task import Task
from common.trainable import TRAINABLE, make_trainable
from hf_prune import MaskSet, PruningConfig, PruningTrainerCallback, prune
from hf_prune.recovery.distillation import DistillationTrainer

RECIPES: dict[str, Any] = {"tinystories": tinystories, "vit": vit, "resnet": resnet}


@dataclass
class RecoveryArguments:
    """What is compared."""

    levels: list[str] = field(
        default_factory=lambda: ["0.5", "0.7", "0.9", "2:4"],
        metadata={"help": "Sparsities, and granularities that say it themselves."},
    )
    trainable: list[str] = field(default_factory=lambda: [*TRAINABLE], metadata={"help": ", ".join(TRAINABLE)})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    budget: int = field(default=300, metadata={"help": "Optimizer steps of each run."})
    rank: int = field(default=8, metadata={"help": "Rank of the adapters."})
    rates: list[float] = field(
        default_factory=lambda: [1.0, 3.0, 10.0], metadata={"help": "Learning rates to choose from."}
    )
    choose_at: str = field(default="0.9", metadata={"help": "The level at which they are chosen."})
    workers: int = field(default=2, metadata={"help": "Processes side by side, of one thread each."})


class Arguments(NamedTuple):
    """The command line."""

    task: str
    recovery: RecoveryArguments
    script: Any
    training: TrainingArguments


@functools.cache
def arguments() -> Arguments:
    """The command line, in whichever process."""
    return Arguments(*parse_task(RecoveryArguments, RECIPES, "recovery", left_out=["budget"]))


@functools.cache
def load() -> Task:
    """The data, the same for all seeds."""
    given = arguments()
    return RECIPES[given.task].load_task(given.script, given.training)


@functools.cache
def dense(seed: int) -> PreTrainedModel:
    """The dense model of a seed."""
    set_seed(seed)
    given = arguments()
    return dense_model(load(), given.script, dataclasses.replace(given.training, seed=seed))


def config_of(level: str) -> PruningConfig:
    """How a level is reached."""
    return PruningConfig(granularity=level) if ":" in level else PruningConfig(sparsity=float(level))


def run_cell(cell: Cell) -> Result:
    """Prunes a copy of the dense model, recovers it, and measures it before and after."""
    given, teacher = arguments(), dense(cell.seed)
    metric = str(given.training.metric_for_best_model)
    start = copy.deepcopy(teacher)
    prune(start, config_of(cell.level))
    zeros = MaskSet.from_zeros(start)
    set_seed(cell.seed)
    model: Any = make_trainable(copy.deepcopy(start), cell.trainable, given.recovery.rank)
    with tempfile.TemporaryDirectory() as folder:
        training = dataclasses.replace(
            given.training, output_dir=folder, seed=cell.seed, max_steps=given.recovery.budget,
            learning_rate=cell.rate * given.training.learning_rate, eval_strategy="no", save_strategy="no",
            logging_strategy="no", load_best_model_at_end=False, report_to="none", disable_tqdm=True,
        )  # fmt: skip

        def measure(measured: nn.Module, split: str) -> float:
            data = load().test if split == "test" else None
            return load().trainer(measured, training).evaluate(data, metric_key_prefix=split)[f"{split}_{metric}"]

        kind: Any = functools.partial(DistillationTrainer, teacher=teacher) if cell.teacher else Trainer
        pruning = PruningTrainerCallback(PruningConfig(hold_zeros=True))
        trainer = load().trainer(model, training, kind, callbacks=[pruning])
        began = time.monotonic()
        peak = peak_of(trainer.train)
        seconds = time.monotonic() - began
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        merged = model.merge_and_unload() if cell.trainable == "lora" else model
        if MaskSet.from_zeros(merged) != zeros:
            raise RuntimeError("the zeros are not those that were there before.")
        return Result(
            metric=metric,
            validation=measure(merged, "eval"),
            test=measure(merged, "test"),
            pruned_test=measure(start, "test"),
            dense_test=measure(teacher, "test"),
            seconds=seconds,
            trained=trained,
            peak_mb=peak,
        )


def main() -> None:
    """Chooses learning rates, runs all ways at all levels with all seeds, prints a table for each level."""
    name, recovery, script, training = arguments()
    if strange := [word for word in recovery.trainable if word not in TRAINABLE]:
        raise ValueError(f"trainable must be among {', '.join(TRAINABLE)}, got {strange[0]!r}.")
    for level in [*recovery.levels, recovery.choose_at]:
        config_of(level)  # or an error now
    folder = Path(str(training.output_dir))
    settings = {**dataclasses.asdict(script), **training.to_dict(), "budget": recovery.budget, "rank": recovery.rank}
    keep_settings(folder / "settings.json", settings)
    for seed in recovery.seeds:
        dense(seed)  # here, with all cores, and not in each of the workers at once
    run = functools.partial(run_cells, run=run_cell, folder=folder / "cells", workers=recovery.workers)
    first = recovery.seeds[0]
    tried = run(Cell(recovery.choose_at, t, False, rate, first) for t in recovery.trainable for rate in recovery.rates)
    rates = {}
    for trainable in recovery.trainable:
        validation = {cell.rate: result["validation"] for cell, result in tried.items() if cell.trainable == trainable}
        if not validation:
            raise SystemExit(f"All runs of {trainable} have failed: see {folder / 'cells'}.")
        rates[trainable] = max(validation, key=lambda rate: rank(validation[rate], bool(training.greater_is_better)))
    results = run(
        Cell(level, trainable, teacher, rates[trainable], seed)
        for level in recovery.levels
        for trainable in recovery.trainable
        for teacher in (False, True)
        for seed in recovery.seeds
    )
    text = "\n\n".join(table(level, results) for level in recovery.levels)
    (folder / "tables.md").write_text(text + "\n", encoding="utf-8")
    rows = [{**dataclasses.asdict(cell), **result} for cell, result in results.items()]
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*Cell.__annotations__, *Result.__annotations__])
        writer.writeheader()
        writer.writerows(rows)
    seeds = ", ".join(map(str, recovery.seeds))
    print(f"\n{recovery.budget} steps of {name}, seeds {seeds}.\n\n{text}\n\nIt is in {folder}.")


if __name__ == "__main__":
    main()
