import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.recipes.conftest import RECIPES

SHORT = (
    "vit", "--sparsities=0.5", "--schedules", "one_shot", "geometric", "--variants", "equal", "patience",
    "--learning_rates", "0.001", "0.002", "--budget=20", "--dense_steps=20",
    "--max_train_samples=200", "--max_eval_samples=50", "--dense_dir=dense", "--use_cpu",
)  # fmt: skip


def command(*flags: str) -> list[str]:
    return [sys.executable, str(RECIPES / "study.py"), *flags]


def start(folder: Path, *flags: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "datasets")}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command(*flags), cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def run(folder: Path, *flags: str) -> str:
    process = start(folder, *flags)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-3000:]
    return out


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


@pytest.mark.slow
def test_a_study_that_is_killed_goes_on_and_finds_the_same(tmp_path: Path) -> None:
    flags = (*SHORT, "--seeds", "0", "1", "--budget_sparsity=0.5")
    printed = run(tmp_path, *flags, "--output_dir=whole")
    whole = rows(tmp_path / "whole")
    # Two learning rates: 2 for dense, 2 for one shot, 4 for geometric. The other seed of what was chosen, and
    # three other budgets of that with both seeds.
    assert len(whole) == 8 + 3 + 18
    assert "vit: test accuracy after 20 steps" in printed
    assert "magnitude, unstructured at 0.5: " in printed
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    kind = "magnitude-unstructured.png"
    assert names >= {"results.csv", "tables.md", f"sparsity-{kind}", f"budget-{kind}", f"trajectory-{kind}"}
    assert {row["reached"] for row in whole if row["schedule"] != "dense"} == {"0.5"}

    # Of a study of which a third is missing, some more is run before it is killed.
    cells = tmp_path / "killed" / "cells"
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    (tmp_path / "killed" / "results.csv").unlink()
    for path in sorted(cells.glob("*.json"))[::3]:
        path.unlink()
    before = len(list(cells.glob("*.json")))
    process = start(tmp_path, *flags, "--output_dir=killed")
    while len(list(cells.glob("*.json"))) < before + 3:
        time.sleep(0.2)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert before < len(list(cells.glob("*.json"))) < len(whole)
    run(tmp_path, *flags, "--output_dir=killed")
    assert rows(tmp_path / "killed") == whole  # The same seeds give the same results, bit for bit.
    assert "finished before" not in run(tmp_path, *flags, "--output_dir=killed")  # Nothing is left to run.


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "usage: study.py {tinystories,vit,resnet,efficientnet}"),
        (("vit", "--variants", "half"), "variants must be of default, equal, short, patience; got 'half'"),
    ],
)
def test_bad_input_is_an_error_before_anything_runs(
    run_here: Callable[..., None], tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    with pytest.raises((SystemExit, ValueError), match=re.escape(message)):
        run_here("study.py", *flags)
    assert not list(tmp_path.rglob("*.json"))
