import csv
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import BertConfig, BertModel, BertTokenizerFast

from tests.recipes.conftest import RECIPES

SHORT = ("--max_train_samples=200", "--max_eval_samples=50", "--dense_dir=dense", "--dense_steps=20", "--use_cpu")


def run(folder: Path, *flags: str, script: str = "criteria.py") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "datasets")}
    command = [sys.executable, str(RECIPES / script), *flags]
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
        ((), "usage: criteria.py {tinystories,vit,resnet,efficientnet,masked_language}"),
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


@pytest.mark.slow
def test_what_is_cut_is_trained_with_and_without_a_teacher(tmp_path: Path) -> None:
    flags = ("--criteria", "activation+granularity=neuron", "--levels", "0.5", "--draws=1", "--steps=3")
    done = run(tmp_path, "vit", *SHORT, *flags, "--output_dir=out")
    assert done.returncode == 0, done.stderr[-3000:]
    with (tmp_path / "out" / "results.csv").open() as file:
        dense, pruned = csv.DictReader(file)
    assert all(0 <= float(row[way]) <= 1 for row in (dense, pruned) for way in ("trained", "distilled"))
    tables = (tmp_path / "out" / "tables.md").read_text()
    assert re.findall("accuracy, (.*); dense", tables) == ["after the cut", "trained", "distilled"]


@pytest.mark.slow
def test_an_encoder_is_trained_to_guess_masked_tokens_and_pruned(tmp_path: Path) -> None:
    words = [f"word{i}" for i in range(200)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (tmp_path / "vocabulary.txt").write_text("\n".join(vocabulary))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(vocabulary), **sizes)).save_pretrained(tmp_path / "encoder")
    BertTokenizerFast(str(tmp_path / "vocabulary.txt")).save_pretrained(tmp_path / "encoder")
    paragraphs = [" ".join(words[(7 * i + j) % 200] for j in range(20)) for i in range(200)]
    (tmp_path / "text.txt").write_text("\n\n".join(paragraphs))
    flags = ("--model_name_or_path=encoder", "--dataset=text.txt", "--levels=0.5", "--draws=1")
    criteria = ("--criteria", "activation+granularity=neuron", "activation+granularity=neuron+reconstruct=true")
    done = run(tmp_path, "masked_language", *SHORT, *flags, *criteria, "--output_dir=out")
    assert done.returncode == 0, done.stderr[-3000:]
    with (tmp_path / "out" / "results.csv").open() as file:
        losses = [float(row["eval_loss"]) for row in csv.DictReader(file)]
    assert len(losses) == 3
    assert all(3 < loss < 10 for loss in losses)


def test_masked_language_has_no_model_of_its_own(run_here: Callable[..., None], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="masked_language has no small model: give --model_name_or_path"):
        run_here("criteria.py", "masked_language", "--output_dir", str(tmp_path))
