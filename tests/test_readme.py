"""README.md tells the truth: its Python runs, and its commands are those of CI."""

import re
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from tests.tiny import batch, build

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_is_python_to_run():
    assert len(BLOCKS) >= 4
    assert "PruningTrainerCallback" in BLOCKS[0]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.strip().splitlines()[-1][:40])
def test_python_runs(block, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = build("gpt_neo")
    arguments = TrainingArguments(
        "out", max_steps=10, use_cpu=True, report_to="none", disable_tqdm=True, eval_strategy="steps", eval_steps=5,
        dataloader_pin_memory=False,
    )  # fmt: skip
    names = {"model": model, "args": arguments, "train_dataset": batch(model, 24), "eval_dataset": batch(model, 8)}
    exec(compile(block, "README.md", "exec"), names)
    if "print(" in block:
        assert capsys.readouterr().out.strip()


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", README):
        assert (ROOT / target).exists(), target
