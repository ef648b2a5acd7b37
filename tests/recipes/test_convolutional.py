"""The recipes of convolutional networks: a ResNet, and an EfficientNet."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForImageClassification

import efficientnet
import resnet
from tests.recipes.launch import ROUND

SHORT = (
    "--use_cpu",
    "--dense_dir=dense",
    "--max_train_samples=200",
    "--max_eval_samples=50",
    "--dense_steps=10",
    "--max_steps=10",
    "--disable_tqdm=true",
)


@pytest.mark.parametrize("recipe", ["resnet", "efficientnet"])
@pytest.mark.parametrize(
    ("granularity", "sparsity"), [("channel", 0.5), ("unstructured", 0.9)], ids=["structured", "unstructured"]
)
def test_a_short_run(
    run_here: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    recipe: str,
    granularity: str,
    sparsity: float,
) -> None:
    flags = [*SHORT, f"--granularity={granularity}", f"--sparsity={sparsity}", "--schedule=one_shot"]
    run_here(f"{recipe}.py", *flags, "--output_dir=out")
    printed = capsys.readouterr().out
    (row,) = ROUND.findall(printed)
    assert float(row[2]) == pytest.approx(sparsity, abs=0.01)
    assert f"pruned to sparsity {row[2]}" in printed
    assert ("Shrunk from" in printed) == (granularity == "channel")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert model(torch.randn(2, 3, 32, 32)).logits.shape == (2, 10)


@pytest.mark.parametrize(("module", "least", "most"), [(resnet, 0.1e6, 0.3e6), (efficientnet, 0.4e6, 1e6)])
def test_the_small_model(module: ModuleType, least: float, most: float) -> None:
    small = getattr(module, f"small_{module.__name__}")
    model = small(32, labels=["cat", "dog"])
    assert least < model.num_parameters() < most
    assert model.config.id2label == {0: "cat", 1: "dog"}
