import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTImageProcessorPil

import vit
from common.images import ImageCollator, load_images
from common.splits import SplitArguments, three_splits
from hf_prune import sparsity_report
from tests.recipes.launch import ROUND, launch, oldest_checkpoint, report_in

SHORT = ("--max_steps=20", "--dense_steps=40")


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("vit")
    return folder, launch("vit.py", folder, *SHORT)


@pytest.mark.slow
def test_prints_rounds_and_test(short_run: tuple[Path, str]) -> None:
    _, printed = short_run
    assert "Dense model: trained for " in printed
    assert [row[2] for row in ROUND.findall(printed)] == ["0.6838", "0.7629", "0.8222", "0.8666", "0.9000"]
    assert "Test accuracy: dense 0." in printed


@pytest.mark.slow
def test_the_saved_model_is_the_one_that_was_tested(short_run: tuple[Path, str]) -> None:
    folder, printed = short_run
    output = folder / "output" / "vit"
    model = AutoModelForImageClassification.from_pretrained(output).eval()
    processor = AutoImageProcessor.from_pretrained(output, backend="pil")
    test = three_splits(load_images("digits"), SplitArguments(), seed=42)["test"]
    batch = ImageCollator(processor)(list(test))
    with torch.no_grad():
        right = model(pixel_values=batch["pixel_values"]).logits.argmax(-1) == batch["labels"]
    assert f"pruned to sparsity 0.9000 {right.float().mean():.4f}" in printed
    assert sparsity_report(model).sparsity == pytest.approx(0.9, abs=1e-5)
    assert (output / "pruning.png").exists()


@pytest.mark.slow
def test_resumes(short_run: tuple[Path, str]) -> None:
    folder, printed = short_run
    checkpoint = oldest_checkpoint(folder / "output" / "vit")
    flags = ("--output_dir=resumed", f"--resume_from_checkpoint={checkpoint}")
    resumed = launch("vit.py", folder, *SHORT, *flags)
    assert "Dense model: found in dense/vit-" in resumed
    assert report_in(resumed, "resumed") == report_in(printed, "output/vit")


@pytest.mark.slow
def test_a_model_and_images_of_ones_own(short_run: tuple[Path, str]) -> None:
    folder, _ = short_run
    generator = np.random.default_rng(0)
    for split, rows in (("train", 40), ("test", 10)):
        for name, base in (("dark", 0), ("light", 128)):
            (folder / "pictures" / split / name).mkdir(parents=True)
            for i in range(rows):
                pixels = generator.integers(base, base + 128, (12, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "pictures" / split / name / f"{i}.png")
    printed = launch(
        "vit.py", folder, "--model_name_or_path=output/vit", "--dataset=pictures", "--learning_rate=1e-3",
        "--max_steps=20", "--dense_steps=20", "--granularity=2:4", "--output_dir=own",
    )  # fmt: skip
    assert "Dense model: trained for " in printed  # the head is new
    assert "pruned to sparsity 0.5000 1.0000" in printed
    model = AutoModelForImageClassification.from_pretrained(folder / "own")
    assert model.config.id2label == {0: "dark", 1: "light"}


@pytest.mark.slow
def test_idx_files(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for prefix, rows in (("train", 100), ("t10k", 20)):
        labels = np.arange(rows, dtype=np.uint8) % 3
        pixels = (generator.integers(0, 80, (rows, 28, 28)) + 80 * labels[:, None, None]).astype(np.uint8)
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            path = tmp_path / "fashion" / f"{prefix}-{kind}-ubyte.gz"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(gzip.compress(head + array.tobytes()))
    printed = launch("vit.py", tmp_path, "--dataset=fashion", "--max_steps=10", "--dense_steps=40")
    assert [row[2] for row in ROUND.findall(printed)][-1] == "0.9000"
    dense = float(printed.split("Test accuracy: dense ")[1].split(",")[0])
    assert dense > 0.9


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset=digit"], "dataset must be 'digits', an existing file or folder"),
        (["--max_train_samples=0"], "max_train_samples must be at least 1, got 0"),
        (["--dense_patience=0"], "dense_patience must be at least 1, got 0"),
        (["--schedule=linear"], "schedule must be one of auto, one_shot, .*got 'linear'"),
    ],
)
def test_bad_input(run_here: Callable[..., None], tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_here("vit.py", "--use_cpu", "--dense_dir=dense", *flags)
    assert list(tmp_path.rglob("*.safetensors")) == []


@pytest.mark.parametrize(("side", "patches"), [(8, 16), (28, 49), (32, 64)])
def test_the_small_model(side: int, patches: int) -> None:
    model = vit.small_vit(side, labels=["cat", "dog"])
    assert model.vit.embeddings.patch_embeddings.num_patches == patches
    assert 0.15e6 < model.num_parameters() < 0.3e6
    assert model.config.id2label == {0: "cat", 1: "dog"}
    processor = ViTImageProcessorPil(size={"height": side, "width": side})
    batch = ImageCollator(processor)([{"image": Image.new("L", (50, 40)), "label": 1}])
    assert model(**batch).logits.shape == (1, 2)
