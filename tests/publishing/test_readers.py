"""Calibration samples read from files: what is read is what the tokenizer and the image processor make of them."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from hf_prune import PruningConfig, prune
from hf_prune.publishing.readers import read_batches
from tests.tiny import build
from tests.words import WORDS, word_tokenizer


def text(folder: Path, words: int = 100) -> Path:
    drawn = random.Random(0).choices(WORDS, k=words)
    path = folder / "text.txt"
    path.write_text(" ".join(drawn), encoding="utf-8")
    return path


def images(folder: Path, labels: list[str], count: int = 4) -> Path:
    values = np.random.default_rng(0)
    for label in labels:
        (folder / "images" / label).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = values.integers(0, 256, (10, 12), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / label / f"{number}.png")
    return folder / "images"


def processor() -> transformers.ViTImageProcessorPil:
    return transformers.ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])


def tokens_of(path: Path) -> list[int]:
    return word_tokenizer()(path.read_text(encoding="utf-8"))["input_ids"]


def test_a_text_is_cut_into_samples(tmp_path):
    path = text(tmp_path)
    batches = read_batches(path, build("llama"), [word_tokenizer()], samples=7, batch_size=3, length=9)
    assert [len(batch["input_ids"]) for batch in batches] == [3, 3, 1]
    read = torch.cat([batch["input_ids"] for batch in batches])
    assert read.flatten().tolist() == tokens_of(path)[:63]
    assert all(torch.equal(batch["labels"], batch["input_ids"]) for batch in batches)


def test_a_sample_is_no_longer_than_the_model_reads(tmp_path):
    (batch,) = read_batches(text(tmp_path), build("gpt2"), [word_tokenizer()], samples=2)
    assert batch["input_ids"].shape == (2, 16)


def test_a_short_text_is_one_sample(tmp_path):
    (batch,) = read_batches(text(tmp_path, words=5), build("llama"), [word_tokenizer()], samples=8)
    assert batch["input_ids"].shape == (1, 5)


def test_a_tokenizer_that_is_written_in_python_cuts_as_well(tmp_path):
    (tmp_path / "text").write_text("the fox " * 20)
    batches = read_batches(tmp_path / "text", build("t5"), [transformers.ByT5Tokenizer()], samples=3, length=10)
    read = torch.cat([batch["input_ids"] for batch in batches])
    assert read.flatten().tolist() == transformers.ByT5Tokenizer()("the fox " * 20)["input_ids"][:30]


def test_blanks_are_no_text_whatever_the_tokenizer_adds(tmp_path):
    (tmp_path / "text").write_text(" \n ")
    with pytest.raises(ValueError, match="it has no text"):
        read_batches(tmp_path / "text", build("t5"), [transformers.ByT5Tokenizer()], samples=3)


def test_the_rest_that_fills_no_sample_is_left_out(tmp_path):
    (batch,) = read_batches(text(tmp_path, words=25), build("llama"), [word_tokenizer()], samples=8, length=10)
    assert batch["input_ids"].shape == (2, 10)


def test_what_generates_nothing_gets_no_labels(tmp_path):
    (batch,) = read_batches(text(tmp_path), build("bert"), [word_tokenizer()], samples=2, length=8)
    assert set(batch) == {"input_ids"}


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "mixtral"])
@pytest.mark.parametrize("criterion", ["taylor", "wanda", "sparsegpt"])
def test_language_models_are_pruned_by_text(criterion, family, tmp_path):
    model = build(family)
    batches = read_batches(text(tmp_path, 400), model, [word_tokenizer()], samples=16, length=16)
    config = PruningConfig(sparsity=0.5, criterion=criterion, calibration_samples=16)
    assert prune(model, config, batches).sparsity == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("labels", [["LABEL_0", "LABEL_2"], ["0", "2"]])
def test_the_names_of_folders_are_labels(labels, tmp_path):
    folder, model = images(tmp_path, labels), build("vit")
    batches = read_batches(folder, model, [processor()], samples=6, batch_size=4, seed=3)
    assert [batch["pixel_values"].shape for batch in batches] == [(4, 1, 8, 8), (2, 1, 8, 8)]
    again = read_batches(folder, model, [processor()], samples=6, batch_size=4, seed=3)
    others = read_batches(folder, model, [processor()], samples=6, batch_size=4, seed=4)
    assert torch.equal(batches[0]["pixel_values"], again[0]["pixel_values"])
    assert not torch.equal(batches[0]["pixel_values"], others[0]["pixel_values"])
    expected = {}
    for label in labels:
        for path in (folder / label).iterdir():
            with Image.open(path) as image:
                pixels = processor()(images=image.convert("L"), return_tensors="pt")["pixel_values"]
            expected[pixels.numpy().tobytes()] = int(label[-1])
    for batch in batches:
        for pixels, label in zip(batch["pixel_values"], batch["labels"], strict=True):
            assert expected[pixels.numpy().tobytes()] == label


@pytest.mark.parametrize("family", ["vit", "resnet", "convnext"])
@pytest.mark.parametrize("criterion", ["fisher", "wanda", "sparsegpt"])
def test_classifiers_are_pruned_by_images(criterion, family, tmp_path):
    model = build(family)
    batches = read_batches(images(tmp_path, ["0", "1", "2"]), model, [processor()], samples=12)
    config = PruningConfig(sparsity=0.5, criterion=criterion, calibration_samples=12)
    assert prune(model, config, batches).sparsity == pytest.approx(0.5, abs=0.01)


def test_a_processor_has_both(tmp_path):
    class Both:
        tokenizer, image_processor = word_tokenizer(), processor()

    assert "input_ids" in read_batches(text(tmp_path), build("llama"), [Both()], samples=1, length=4)[0]
    assert "pixel_values" in read_batches(images(tmp_path, ["."]), build("vit"), [Both()], samples=1)[0]


def test_folders_of_labels_may_be_links(tmp_path):
    folder = images(tmp_path, ["0"])
    other = images(tmp_path / "elsewhere", ["x"])
    (folder / "1").symlink_to(other / "x")
    batches = read_batches(folder, build("vit"), [processor()], samples=100)
    assert sorted(torch.cat([batch["labels"] for batch in batches]).tolist()) == [0] * 4 + [1] * 4


def test_a_sample_has_room_for_what_roberta_counts_from(tmp_path):
    config = transformers.RobertaConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, pad_token_id=1,
    )  # fmt: skip
    model = transformers.RobertaForMaskedLM(config)
    (batch,) = read_batches(text(tmp_path), model, [word_tokenizer()], samples=2)
    assert batch["input_ids"].shape == (2, 14)
    model(**batch)


def test_a_length_that_special_tokens_fill_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="length must be above 1, the tokens that are added to each sample, got 1"):
        read_batches(text(tmp_path), build("t5"), [transformers.ByT5Tokenizer()], samples=3, length=1)


def test_an_image_that_would_fill_the_memory_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match="is too large"):
        read_batches(images(tmp_path, ["0"]), build("vit"), [processor()], samples=3)


def test_images_without_labels(tmp_path):
    (batch,) = read_batches(images(tmp_path, ["."]), build("vit"), [processor()], samples=3)
    assert set(batch) == {"pixel_values"}
    model = build("vit")
    with pytest.raises(ValueError, match="labels"):
        prune(model, PruningConfig(sparsity=0.5, criterion="taylor", calibration_samples=3), [batch])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["cat", "0"], "lies in 'cat', which is no label of the model. Its labels are LABEL_0, LABEL_1, LABEL_2"),
        (["3"], "lies in '3', which is no label"),
        ([".", "1"], "lies in '', which is no label"),
    ],
)
def test_a_folder_that_is_no_label_is_an_error(labels, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_batches(images(tmp_path, labels), build("vit"), [processor()], samples=100)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nothing", "there are no calibration samples in .*: it is neither a file nor a folder"),
        ("empty folder", "it holds no images"),
        ("empty text", "it has no text"),
        ("bytes", "is not text in UTF-8"),
        ("text for a model of images", "is a file, so a text, and no tokenizer is saved with the model"),
        ("images for a model of text", "is a folder, so of images, and no image processor is saved with the model"),
        ("no image", "cannot identify image file"),
    ],
)
def test_what_cannot_be_read_is_an_error(what, message, tmp_path):
    path, processing = tmp_path / "it", processor() if "image" in what or "folder" in what else word_tokenizer()
    if what == "bytes":
        path.write_bytes(b"\xff\xfe\x00")
    elif what == "empty text":
        path.write_text("  \n")
    elif what == "no image":
        images(tmp_path, ["0"])
        (tmp_path / "images" / "0" / "0.png").write_text("no image")
        path = tmp_path / "images"
    elif what.startswith("text"):
        path.write_text("a b c")
    elif what != "nothing":
        path.mkdir()
    if what == "images for a model of text":
        processing = word_tokenizer()
    with pytest.raises((ValueError, OSError), match=message):
        read_batches(path, build("vit"), [processing], samples=100)
