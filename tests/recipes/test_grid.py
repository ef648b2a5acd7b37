import dataclasses
import itertools

import pytest

from common.grid import DENSE, VARIANTS, Cell, StudyArguments, config_of, grid
from hf_prune.pacing.even import Even
from hf_prune.schedules import SCHEDULES


def test_the_grid_has_each_combination_once_and_one_shot_has_nothing_to_divide() -> None:
    study = StudyArguments(sparsities=[0.5, 0.9], criteria=["magnitude", "random"], seeds=[7, 8], budget=40)
    cells = grid(study, [0.1, 0.2])
    # 2 rates for dense; 2 sparsities x 2 criteria x 2 rates for one shot, and x 3 variants for three others.
    assert len(cells) == len(set(cells)) == 2 + 8 + 3 * 8 * 3
    assert {cell.variant for cell in cells if cell.schedule in ("one_shot", DENSE)} == {""}
    assert {cell.variant for cell in cells if cell.schedule == "hybrid"} == set(study.variants)
    assert {(cell.seed, cell.steps) for cell in cells} == {(7, 40)}


def test_a_pattern_has_its_own_sparsity() -> None:
    study = StudyArguments(
        sparsities=[0.7, 0.9], granularities=["unstructured", "2:4", "1:4"], schedules=["one_shot", "constant"],
        variants=["default"], budget_sparsity=0.75,
    )  # fmt: skip
    cells = grid(study, [0.1])
    kinds = {(cell.granularity, cell.sparsity) for cell in cells if cell.schedule != DENSE}
    assert kinds == {("unstructured", 0.7), ("unstructured", 0.9), ("2:4", 0.5), ("1:4", 0.75)}
    assert len(cells) == 1 + 2 * 4


CELL = Cell("geometric", 0.9, "magnitude", "unstructured", "equal", 0.1, 40, 0)


@pytest.mark.parametrize(
    ("variant", "schedule"), list(itertools.product(VARIANTS, [name for name in SCHEDULES if name != "one_shot"]))
)
def test_every_variant_goes_with_every_schedule_of_several_rounds(variant: str, schedule: str) -> None:
    config = config_of(dataclasses.replace(CELL, variant=variant, schedule=schedule))
    assert config.round_sparsities[-1] == 0.9
    assert config.criterion == "magnitude"


def test_a_variant_may_have_other_settings_behind_it() -> None:
    changed = "short+rounds=3+restart_lr=true+optimizer_state=reset+end=0.5"
    config = config_of(dataclasses.replace(CELL, variant=changed))
    assert (config.rounds, config.restart_lr, config.optimizer_state, config.end) == (3, True, "reset", 0.5)
    longer = config_of(dataclasses.replace(CELL, variant="patience+rounds=3+patience=2"))
    assert longer.patience == [2, 2, 50]


@pytest.mark.parametrize("steps", [20, 75, 300, 600, 9_999])
def test_equal_rounds_go_on_to_the_end_of_the_run(steps: int) -> None:
    config = config_of(CELL)
    ours = Even.plan(5, config.begin, config.end, steps)
    assert ours == Even.plan(5, begin=0, end=steps, max_steps=steps)


def test_with_patience_the_last_round_takes_what_is_left() -> None:
    config = config_of(dataclasses.replace(CELL, variant="patience"))
    assert config.patience == [1, 1, 1, 1, 50]  # No run has more evaluations than that.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": ["half"]}, r"variants must be of default, equal, short, patience; got 'half'\."),
        ({"variants": ["short+round=3"]}, "unknown key 'round' in a pruning config"),
        ({"budget": -1}, r"budget must be at least 1, got -1\."),
        ({"workers": 0}, r"workers must be at least 1, got 0\."),
        ({"budget": 9}, r"10 rounds \(constant, short\) do not fit into a budget of 9\."),
        ({"budget_sparsity": 0.85}, r"budget_sparsity must be one of the sparsities, or 0 for none; got 0\.85\."),
        (
            {"sparsities": [80.0], "budget_sparsity": 0},
            r"sparsity must be in \[0, 1\), got 80\.0\. Did you mean 0\.8\?",
        ),
        ({"schedules": ["sudden"]}, "schedule must be one of auto, one_shot"),
        ({"criteria": ["beauty"]}, "criterion must be one of auto, magnitude"),
        ({"granularities": ["2:4"], "budget_sparsity": 0.5}, r"the rounds of 2:4 go through \(M-1\):M"),
        ({"granularities": ["4:2"]}, r"granularity N:M keeps N of every M and needs 0 < N < M, got '4:2'"),
    ],
)
def test_what_makes_no_sense_is_an_error_before_anything_runs(changes: dict[str, list], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grid(StudyArguments(**changes), [0.1])
