import csv
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.recipes.conftest import RECIPES

SHORT = ("--max_train_samples=200", "--max_eval_samples=50", "--dense_dir=dense", "--dense_steps=20", "--use_cpu")


def run(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "datasets")}
    command = [sys.executable, str(RECIPES / "criteria.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)


@pytest.mark.slow
def test_every_criterion_is_measured_at_every_level(tmp_path: Path) -> None:
    flags = ("--criteria", "magnitude", "fisher+score_steps=2", "sparsegpt", "sparsegpt+scope=owl", "--draws=2")
    done = run(tmp_path, "vit", *SHORT, *flags, "--levels", "0.5", "2:4", "--output_dir=out")
    assert done.returncode == 0, done.stderr[-3000:]
    with (tmp_path / "out" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["criterion"] == "dense"
    # A pattern leaves owl no choice.
    assert len(rows) == 1 + 2 * (4 + 3)
    values = {(row["criterion"], row["level"], row["draw"]): float(row["eval_accuracy"]) for row in rows[1:]}
    assert values["magnitude", "0.5", "0"] == values["magnitude", "0.5", "1"]
    assert all(0 <= value <= 1 for value in values.values())
    tables = (tmp_path / "out" / "tables.md").read_text()
    assert tables in done.stdout
    assert "| criterion | 0.5 | 2:4 |" in tables


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "usage: criteria.py {tinystories,vit,resnet,efficientnet}"),
        (("vit", "--criteria", "hessian"), "criterion must be one of auto, magnitude"),
        (("vit", "--levels", "80"), "Did you mean 0.8?"),
        (("vit", "--criteria", "fisher+steps=8"), "unknown key 'steps'"),
    ],
)
def test_what_makes_no_sense_is_an_error_at_once(
    run_here: Callable[..., None], tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    with pytest.raises((SystemExit, ValueError), match=re.escape(message)):
        run_here("criteria.py", *flags)
    assert not (tmp_path / "output").exists()
