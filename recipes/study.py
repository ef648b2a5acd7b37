"""Compares pruning schedules at equal budgets, on the data and model of a recipe, and says which one to take.

python recipes/study.py tinystories
python recipes/study.py vit --quick
python recipes/study.py tinystories --dataset path/to/texts --model_name_or_path path/to/model --budget 1000

Each cell (schedule x sparsity x criterion x granularity x split of the budget x learning rate x seed) is one run, and
kept when it is finished: the same command goes on where it was interrupted. Learning rate and split are chosen on
validation with the first seed, from the same grid for all schedules and for the dense model that is trained on; the
other seeds run with what was chosen, and test is looked at with that.
"""

import copy
import dataclasses
import functools
import itertools
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import (
    HfArgumentParser,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

import tinystories
import vit
from common.arguments import EVALUATED
from common.cells import TRAINED_ON, Cell, Result, keep_settings, run_cells
from common.dense import dense_model
from common.figures import draw
from common.findings import Findings, choose
from common.task import Task
from hf_prune import PruningConfig, PruningTrainerCallback, sparsity_report

RECIPES = {"tinystories": tinystories, "vit": vit}
EVALUATIONS = 20  # of a run
BUDGETS = (0.25, 0.5, 2)  # of the budget, for the picture of metric against budget
# How the budget is divided among the rounds. One shot has one round, and nothing to divide.
SPLITS: dict[str, dict[str, object]] = {
    "equal": {},
    "early": {"end": 0.5},  # equal rounds in the first half, the second half is recovery
    "short": {"rounds": 10, "end": 0.25},  # many short rounds, and a long recovery
    "patience": {"patience": 1},  # a round ends when validation has not improved; the last one takes what is left
    # For the defaults of `restart_lr` and `optimizer_state`:
    "equal+restart": {"restart_lr": True},
    "equal+reset": {"optimizer_state": "reset"},
    "equal+keep": {"optimizer_state": "keep"},
}


@dataclass
class StudyArguments:
    """What is compared."""

    schedules: list[str] = field(default_factory=lambda: ["one_shot", "constant", "geometric", "hybrid"])
    levels: list[float] = field(
        default_factory=lambda: [0.5, 0.7, 0.8, 0.9, 0.95, 0.98], metadata={"help": "Sparsities."}
    )
    criteria: list[str] = field(default_factory=lambda: ["magnitude"])
    granularities: list[str] = field(default_factory=lambda: ["unstructured"])
    splits: list[str] = field(
        default_factory=lambda: ["equal", "early", "short", "patience"],
        metadata={"help": f"How the budget is divided among the rounds: {', '.join(SPLITS)}."},
    )
    learning_rates: list[float] | None = field(
        default=None, metadata={"help": "Grid; the recipe's own and half of it if left out."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "The first chooses."})
    budget: int = field(default=300, metadata={"help": "Optimizer steps of each run."})
    budget_level: float = field(
        default=0.9, metadata={"help": "The sparsity at which the budget is varied, from a quarter to twice."}
    )
    workers: int = field(default=2, metadata={"help": "Processes that run cells side by side, one thread each."})
    quick: bool = field(default=False, metadata={"help": "A small grid that shows how it works, and nothing more."})


QUICK = {"levels": [0.5, 0.9], "splits": ["equal"], "seeds": [0], "budget": 80, "dense_steps": 400}


@functools.cache
def arguments() -> tuple[str, StudyArguments, Any, TrainingArguments]:
    """The command line, in whichever process."""
    name, *flags = sys.argv[1:] or [""]
    if name not in RECIPES:
        raise SystemExit(f"usage: study.py {{{','.join(RECIPES)}}} [flags]; --help after a task lists them")
    recipe = RECIPES[name]
    parser = HfArgumentParser((StudyArguments, recipe.ScriptArguments, TrainingArguments))  # type: ignore[arg-type]
    quick = QUICK if "--quick" in flags else {}
    folder = {"output_dir": f"output/study/{name}"}
    parser.set_defaults(**{**EVALUATED, **recipe.DEFAULTS, **recipe.SMALL_MODEL, **recipe.STUDY, **folder, **quick})
    study, script, training = parser.parse_args_into_dataclasses(flags)
    return name, study, script, training


@functools.cache
def load() -> Task:
    """The data, the same for all seeds."""
    name, _, script, training = arguments()
    return RECIPES[name].load_task(script, training)


@functools.cache
def dense(seed: int) -> PreTrainedModel:
    """The dense model of a seed."""
    _, _, script, training = arguments()
    task = load()
    if task.is_trained:
        return task.model
    set_seed(seed)
    fresh = task.model if script.model_name_or_path else type(task.model)(task.model.config)
    return dense_model(fresh, script, dataclasses.replace(training, seed=seed), task.parts)


def config_of(cell: Cell) -> PruningConfig:
    """The config of a cell.

    Raises:
        ValueError: There is no such split, or the config makes no sense.
    """
    if cell.split not in ("", *SPLITS):
        raise ValueError(f"splits must be of {', '.join(SPLITS)}; got {cell.split!r}.")
    values: dict[str, Any] = {
        "sparsity": cell.sparsity,
        "schedule": cell.schedule,
        "criterion": cell.criterion,
        "granularity": cell.granularity,
        **(SPLITS[cell.split] if cell.schedule != "one_shot" else {}),
    }
    if patience := values.pop("patience", None):
        rounds = len(PruningConfig(**values).round_sparsities)
        values["patience"] = [patience] * (rounds - 1) + [EVALUATIONS]
    return PruningConfig(**values)


def scores(trainer: Trainer, name: str) -> dict[str, float]:
    """The metric on validation and on test."""
    metrics = trainer.evaluate() | trainer.evaluate(load().test, metric_key_prefix="test")
    return {f"{name}validation": metrics[f"eval_{metric_name()}"], f"{name}test": metrics[f"test_{metric_name()}"]}


def metric_name() -> str:
    """The metric that decides."""
    return str(arguments()[-1].metric_for_best_model)


def make_trainer(model: PreTrainedModel, cell: Cell, folder: str, *callbacks: TrainerCallback) -> Trainer:
    """A silent trainer of a cell."""
    training = dataclasses.replace(
        arguments()[-1],
        output_dir=folder,
        seed=cell.seed,
        learning_rate=cell.learning_rate,
        max_steps=cell.steps,
        eval_strategy="steps",
        eval_steps=1 / EVALUATIONS,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model, training, callbacks=list(callbacks), **load().parts)
    trainer.remove_callback(PrinterCallback)
    return trainer


def run_cell(cell: Cell) -> Result:
    """Prunes and trains a copy of the dense model, and scores it."""
    began = time.monotonic()
    callbacks = [] if cell.schedule == TRAINED_ON else [PruningTrainerCallback(config_of(cell))]
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(copy.deepcopy(dense(cell.seed)), cell, folder, *callbacks)
        before = scores(trainer, "dense_")
        trainer.train()
        after = scores(trainer, "")
        assert trainer.model is not None
        return {
            **after,
            **before,
            "metric": metric_name(),
            "reached": sparsity_report(trainer.model).sparsity,
            "seconds": time.monotonic() - began,
            "history": callbacks[0].history.to_dict() if callbacks else None,
        }


def be_quiet() -> None:
    """One thread a process, and no progress bars."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def grid(study: StudyArguments, rates: list[float]) -> list[Cell]:
    """The cells from which learning rate and split are chosen."""
    pruned = itertools.product(study.schedules, study.levels, study.criteria, study.granularities, study.splits)
    shared = {"steps": study.budget, "seed": study.seeds[0]}
    cells = [Cell(TRAINED_ON, 0.0, "", "", "", rate, **shared) for rate in rates]
    for schedule, level, criterion, granularity, split in pruned:
        divided = "" if schedule == "one_shot" else split
        cells += [Cell(schedule, level, criterion, granularity, divided, rate, **shared) for rate in rates]
    cells = list(dict.fromkeys(cells))
    for cell in cells:
        if cell.schedule != TRAINED_ON:
            config_of(cell)  # What makes no sense is an error now, and not one of each cell in an hour.
    return cells


def main() -> None:
    """Grid, choice, the other seeds and budgets, findings."""
    name, study, script, training = arguments()
    folder = Path(str(training.output_dir))
    cells = grid(study, study.learning_rates or [training.learning_rate, training.learning_rate / 2])
    keep_settings(folder / "settings.json", {**dataclasses.asdict(script), **training.to_dict()})
    for seed in study.seeds:
        dense(seed)  # here, with all cores, and not in each of the workers at once
    run = functools.partial(
        run_cells, run=run_cell, folder=folder / "cells", workers=study.workers, initializer=be_quiet
    )

    results = run(cells)
    chosen = choose(results, bool(training.greater_is_better))
    others = [dataclasses.replace(cell, seed=seed) for cell in chosen for seed in study.seeds[1:]]
    budgets = [
        dataclasses.replace(cell, steps=round(factor * cell.steps), seed=seed)
        for cell in chosen
        for seed in study.seeds
        for factor in BUDGETS
        if cell.sparsity in (study.budget_level, 0.0)
    ]
    results |= run([*others, *budgets])
    findings = Findings(name, study.budget, chosen, results, bool(training.greater_is_better))
    findings.save(folder)
    draw(findings, study.budget_level, folder)
    print(f"\n{findings.tables()}\n\n{findings.advice()}\n\nAll cells, tables and pictures are in {folder}.")


if __name__ == "__main__":
    main()
