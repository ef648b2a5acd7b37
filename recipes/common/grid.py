"""The grid of a study: what is compared, as cells, and the pruning config of each cell."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from common.arguments import EVALUATIONS
from common.cells import DENSE, Cell
from hf_prune import PruningConfig

RATES = (0.25, 1, 4)  # of the recipe's own learning rate
# How the budget is divided among the rounds. One shot has one round, and nothing to divide.
VARIANTS: dict[str, dict[str, Any]] = {
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
    sparsities: list[float] = field(default_factory=lambda: [0.5, 0.7, 0.8, 0.9, 0.95, 0.98])
    criteria: list[str] = field(default_factory=lambda: ["magnitude"])
    granularities: list[str] = field(default_factory=lambda: ["unstructured"])
    variants: list[str] = field(
        default_factory=lambda: ["equal", "early", "short", "patience"],
        metadata={"help": f"How the budget is divided among the rounds: {', '.join(VARIANTS)}."},
    )
    learning_rates: list[float] | None = field(
        default=None, metadata={"help": f"Grid; {', '.join(map(str, RATES))} of the recipe's own if left out."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "The first one chooses."})
    budget: int = field(default=300, metadata={"help": "Optimizer steps of each run."})
    budget_sparsity: float = field(
        default=0.9, metadata={"help": "The sparsity at which the budget is varied, from a quarter to twice."}
    )
    workers: int = field(default=2, metadata={"help": "Processes that run cells side by side, one thread each."})
    quick: bool = field(default=False, metadata={"help": "A small grid that shows how it works, and nothing more."})


QUICK = {"sparsities": [0.5, 0.9], "variants": ["equal"], "seeds": [0], "budget": 80, "dense_steps": 400}


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
    if patience := values.pop("patience", None):
        rounds = len(PruningConfig(**values).round_sparsities)
        values["patience"] = [patience] * (rounds - 1) + [EVALUATIONS]
    return PruningConfig(**values)
