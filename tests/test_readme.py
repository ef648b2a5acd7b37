"""README.md and its kin tell the truth: their Python runs, and their links lead somewhere."""

import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
from typer.main import get_command
from typer.testing import CliRunner

from hf_prune import PruningConfig, prune, schedules
from hf_prune.cli import app
from hf_prune.criteria import ScoreInputs
from tests.hub import running_hub, use
from tests.reporting.test_history import history
from tests.structures.models import build as build_of_structures
from tests.tiny import batch, build
from tests.words import word_tokenizer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_is_python_to_run():
    assert len(BLOCKS) >= 4
    assert "PruningTrainerCallback" in BLOCKS[0]


def save_model_of_2_4(folder):
    """One whose shapes the kernels of GPUs take."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    prune(model, PruningConfig(granularity="2:4"))
    model.save_pretrained(folder)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.strip().splitlines()[-1][:40])
def test_python_runs(block, tmp_path, capsys, monkeypatch):
    if ".cuda()" in block:
        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")
        save_model_of_2_4(tmp_path / "half")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = build("gpt_neo")
    arguments = TrainingArguments(
        "out", max_steps=10, use_cpu=True, report_to="none", disable_tqdm=True, eval_strategy="steps", eval_steps=5,
        dataloader_pin_memory=False,
    )  # fmt: skip
    names = {"model": model, "args": arguments, "train_dataset": batch(model, 24), "eval_dataset": batch(model, 8)}
    with running_hub() as hub:
        use(hub.url, monkeypatch, "cache")
        exec(compile(block, "README.md", "exec"), names)
    if "print(" in block:
        assert capsys.readouterr().out.strip()


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "recipes/README.md"])
def test_links_lead_somewhere(name):
    page = ROOT / name
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), anchor


def test_the_examples_of_contributing_go_with_what_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    names = {"math": math, "torch": torch, "ScoreInputs": ScoreInputs, "_ending_at": schedules._ending_at}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(block, "CONTRIBUTING.md", "exec"), names)
    values = names["square_root"](0.9)
    assert values[-1] == 0.9
    assert schedules.explicit(values) == values
    config = PruningConfig(sparsity=0.5)
    assert prune(build("gpt_neo"), config, criterion=names["distance_from_mean"]).masked == 0.5 * sum(
        module.total for module in prune(build("gpt_neo"), config).modules
    )


COMMANDS = [shlex.split(line, comments=True) for line in re.findall(r"^hf-prune .*", README, flags=re.MULTILINE)]


def test_commands_run_one_after_the_other(tmp_path, monkeypatch):
    assert {words[1] for words in COMMANDS} == set(get_command(app).commands)
    monkeypatch.chdir(tmp_path)
    model = build_of_structures("gpt_neox")
    for name in ("dense", "before", "after"):
        model.save_pretrained(name)
        word_tokenizer().save_pretrained(name)
        prune(model, PruningConfig(sparsity=0.3 if name == "dense" else 0.6))
    Path("text.txt").write_text("the fox " * 2000)
    Path("output/tinystories").mkdir(parents=True)
    history().save("output/tinystories/pruning_history.json")
    with running_hub() as hub:
        use(hub.url, monkeypatch, "cache")
        hub.files["EleutherAI/pythia-70m"] = {path.name: path.read_bytes() for path in Path("dense").iterdir()}
        for _, *words in COMMANDS:
            done = CliRunner().invoke(app, words)
            assert done.exit_code == (words[0] == "diff"), (words, done.output, done.exception)
        assert "model.safetensors" in hub.files["tester/my-model"]
    assert {path.name for path in tmp_path.iterdir()} >= {"half", "small", "report.html", "pruning.png"}
