import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from common.dense import DenseArguments, dense_model
from common.images import ImageCollator, load_images
from common.task import Task
from hf_prune.metrics import accuracy_metrics


def small(seed: int = 0) -> ViTForImageClassification:
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        num_labels=10,
    )  # fmt: skip
    return ViTForImageClassification(config)


def parts(rows: int = 64, side: int = 8, collator: Callable[..., Any] | None = None) -> dict[str, Any]:
    digits = load_images("digits")["train"]
    processor = ViTImageProcessorPil(size={"height": side, "width": side})
    compute_metrics, preprocess_logits_for_metrics = accuracy_metrics()
    return {
        "train_dataset": digits.select(range(rows)),
        "eval_dataset": digits.select(range(1000, 1100)),
        "data_collator": collator or ImageCollator(processor),
        "processing_class": processor,
        "compute_metrics": compute_metrics,
        "preprocess_logits_for_metrics": preprocess_logits_for_metrics,
    }


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., ViTForImageClassification]:
    """Calls `dense_model` on a tiny ViT: 20 steps, an evaluation after each; any argument overrides."""

    def call(
        *, model: ViTForImageClassification | None = None, given: dict[str, Any] | None = None, **options: Any
    ) -> ViTForImageClassification:
        dense = {name: options.pop(name) for name in ("dense_steps", "dense_patience") if name in options}
        dense = {"dense_steps": 20, "dense_patience": 20, "dense_dir": str(tmp_path / "dense"), **dense}
        defaults = {
            "output_dir": str(tmp_path / "out"),
            "learning_rate": 1e-2,
            "metric_for_best_model": "accuracy",
            "remove_unused_columns": False,
            "use_cpu": True,
            "disable_tqdm": True,
            "logging_strategy": "no",
            "dataloader_pin_memory": False,
        }
        task = Task(lambda: model or small(), False, given or parts(), load_images("digits")["train"])
        return dense_model(task, DenseArguments(**dense), TrainingArguments(**{**defaults, **options}))

    return call


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "dense").glob("*"))


def accuracy(model: ViTForImageClassification) -> float:
    data = parts()
    batch = data["data_collator"](list(data["eval_dataset"]))
    with torch.no_grad():
        predictions = model.eval()(pixel_values=batch["pixel_values"]).logits.argmax(-1)
    return (predictions == batch["labels"]).float().mean().item()


def test_trained_once_then_found(run, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = run()
    assert "Dense model: trained for 20 steps, best accuracy 0." in capsys.readouterr().out
    monkeypatch.setattr(Trainer, "train", lambda self: pytest.fail("trained again"))
    found = run()
    assert f"Dense model: found in {tmp_path / 'dense'}/vit-" in capsys.readouterr().out
    for name, weight in trained.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight)


def test_the_best_weights_are_kept(run, capsys) -> None:
    # With this learning rate accuracy goes up and down: the last weights are not the best.
    model = run(learning_rate=5e-2)
    best = float(capsys.readouterr().out.split("best accuracy ")[1].split()[0])
    assert accuracy(model) == pytest.approx(best, abs=1e-4)
    assert best > accuracy(small()) + 0.1


def test_the_kept_folder_is_a_model(run, tmp_path: Path) -> None:
    model = run()
    (folder,) = kept(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(folder)
    assert accuracy(loaded) == accuracy(model)
    assert AutoImageProcessor.from_pretrained(folder, backend="pil").size["height"] == 8


@pytest.fixture
def folder_of(run, capsys, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The folder in which `dense_model` would keep the model, without any training."""

    def call(**options: Any) -> str:
        monkeypatch.setattr(Trainer, "train", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(**options)
        return capsys.readouterr().out.rsplit("kept in ", 1)[1]

    return call


@pytest.mark.parametrize(
    "changed",
    [
        {"learning_rate": 2e-2},
        {"seed": 1},
        {"per_device_train_batch_size": 4},
        {"dense_steps": 19},
        {"dense_patience": 19},
        {"model": small(seed=1)},
        {"given": parts(rows=63)},
        {"given": parts(side=16)},
    ],
)
def test_what_decides_the_weights_decides_the_folder(folder_of, changed: dict[str, Any]) -> None:
    assert folder_of() == folder_of()
    assert folder_of() != folder_of(**changed)


@pytest.mark.parametrize(
    "changed",
    [
        {"output_dir": "elsewhere", "save_steps": 7, "run_name": "another"},
        {"num_train_epochs": 9, "max_steps": 3, "eval_strategy": "steps", "eval_steps": 1},
        {"logging_strategy": "steps", "logging_steps": 5, "report_to": "tensorboard", "disable_tqdm": False},
    ],
)
def test_what_does_not_decide_the_weights(folder_of, changed: dict[str, Any]) -> None:
    assert folder_of() == folder_of(**changed)


def test_stops_when_nothing_improves(run, capsys) -> None:
    run(learning_rate=0.0, dense_steps=40, dense_patience=3)
    # An evaluation every second step: the first is the best, and three more are waited for.
    assert "trained for 8 steps" in capsys.readouterr().out


def test_an_interrupted_run_leaves_nothing(run, tmp_path: Path, capsys) -> None:
    collate, drawn = parts()["data_collator"], []

    def fails_later(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        drawn.append(len(rows))
        if len(drawn) > 100:
            raise KeyboardInterrupt
        return collate(rows)

    with pytest.raises(KeyboardInterrupt):
        run(given=parts(collator=fails_later))
    assert kept(tmp_path) == []
    run()
    assert "trained for 20 steps" in capsys.readouterr().out


def test_a_half_written_model_is_never_taken(run, tmp_path: Path, capsys) -> None:
    run()
    (folder,) = kept(tmp_path)
    # What a killed run leaves behind: its checkpoints, under another name.
    killed = folder.with_name(f"{folder.name}.12345.partial")
    killed.mkdir()
    folder.rename(killed / "checkpoint-3")
    (killed / "checkpoint-3" / "model.safetensors").write_bytes(b"half")
    run()
    assert "found" not in capsys.readouterr().out
    assert accuracy(AutoModelForImageClassification.from_pretrained(folder)) > 0


def test_another_run_may_be_first(run, tmp_path: Path) -> None:
    run()
    (folder,) = kept(tmp_path)
    first = (folder / "model.safetensors").read_bytes()
    folder.rename(tmp_path / "first")
    collate = parts()["data_collator"]

    def finishes_meanwhile(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if not folder.exists():
            shutil.copytree(tmp_path / "first", folder)
        return collate(rows)

    run(given=parts(collator=finishes_meanwhile))
    assert kept(tmp_path) == [folder]
    assert (folder / "model.safetensors").read_bytes() == first


@pytest.mark.parametrize("name", ["dense_steps", "dense_patience"])
def test_errors(run, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        run(**{name: 0})
