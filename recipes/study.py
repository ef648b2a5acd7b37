"""Compares pruning schedules at equal budgets, on the data and model of a recipe, and says which one to take.

python recipes/study.py tinystories
python recipes/study.py vit --quick
python recipes/study.py tinystories --dataset path/to/texts --model_name_or_path path/to/model --budget 1000

Each cell (schedule x sparsity x criterion x granularity x variant x learning rate x seed) is one run, and kept when it
is finished: the same command goes on where it was interrupted. A variant is a way to divide the budget among rounds.
Variant and learning rate are chosen on validation with the first seed, from one grid for all schedules and for the
dense model that is trained on; the other seeds run with what was chosen, and test is told of that.
"""

import copy
import dataclasses
import functools
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel, TrainingArguments, set_seed

import efficientnet
import resnet
import tinystories
import vit
from common.arguments import EVALUATIONS, parse_task
from common.cells import keep_settings, run_cells
from common.dense import dense_model
from common.figures import draw
from common.findings import Findings, choose
from common.grid import (
    DENSE,
    EVALUATIONS_OF_PATIENCE,
    QUICK,
    RATES,
    Cell,
    Result,
    StudyArguments,
    config_of,
    grid,
)
from common.task import Task
from hf_prune import PruningTrainerCallback, sparsity_report

RECIPES = {"tinystories": tinystories, "vit": vit, "resnet": resnet, "efficientnet": efficientnet}
BUDGET_FACTORS = (0.25, 0.5, 2)  # for the picture of metric against budget


class Arguments(NamedTuple):
    """The command line."""

    task: str
    study: StudyArguments
    script: Any  # the recipe's own
    training: TrainingArguments


@functools.cache
def arguments() -> Arguments:
    """The command line, in whichever process."""
    return Arguments(*parse_task(StudyArguments, RECIPES, "study", quick=QUICK))


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


def run_cell(cell: Cell) -> Result:
    """Prunes and trains a copy of the dense model, and measures it."""
    began = time.monotonic()
    pruning = None if cell.schedule == DENSE else PruningTrainerCallback(config_of(cell))
    with tempfile.TemporaryDirectory() as folder:
        training = dataclasses.replace(
            arguments().training,
            output_dir=folder,
            seed=cell.seed,
            learning_rate=cell.learning_rate,
            max_steps=cell.steps,
            eval_strategy="steps",
            eval_steps=1 / (EVALUATIONS_OF_PATIENCE if pruning and pruning.config.patience else EVALUATIONS),
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        model = copy.deepcopy(dense(cell.seed))
        trainer = load().trainer(model, training, callbacks=[pruning] if pruning else [])
        metric = str(training.metric_for_best_model)

        def measure() -> tuple[float, float]:
            test = trainer.evaluate(load().test, metric_key_prefix="test")
            return trainer.evaluate()[f"eval_{metric}"], test[f"test_{metric}"]

        dense_validation, dense_test = measure()
        trainer.train()
        validation, test = measure()
    return Result(
        metric=metric,
        validation=validation,
        test=test,
        dense_validation=dense_validation,
        dense_test=dense_test,
        reached=pruning.history[-1].reached if pruning else sparsity_report(model).sparsity,
        seconds=time.monotonic() - began,
        history=pruning.history.to_dict() if pruning else None,
    )


def main() -> None:
    """Grid, choice, the other seeds and budgets, findings."""
    name, study, script, training = arguments()
    folder, better = Path(str(training.output_dir)), bool(training.greater_is_better)
    rates = study.learning_rates or [rate * training.learning_rate for rate in RATES]
    cells = grid(study, rates)
    keep_settings(folder / "settings.json", {**dataclasses.asdict(script), **training.to_dict()})
    for seed in study.seeds:
        dense(seed)  # here, with all cores, and not in each of the workers at once
    run = functools.partial(run_cells, run=run_cell, folder=folder / "cells", workers=study.workers)

    results = run(cells)
    if not results:
        raise SystemExit(f"All cells have failed: see {folder / 'cells'}.")
    chosen = choose(results, better)
    repeated = results if study.all_seeds else chosen
    others = [dataclasses.replace(cell, seed=seed) for cell in repeated for seed in study.seeds[1:]]
    budgets = [
        dataclasses.replace(cell, steps=round(factor * cell.steps), seed=seed)
        for cell, seed, factor in itertools.product(chosen, study.seeds, BUDGET_FACTORS)
        if study.budget_sparsity and (cell.schedule == DENSE or cell.sparsity == study.budget_sparsity)
    ]
    findings = Findings(name, study.budget, chosen, results | run([*others, *budgets]), better)
    findings.save(folder)
    draw(findings, study.budget_sparsity, folder)
    print(f"\n{findings.tables()}\n\n{findings.advice()}\n\nAll cells, tables and pictures are in {folder}.")


if __name__ == "__main__":
    main()
