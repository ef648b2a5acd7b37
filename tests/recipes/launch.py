"""Runs a recipe as a user does."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.recipes.conftest import RECIPES

# A table row of a round: its number, its step, its sparsity, and three metrics.
ROUND = re.compile(r"^(\d+) +(\d+) +(0\.\d{4}) +(\S+) +(\S+) +(\S+)$", re.MULTILINE)


def launch(recipe: str, folder: Path, *flags: str, processes: int = 1) -> str:
    """Runs `accelerate launch recipes/<recipe>` in `folder`, its dense models in `folder / "dense"`.

    Returns:
        What it printed.
    """
    several = ["--multi_gpu", f"--num_processes={processes}"] if processes > 1 else []
    command = [sys.executable, "-m", "accelerate.commands.launch", *several, str(RECIPES / recipe)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder / "datasets")}
    done = subprocess.run(
        [*command, "--use_cpu", "--dense_dir=dense", *flags],
        capture_output=True, text=True, cwd=folder, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


def report_in(printed: str, output_dir: str) -> str:
    """The closing report of a run, without the name of its output folder."""
    return printed[printed.index("\nround  step") :].replace(output_dir, "")


def oldest_checkpoint(output: Path) -> str:
    """The checkpoint of a run that leaves the most to do; which one that is depends on which one was the best."""
    oldest = min(output.glob("checkpoint-*"), key=lambda folder: int(folder.name.removeprefix("checkpoint-")))
    assert oldest.name != "checkpoint-20", "nothing is left to do after the last step"
    return str(oldest)
