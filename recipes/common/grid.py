"""The grid of a study: what is compared, as cells, the pruning config of each cell, and what its run gives."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from common.arguments import split_settings
from common.cells import Named
from hf_prune import PruningConfig

DENSE = "dense"  # in place of a schedule: the dense model, trained on for the same steps
RATES = (0.25, 1, 2, 4, 8)  # of the recipe's own learning rate
# How the budget is divided among the rounds.
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},  # one round, and nothing to divide
    "default": {},  # what `PruningConfig` does by itself
    "equal": {"rounds": 5, "end": 0.9999},  # to the end: a fraction is rounded up to a step, and 1 would be one step
    "short": {"rounds": 10},  # in the first quarter, as is the default, and a long recovery
    "patience": {"rounds": 5, "patience": 1},  # in the first half; the last round goes on to the end
}
EVALUATIONS_OF_PATIENCE = 50  # of a run: often enough that a round of a tenth of it may end early


@dataclass(frozen=True)
class Cell(Named):
    """One run of a study.

    Attributes:
        schedule: A schedule of hf_prune, or `DENSE`.
        sparsity: The target, 0 for `DENSE`.
        criterion: As in `PruningConfig`.
        granularity: As in `PruningConfig`.
        variant: How the budget is divided among the rounds, a key of `VARIANTS` with further settings
            behind it; empty where there is one round, and nothing to divide.
        learning_rate: The peak of the learning-rate schedule.
        steps: The budget, in optimizer steps.
        seed: Seed of the dense model, of the order of the data, and of dropout.
    """

    schedule: str
    sparsity: float
    criterion: str
    granularity: str
    variant: str
    learning_rate: float
    steps: int
    seed: int


class Result(TypedDict):
    """What a run gave.

    Keys:
        metric: Name of what `validation` and `test` give.
        validation, test: The metric at the end of the run.
        dense_validation, dense_test: The metric of the dense model before it.
        reached: The sparsity.
        seconds: Wall-clock time.
        history: `PruningHistory.to_dict()`, None for `DENSE`.
    """

    metric: str
    validation: float
    test: float
    dense_validation: float
    dense_test: float
    reached: float
    seconds: float
    history: dict[str, object] | None


@dataclass
class StudyArguments:
    """What is compared."""

    schedules: list[str] = field(default_factory=lambda: ["one_shot", "constant", "geometric", "hybrid"])
    sparsities: list[float] = field(default_factory=lambda: [0.5, 0.7, 0.8, 0.9, 0.95, 0.98])
    criteria: list[str] = field(default_factory=lambda: ["magnitude"])
    granularities: list[str] = field(default_factory=lambda: ["unstructured"])
    variants: list[str] = field(
        default_factory=lambda: ["equal", "short", "patience"],
        metadata={
            "help": f"How the budget is divided among the rounds: {', '.join(filter(None, VARIANTS))}; with other "
            "fields of PruningConfig behind them, as in short+rounds=20 or patience+end=0.75+restart_lr=true."
        },
    )
    learning_rates: list[float] | None = field(
        default=None, metadata={"help": f"Grid; {', '.join(map(str, RATES))} of the recipe's own if left out."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "The first one chooses."})
    all_seeds: bool = field(default=False, metadata={"help": "Run every cell with every seed, not just the best."})
    budget: int = field(default=300, metadata={"help": "Optimizer steps of each run."})
    budget_sparsity: float = field(
        default=0.9,
        metadata={"help": "The sparsity at which the budget is varied, from a quarter to twice; 0 for none."},
    )
    workers: int = field(default=2, metadata={"help": "Processes that run cells side by side, one thread each."})
    quick: bool = field(default=False, metadata={"help": "A small grid that shows how it works, and nothing more."})


QUICK = {"sparsities": [0.5, 0.9], "variants": ["short"], "seeds": [0], "budget": 160, "dense_steps": 400}


def grid(study: StudyArguments, rates: Sequence[float]) -> list[Cell]:
    """The cells from which variant and learning rate are chosen.

    Raises:
        ValueError: One of them makes no sense.
    """
    for name in ("budget", "workers"):
        if (value := getattr(study, name)) < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    levels = {granularity: _sparsities(study, granularity) for granularity in study.granularities}
    if study.budget_sparsity not in (0, *itertools.chain(*levels.values())):
        raise ValueError(
            f"budget_sparsity must be one of the sparsities, or 0 for none; got {study.budget_sparsity:g}."
        )
    shared = {"steps": study.budget, "seed": study.seeds[0]}
    cells = [Cell(DENSE, 0.0, "", "", "", rate, **shared) for rate in rates]
    for schedule, sparsity, criterion, granularity, variant, rate in itertools.product(
        study.schedules,
        dict.fromkeys(itertools.chain(*levels.values())),
        study.criteria,
        study.granularities,
        study.variants,
        rates,
    ):
        if sparsity not in levels[granularity]:
            continue
        divided = "" if schedule == "one_shot" else variant
        cell = Cell(schedule, sparsity, criterion, granularity, divided, rate, **shared)
        # What makes no sense is an error now, and not one of each cell in an hour.
        if (rounds := len(config_of(cell).round_sparsities)) > study.budget:
            raise ValueError(f"{rounds} rounds ({schedule}, {variant}) do not fit into a budget of {study.budget}.")
        cells.append(cell)
    return list(dict.fromkeys(cells))


def config_of(cell: Cell) -> PruningConfig:
    """The config of a cell.

    Raises:
        ValueError: There is no such variant, or the config makes no sense.
    """
    variant, changes = split_settings(cell.variant)
    if variant not in VARIANTS:
        raise ValueError(f"variants must be of {', '.join(filter(None, VARIANTS))}; got {cell.variant!r}.")
    values = {name: getattr(cell, name) for name in ("sparsity", "schedule", "criterion", "granularity")}
    values |= VARIANTS[variant] | changes
    if patience := values.pop("patience", None):
        # The last round goes on to the end, as that of the other variants does.
        rounds = len(PruningConfig.from_dict(values).round_sparsities)
        values["patience"] = [patience] * (rounds - 1) + [EVALUATIONS_OF_PATIENCE]
    return PruningConfig.from_dict(values)


def _sparsities(study: StudyArguments, granularity: str) -> list[float]:
    """Those of the study, or the one that a granularity has by itself, as 2:4 has."""
    try:
        return PruningConfig(granularity=granularity).round_sparsities[-1:]
    except ValueError:
        return study.sparsities
