import gzip
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Picture
from transformers import ViTImageProcessorPil

from common.images import ImageCollator, load_images
from tests.recipes.conftest import RECIPES


def picture(value: int, size: tuple[int, int] = (8, 8), mode: str = "L") -> Picture.Image:
    return Picture.new(mode, size, value if mode == "L" else (value, 0, 255 - value))


def image_folder(folder: Path, *parts: str) -> Path:
    for part in parts:
        (folder / part).mkdir(parents=True)
        for i in range(5):
            picture(i, mode="RGB").save(folder / part / f"{i}.png")
    return folder


def test_digits() -> None:
    data = load_images("digits")
    assert list(data) == ["train"]
    assert len(data["train"]) == 1797
    assert data["train"].features["label"].names == [str(i) for i in range(10)]
    first = data["train"][0]
    assert (first["image"].size, first["label"]) == ((8, 8), 0)
    assert np.asarray(first["image"])[0].tolist() == [0, 0, 79, 207, 143, 15, 0, 0]  # of 0, 0, 5, 13, 9, 1, 0, 0


def test_idx_files(tmp_path: Path) -> None:
    for prefix, labels in (("train", [0, 1, 2]), ("t10k", [2])):
        pixels = np.arange(len(labels) * 4, dtype=np.uint8)
        shape = struct.pack(">3I", len(labels), 2, 2)
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(
            gzip.compress(bytes([0, 0, 8, 3]) + shape + pixels.tobytes())
        )
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(
            bytes([0, 0, 8, 1]) + struct.pack(">I", len(labels)) + bytes(labels)
        )
    data = load_images(str(tmp_path))
    assert {name: split["label"][:] for name, split in data.items()} == {"train": [0, 1, 2], "test": [2]}
    assert data["train"].features["label"].names == data["test"].features["label"].names == ["0", "1", "2"]
    assert np.asarray(data["train"][1]["image"]).tolist() == [[4, 5], [6, 7]]


def test_an_image_folder(tmp_path: Path) -> None:
    data = load_images(str(image_folder(tmp_path, "train/cat", "train/dog", "test/cat", "test/dog")))
    assert {name: len(split) for name, split in data.items()} == {"train": 10, "test": 10}
    assert data["train"].features["label"].names == ["cat", "dog"]
    assert data["train"][9]["image"].size == (8, 8)


def test_an_image_folder_without_splits(tmp_path: Path) -> None:
    data = load_images(str(image_folder(tmp_path, "cat", "dog")))
    assert {name: len(split) for name, split in data.items()} == {"train": 10}
    assert data["train"].features["label"].names == ["cat", "dog"]


def test_an_image_folder_without_classes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must have a column of type ClassLabel.*one folder for each class"):
        load_images(str(image_folder(tmp_path, "train")))


def test_a_folder_as_the_hub_keeps_cifar10(tmp_path: Path) -> None:
    (tmp_path / "plain_text").mkdir()
    features = Features(img=Image(), label=ClassLabel(names=["airplane", "ship"]))
    for name in ("train", "test"):
        rows = Dataset.from_dict({"img": [picture(i) for i in range(4)], "label": [0, 1, 0, 1]}, features=features)
        rows.to_parquet(str(tmp_path / "plain_text" / f"{name}-00000-of-00001.parquet"))
    data = load_images(str(tmp_path))
    assert sorted(data) == ["test", "train"]
    assert sorted(data["train"].column_names) == ["image", "label"]
    assert data["train"].features["label"].names == ["airplane", "ship"]


def test_a_dataset_with_two_sets_of_labels(tmp_path: Path) -> None:
    features = Features(
        img=Image(), fine_label=ClassLabel(names=["cup", "oak"]), coarse_label=ClassLabel(names=["thing", "tree"])
    )
    rows = Dataset.from_dict({"img": [picture(0)], "fine_label": [1], "coarse_label": [1]}, features=features)
    rows.to_parquet(str(tmp_path / "train.parquet"))
    assert load_images(str(tmp_path))["train"].features["label"].names == ["cup", "oak"]


def test_a_dataset_without_images(tmp_path: Path) -> None:
    features = Features(text=Value("string"), label=ClassLabel(names=["a"]))
    Dataset.from_dict({"text": ["x"], "label": [0]}, features=features).to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(ValueError, match=r"must have a column of type Image, but has .*text"):
        load_images(str(tmp_path))


def test_an_unknown_dataset() -> None:
    with pytest.raises(ValueError, match=r"dataset must be 'digits', an existing file or folder.*got 'digit'"):
        load_images("digit")


def test_batches() -> None:
    processor = ViTImageProcessorPil(size={"height": 4, "width": 4})
    rows = [{"image": picture(255, size=(9, 5)), "label": 3}, {"image": picture(0, mode="RGB"), "label": 1}]
    batch = ImageCollator(processor)(rows)
    assert batch["pixel_values"].shape == (2, 3, 4, 4)
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["labels"].tolist() == [3, 1]
    torch.testing.assert_close(batch["pixel_values"][0], torch.ones(3, 4, 4))
    torch.testing.assert_close(batch["pixel_values"][1, :, 0, 0], torch.tensor([-1.0, -1.0, 1.0]))


def test_torchvision_is_not_needed(tmp_path: Path) -> None:
    """A saved processor loads, and processes as before, where torchvision cannot be imported."""
    processor = ViTImageProcessorPil(size={"height": 4, "width": 4})
    processor.save_pretrained(tmp_path)
    script = f"""
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: None if name.split(".")[0] == "torchvision" else find(name, *args)
sys.modules["torchvision"] = None
sys.path.insert(0, {str(RECIPES)!r})
from PIL import Image
from common.images import ImageCollator
from transformers import AutoImageProcessor
from transformers.utils import is_torchvision_available
assert not is_torchvision_available()
collator = ImageCollator(AutoImageProcessor.from_pretrained({str(tmp_path)!r}, backend="pil"))
batch = collator([{{"image": Image.new("L", (8, 8), 51), "label": 0}}])
print(tuple(batch["pixel_values"].shape), round(batch["pixel_values"].mean().item(), 3))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "(1, 3, 4, 4) -0.6\n", done.stderr
