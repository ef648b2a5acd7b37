"""The grid of a study: what is compared, as cells, and the pruning config of each cell."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from common.arguments import EVALUATIONS
from common.cells import DENSE, Cell
from hf_prune import PruningConfig

RATES = (0.25, 1, 2, 4)  # of the recipe's own learning rate
# How the budget is divided among the rounds. One shot has one round, and nothing to divide.
EQUAL: dict[str, Any] = {"rounds": 5, "end": None}  # the end of the run
SHORT: dict[str, Any] = {"rounds": 10}  # in the first quarter, as PruningConfig has it, and a long recovery
PATIENCE: dict[str, Any] = {"rounds": 5, "patience": 1}  # as long a recovery
VARIANTS: dict[str, dict[str, Any]] = {
    "equal": EQUAL,
    "short": SHORT,
    "patience": PATIENCE,
    "default": {},  # what `PruningConfig` does by itself
    # One thing changed, for the defaults of `PruningConfig`:
    "short+rounds=3": {**SHORT, "rounds": 3},
    "short+rounds=5": {**SHORT, "rounds": 5},
    "short+rounds=20": {**SHORT, "rounds": 20},
    "short+end=0.1": {**SHORT, "end": 0.1},
    "short+end=0.5": {**SHORT, "end": 0.5},
    "short+initial_sparsity=0.5": {**SHORT, "initial_sparsity": 0.5},
    "short+initial_sparsity=0.8": {**SHORT, "initial_sparsity": 0.8},
    "short+initial_sparsity=0.85": {**SHORT, "initial_sparsity": 0.85},
    "short+restart_lr": {**SHORT, "restart_lr": True},
    "short+reset": {**SHORT, "optimizer_state": "reset"},
    "short+keep": {**SHORT, "optimizer_state": "keep"},
    "patience+rounds=3": {**PATIENCE, "rounds": 3},
    "patience+end=0.5": {**PATIENCE, "end": 0.5},
    "patience+restart_lr": {**PATIENCE, "end": 0.5, "restart_lr": True},
}


@dataclass
class StudyArguments:
    """What is compared."""

    schedules: list[str] = field(default_factory=lambda: ["one_shot", "constant", "geometric", "hybrid"])
    sparsities: list[float] = field(default_factory=lambda: [0.5, 0.7, 0.8, 0.9, 0.95, 0.98])
    criteria: list[str] = field(default_factory=lambda: ["magnitude"])
    granularities: list[str] = field(default_factory=lambda: ["unstructured"])
    variants: list[str] = field(
        default_factory=lambda: ["equal", "short", "patience"],
        metadata={"help": f"How the budget is divided among the rounds: {', '.join(VARIANTS)}."},
    )
    learning_rates: list[float] | None = field(
        default=None, metadata={"help": f"Grid; {', '.join(map(str, RATES))} of the recipe's own if left out."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "The first one chooses."})
    all_seeds: bool = field(default=False, metadata={"help": "Run every cell with every seed, not just the best."})
    budget: int = field(default=300, metadata={"help": "Optimizer steps of each run."})
    budget_sparsity: float = field(
        default=0.9, metadata={"help": "The sparsity at which the budget is varied, from a quarter to twice."}
    )
    workers: int = field(default=2, metadata={"help": "Processes that run cells side by side, one thread each."})
    quick: bool = field(default=False, metadata={"help": "A small grid that shows how it works, and nothing more."})


QUICK = {"sparsities": [0.5, 0.9], "variants": ["short"], "seeds": [0], "budget": 160, "dense_steps": 400}


def grid(study: StudyArguments, rates: Sequence[float]) -> list[Cell]:
    """The cells from which variant and learning rate are chosen.

    Raises:
        ValueError: One of them makes no sense.
    """
    shared = {"steps": study.budget, "seed": study.seeds[0]}
    cells = [Cell(DENSE, 0.0, "", "", "", rate, **shared) for rate in rates]
    for schedule, sparsity, criterion, granularity, variant, rate in itertools.product(
        study.schedules, study.sparsities, study.criteria, study.granularities, study.variants, rates
    ):
        divided = "" if schedule == "one_shot" else variant
        cell = Cell(schedule, sparsity, criterion, granularity, divided, rate, **shared)
        config_of(cell)  # What makes no sense is an error now, and not one of each cell in an hour.
        cells.append(cell)
    return list(dict.fromkeys(cells))


def config_of(cell: Cell) -> PruningConfig:
    """The config of a cell.

    Raises:
        ValueError: There is no such variant, or the config makes no sense.
    """
    if cell.variant not in ("", *VARIANTS):
        raise ValueError(f"variants must be of {', '.join(VARIANTS)}; got {cell.variant!r}.")
    names = ("sparsity", "schedule", "criterion", "granularity")
    values = {name: getattr(cell, name) for name in names} | VARIANTS.get(cell.variant, {})
    if values.get("end", 0) is None:
        values["end"] = cell.steps
    if patience := values.pop("patience", None):
        rounds = len(PruningConfig(**values).round_sparsities)
        values["patience"] = [patience] * (rounds - 1) + [EVALUATIONS]
    return PruningConfig(**values)
