"""Runs a recipe as a user does."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.recipes.conftest import RECIPES

# A table row of a round: its number, its step, its sparsity, and three metrics.
ROUND = re.compile(r"^(\d+) +(\d+) +(0\.\d{4}) +(\S+) +(\S+) +(\S+)$", re.MULTILINE)


def launch(recipe: str, folder: Path, *flags: str, config: Sequence[str] = ()) -> str:
    """Runs `accelerate launch recipes/<recipe>` in `folder`, its dense models in `folder / "dense"`.

    Args:
        recipe: The script.
        folder: Where to.
        flags: Of the script.
        config: A file of `recipes/accelerate`, and flags of `accelerate launch`.

    Returns:
        What it printed.
    """
    return finished(begin([str(RECIPES / recipe)], folder, *flags, config=config))


def begin(script: Sequence[str], folder: Path, *flags: str, config: Sequence[str]) -> subprocess.Popen[str]:
    """Begins what `launch` waits for; the script may be a module, behind `-m`."""
    options = [f"--config_file={RECIPES / 'accelerate' / config[0]}", *config[1:]] if config else []
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, *script]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "datasets"), "PYTHONPATH": str(RECIPES.parent)}
    return subprocess.Popen(
        [*command, "--use_cpu", "--dense_dir=dense", *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, env=environment,
    )  # fmt: skip


def finished(process: subprocess.Popen[str]) -> str:
    """What a process printed that went well."""
    printed, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-5000:]
    return printed


def report_in(printed: str, output_dir: str) -> str:
    """The closing report of a run, without the name of its output folder."""
    return printed[printed.index("\nround  step") :].replace(output_dir, "")


def oldest_checkpoint(output: Path) -> str:
    """The checkpoint of a run that leaves the most to do; which one that is depends on which one was the best."""
    oldest = min(output.glob("checkpoint-*"), key=lambda folder: int(folder.name.removeprefix("checkpoint-")))
    assert oldest.name != "checkpoint-20", "nothing is left to do after the last step"
    return str(oldest)
