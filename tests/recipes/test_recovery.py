import csv
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from common.memory import peak_of
from common.recoveries import Cell, Result, share, table
from common.trainable import TRAINABLE, make_trainable
from hf_prune import PruningConfig, prune
from tests.recipes.conftest import RECIPES
from tests.tiny import build

SHORT = ("--max_train_samples=200", "--max_eval_samples=50", "--dense_dir=dense", "--dense_steps=20", "--use_cpu")


def run(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "datasets")}
    command = [sys.executable, str(RECIPES / "recovery.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)


@pytest.mark.slow
def test_every_way_is_measured_at_every_level(tmp_path: Path) -> None:
    flags = ("--budget=4", "--seeds", "0", "1", "--rates", "1.0", "--levels", "0.5", "2:4", "--choose_at=0.5")
    done = run(tmp_path, "vit", *SHORT, *flags, "--output_dir=out")
    assert done.returncode == 0, done.stderr[-3000:]
    tables = (tmp_path / "out" / "tables.md").read_text()
    assert tables.strip() in done.stdout
    for level in ("0.5", "2:4"):
        rows = tables[tables.index(f"{level}: ") :].split("\n\n")[1].splitlines()[2:]
        ways = [row.split("|")[1].strip() for row in rows]
        assert ways == [way + more for way in TRAINABLE for more in ("", ", teacher")]
        counts = [int(row.split("|")[5].replace(",", "")) for row in rows]
        assert counts[0] > counts[2] > counts[4] > 0
    with (tmp_path / "out" / "results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2 * 3 * 2 * 2
    cells = list((tmp_path / "out" / "cells").glob("*.json"))
    assert len(cells) == 2 * 3 * 2 * 2  # levels, ways, teachers, seeds
    again = run(tmp_path, "vit", *SHORT, *flags, "--output_dir=out")
    assert re.search(r"^\[1/", again.stdout, flags=re.MULTILINE) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "usage: recovery.py {tinystories,vit,resnet}"),
        (("vit", "--levels", "80"), "Did you mean 0.8?"),
        (("vit", "--trainable", "embeddings"), "trainable must be among full, lora, bias+norm, got 'embeddings'"),
    ],
)
def test_what_makes_no_sense_is_an_error_at_once(
    run_here: Callable[..., None], tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    with pytest.raises((SystemExit, ValueError), match=re.escape(message)):
        run_here("recovery.py", *flags)
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("family", ["gpt_neo", "vit", "llama"])
def test_what_is_trained(family: str) -> None:
    counts = {}
    for which in TRAINABLE:
        model = build(family)
        prune(model, PruningConfig(sparsity=0.5))
        trained = {n: p for n, p in make_trainable(model, which, rank=2).named_parameters() if p.requires_grad}
        counts[which] = sum(p.numel() for p in trained.values())
        if which == "bias+norm":
            assert all(parameter.ndim == 1 for parameter in trained.values())
            assert any("norm" in name or "ln_" in name for name in trained)
        if which == "lora":
            assert all("lora_" in name for name in trained)
    assert counts["full"] == sum(p.numel() for p in build(family).parameters())
    assert counts["full"] > counts["lora"] > 0


def test_a_share_is_one_for_the_best_and_nothing_for_nothing() -> None:
    assert share(40.0, 10.0, 10.0) == 1
    assert share(40.0, 40.0, 10.0) == 0
    assert share(0.5, 0.7, 0.9) == pytest.approx(0.5)  # of what is better where it is larger
    assert math.isnan(share(1.0, 1.0, 1.0))


def test_a_level_of_which_nothing_is_left_is_told() -> None:
    assert table("0.9", {}) == "0.9: all runs have failed."


def test_a_table_has_means_over_seeds() -> None:
    def result(test: float) -> Result:
        return Result(
            metric="perplexity", validation=test, test=test, pruned_test=50.0, dense_test=9.0, seconds=2.0, trained=10,
            peak_mb=3.0,
        )  # fmt: skip

    results = {
        Cell("0.9", way, False, 1.0, seed): result(value + seed)
        for way, value in (("full", 10.0), ("lora", 20.0))
        for seed in (0, 1)
    }
    lines = table("0.9", results).splitlines()
    assert lines[0] == "0.9: 9.000 ± 0.000 dense, 50.000 ± 0.000 pruned."
    assert lines[4].startswith("| full | 10.500 ± 0.707 | 1.000 | 2.0 | 10 | 3 | 1 |")
    lost = {cell: Result(**{**row, "pruned_test": 9.5}) for cell, row in results.items()}
    assert table("0.9", lost).splitlines()[4].startswith("| full | 10.500 ± 0.707 |  | 2.0 |")
    mean = (share(50.0, 20.0, 10.0) + share(50.0, 21.0, 11.0)) / 2
    assert lines[5].startswith(f"| lora | 20.500 ± 0.707 | {mean:.3f} |")


HAS_GPU = torch.cuda.is_available()


@pytest.mark.skipif(not (HAS_GPU or Path("/proc/self/clear_refs").exists()), reason="needs a GPU or Linux")
def test_a_peak_is_what_a_call_takes() -> None:
    def allocate() -> None:
        nn.Linear(5000, 2000, device="cuda" if HAS_GPU else "cpu")  # 40 MB, which are let go of

    assert peak_of(allocate) == pytest.approx(40, abs=10)
