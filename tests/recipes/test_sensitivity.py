import csv
import json
from pathlib import Path

import pytest

from tests.recipes.test_criteria import SHORT, run


@pytest.mark.slow
def test_layers_are_divided_by_what_a_sweep_has_measured(tmp_path: Path) -> None:
    flags = ("--criteria", "magnitude", "activation+granularity=neuron", "--levels=0.5", "--sparsities=0.4")
    done = run(tmp_path, "vit", *SHORT, *flags, "--output_dir=out", script="sensitivity.py")
    assert done.returncode == 0, done.stderr[-3000:]
    with (tmp_path / "out" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["way"] for row in rows] == [
        *("layer", "global", "owl", "@FILE", "@FILE:least"),
        *("layer", "global", "@FILE", "@FILE:least"),
    ]
    assert all(abs(float(row["reached"]) - 0.4) < 0.02 for row in rows)
    assert len({row["eval_accuracy"] for row in rows}) > 1
    for number in (0, 1):
        assert json.loads((tmp_path / "out" / f"{number}.json").read_text())["rows"]
        assert (tmp_path / "out" / f"{number}.png").is_file()
    assert (tmp_path / "out" / "tables.md").read_text() in done.stdout
