import csv
import dataclasses
import itertools
import math
from pathlib import Path

import pytest
from matplotlib.axes import Axes

from common.figures import _against_budget, _against_sparsity, draw
from common.findings import Findings, choose
from common.grid import DENSE, Cell
from hf_prune import PruningHistory
from hf_prune.reporting.history import Round

LEVELS, SEEDS = (0.5, 0.9), (0, 1, 2)


def result(validation: float, test: float) -> dict[str, object]:
    history = PruningHistory(rounds=[Round(1, 0, 0.9, 0.9, 9, 9, 10, "magnitude", steps=20)], evaluations=[(5, 3.0)])
    return {
        "validation": validation, "test": test, "dense_validation": 2.0, "dense_test": 2.0,
        "metric": "perplexity", "reached": 0.9, "seconds": 1.0, "history": history.to_dict(),
    }  # fmt: skip


def cells() -> dict[Cell, dict[str, object]]:
    """One shot loses 2 at 0.9, geometric 1 with its better variant; the better learning rate is 0.1."""
    found: dict[Cell, dict[str, object]] = {}
    for rate in (0.1, 0.2):
        for seed in SEEDS:
            found[Cell(DENSE, 0.0, "", "", "", rate, 20, seed)] = result(1.8 + rate, 1.9)
            for level, steps in itertools.product(LEVELS, (10, 20)):
                shift = rate + 0.01 * seed + (20 - steps) / 10
                shot = Cell("one_shot", level, "magnitude", "unstructured", "", rate, steps, seed)
                lost = 2.0 if level == 0.9 else 0.1
                found[shot] = result(2 + lost + shift, 2 + lost + 0.1 * (seed - 1))
                for variant, more in (("equal", 0.5), ("short", 0.0)):
                    lost = 1.0 if level == 0.9 else 0.2
                    cell = dataclasses.replace(shot, schedule="geometric", variant=variant)
                    found[cell] = result(2 + lost + more + shift, 2 + lost)
    return found


@pytest.fixture
def findings() -> Findings:
    results = cells()
    chosen = choose({c: r for c, r in results.items() if c.seed == 0 and c.steps == 20}, greater_is_better=False)
    return Findings("stories", 20, chosen, results, greater_is_better=False)


def test_validation_chooses_and_test_is_told(findings: Findings) -> None:
    assert {(c.schedule, c.sparsity, c.variant, c.learning_rate) for c in findings.chosen} == {
        (DENSE, 0.0, "", 0.1),
        ("one_shot", 0.5, "", 0.1),
        ("one_shot", 0.9, "", 0.1),
        ("geometric", 0.5, "short", 0.1),
        ("geometric", 0.9, "short", 0.1),
    }
    assert "| one_shot | 2.100 ± 0.100 | 4.000 ± 0.100 |" in findings.tables()
    assert "| geometric | short, 0.1 | short, 0.1 |" in findings.tables()
    assert "| geometric, equal | 2.810 ± 0.010 | 3.610 ± 0.010 |" in findings.tables()
    assert "| geometric, short | 2.310 ± 0.010 | 3.110 ± 0.010 |" in findings.tables()
    assert "Dense: 2.000 ± 0.000." in findings.tables()
    assert "Dense, trained on for 20 steps: 1.900 ± 0.000 (learning rate 0.1)." in findings.tables()


def test_each_variant_has_its_own_learning_rate(findings: Findings) -> None:
    cell = Cell("geometric", 0.5, "magnitude", "unstructured", "equal", 0.2, 20, 0)
    findings.results[cell]["validation"] = 1.0
    assert findings.of_variants(("magnitude", "unstructured"))["geometric, equal", 0.5] == cell
    assert "| geometric, equal | 2.277 ± 1.106 | 3.610 ± 0.010 |" in findings.tables()


def test_where_greater_is_better_the_greatest_is_chosen() -> None:
    results = {c: r for c, r in cells().items() if c.seed == 0 and c.steps == 20}
    assert {c.learning_rate for c in choose(results, greater_is_better=True)} == {0.2}


def test_advice_says_how_much_of_the_loss_comes_back(findings: Findings) -> None:
    low, high = findings.advice().splitlines()
    assert low == "magnitude, unstructured at 0.5: one_shot (0.1), 2.100 ± 0.100."
    assert high == (
        "magnitude, unstructured at 0.9: geometric (short, 0.1), 3.000 ± 0.000; one_shot 4.000 ± 0.100, whose "
        "loss it makes good by 50% against dense and 48% against dense trained on."
    )


def test_advice_does_not_make_much_of_what_another_seed_would_change(findings: Findings) -> None:
    for cell, found in findings.results.items():
        if cell.schedule == "one_shot" and cell.sparsity == 0.9:
            found["test"] -= 0.95
    assert "one_shot 3.050 ± 0.100, no further away than one seed from another." in findings.advice()


def test_advice_where_one_shot_has_lost_nothing(findings: Findings) -> None:
    for cell, found in findings.results.items():
        if cell.sparsity == 0.9:
            found["test"] -= 2.5
    assert "one_shot 1.500 ± 0.100, which has lost nothing." in findings.advice()


def test_advice_where_all_of_the_loss_comes_back(findings: Findings) -> None:
    for cell, found in findings.results.items():
        if cell.schedule == "geometric" and cell.sparsity == 0.9:
            found["test"] -= 1.05
    assert "whose loss it makes good by 100% against dense and 98% against dense trained on." in findings.advice()


def test_advice_says_where_test_disagrees_with_validation(findings: Findings) -> None:
    for cell, found in findings.results.items():
        if cell.schedule == "geometric" and cell.sparsity == 0.9:
            found["test"] += 1.5
    assert "one_shot 4.000 ± 0.100, which is ahead on test, though not on validation." in findings.advice()


def test_a_seed_that_diverged_is_told(findings: Findings, tmp_path: Path) -> None:
    cell = next(c for c in findings.chosen if (c.schedule, c.sparsity) == ("one_shot", 0.9))
    for value in (math.inf, math.nan):
        findings.results[cell]["test"] = value
        findings.save(tmp_path)
        draw(findings, 0.9, tmp_path)
        assert "| one_shot | 2.100 ± 0.100 | diverged with 1 of 3 runs |" in findings.tables()
        assert "one_shot diverged with 1 of 3 runs, to be left alone." in findings.advice()


def test_a_seed_that_failed_is_told(findings: Findings) -> None:
    cell = next(c for c in findings.chosen if (c.schedule, c.sparsity) == ("one_shot", 0.9))
    del findings.results[dataclasses.replace(cell, seed=2)]
    assert "| one_shot | 2.100 ± 0.100 | 3.950 ± 0.071 (2 of 3 seeds) |" in findings.tables()


def test_what_is_lost_is_told_against_the_dense_model_of_the_same_seed(findings: Findings) -> None:
    cell = next(c for c in findings.chosen if (c.schedule, c.sparsity) == ("one_shot", 0.9))
    assert findings.lost(cell) == pytest.approx([1.9, 2.0, 2.1])
    assert dataclasses.replace(findings, greater_is_better=True).lost(cell) == pytest.approx([-1.9, -2.0, -2.1])


def test_all_cells_are_published(findings: Findings, tmp_path: Path) -> None:
    findings.save(tmp_path)
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(findings.results)
    assert set(rows[0]) >= {field.name for field in dataclasses.fields(Cell)} | {"validation", "test", "reached"}
    assert (tmp_path / "tables.md").read_text().startswith("## stories: test perplexity after 20 steps")


def test_pictures(findings: Findings, tmp_path: Path) -> None:
    draw(findings, 0.9, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "budget-magnitude-unstructured.png",
        "sparsity-magnitude-unstructured.png",
        "trajectory-magnitude-unstructured.png",
    ]


def lines(axes: Axes) -> dict[str, list[float]]:
    return {str(line.get_label()): pytest.approx(line.get_ydata()) for line in axes.get_lines()}


def test_against_sparsity_each_schedule_is_a_line(findings: Findings) -> None:
    metric, lost = _against_sparsity(findings, findings.of_kind(("magnitude", "unstructured"))).axes
    dense = {"dense": [2.0, 2.0], "dense, 20 steps more": [1.9, 1.9]}
    assert lines(metric) == dense | {"one_shot": [2.1, 4.0], "geometric": [2.2, 3.0]}
    assert lines(lost) == {"one_shot": [0.1, 2.0], "geometric": [0.2, 1.0]}


def test_against_the_budget_the_dense_model_is_a_line_too(findings: Findings) -> None:
    cells = findings.of_kind(("magnitude", "unstructured"))
    metric, _ = _against_budget(findings, {name: c for (name, level), c in cells.items() if level == 0.9}, 0.9).axes
    assert lines(metric) == {
        "dense": [2.0, 2.0],
        "dense, trained on": [1.9],
        "one_shot": [4.0, 4.0],
        "geometric": [3.0, 3.0],
    }
