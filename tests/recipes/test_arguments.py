import sys
from dataclasses import dataclass

import pytest
from transformers import TrainingArguments

from common.arguments import parse
from common.dense import DenseArguments
from common.splits import SplitArguments
from hf_prune import PruningConfig


@dataclass
class ScriptArguments(SplitArguments, DenseArguments):
    model_name_or_path: str | None = None


def parsed(monkeypatch: pytest.MonkeyPatch, *argv: str) -> tuple[ScriptArguments, PruningConfig, TrainingArguments]:
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--use_cpu", *argv])
    return parse(
        ScriptArguments,
        defaults={"output_dir": "there", "dense_steps": 7},
        small_model={"learning_rate": 0.25},
        pruning={"sparsity": 0.9, "schedule": "geometric"},
    )


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    script, pruning, training = parsed(monkeypatch)
    assert (script.dense_steps, script.max_train_samples) == (7, None)
    assert pruning == PruningConfig(sparsity=0.9, schedule="geometric")
    assert (training.output_dir, training.learning_rate, training.eval_strategy) == ("there", 0.25, "steps")


def test_any_flag_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    script, pruning, training = parsed(
        monkeypatch,
        *("--dense_steps", "9", "--max_train_samples", "5"),
        *("--sparsity", "0.8", "--schedule", "one_shot", "--rounds", "1"),
        *("--output_dir", "here", "--learning_rate", "0.5", "--eval_strategy", "no", "--max_steps", "3"),
        *("--resume_from_checkpoint", "here/checkpoint-1"),
    )
    assert (script.dense_steps, script.max_train_samples) == (9, 5)
    assert pruning == PruningConfig(sparsity=0.8, schedule="one_shot", rounds=1)
    assert (training.output_dir, training.learning_rate, training.eval_strategy) == ("here", 0.5, "no")
    assert (training.max_steps, training.resume_from_checkpoint) == (3, "here/checkpoint-1")


def test_a_pretrained_model_keeps_the_usual_learning_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, training = parsed(monkeypatch, "--model_name_or_path", "owner/name")
    assert (training.output_dir, training.learning_rate) == ("there", 5e-5)


@pytest.mark.parametrize(
    ("argv", "rounds"),
    [
        (["--granularity", "2:4"], [0.5]),
        (["--granularity=block:4x4", "--sparsity=0.5"], [0.5]),
        (["--sparsities", "0.5", "0.75"], [0.5, 0.75]),
        (["--hold_zeros"], []),
    ],
)
def test_other_ways_to_say_how_sparse(monkeypatch: pytest.MonkeyPatch, argv: list[str], rounds: list[float]) -> None:
    assert parsed(monkeypatch, *argv)[1].round_sparsities == rounds


def test_bad_sparsity(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"Did you mean 0\.8"):
        parsed(monkeypatch, "--sparsity", "80")
