"""Readers: calibration samples from a text or from a folder of images."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .opening import Processing
from .samples import Batch

_CHARACTERS = 16  # read for each token that is asked for: few languages need as many
_IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def read_batches(
    path: Path,
    model: PreTrainedModel,
    processing: Processing | None,
    *,
    samples: int,
    batch_size: int = 8,
    length: int = 512,
    seed: int = 0,
) -> list[Batch]:
    """Reads calibration samples for a model.

    Args:
        path: A text in UTF-8, of which pieces are taken from the beginning, or a folder of images, of which some are
            drawn. The names of its folders are labels: names as in the config's `label2id`, or numbers.
        model: The model that they are for. One that generates text gets its inputs as labels.
        processing: Its tokenizer or image processor.
        samples: Number of samples; there may be fewer.
        batch_size: Number of samples in a batch.
        length: Number of tokens in a sample of text; fewer if the model has fewer positions.
        seed: Seed of the draw.

    Returns:
        Batches of `input_ids` (`[B, length]`) or `pixel_values` (`[B, C, H, W]`), with `labels` where there are some.

    Raises:
        ValueError: if nothing can be read, a folder names no label of the model, or the model has no tokenizer or
            image processor.
        OSError: if there is no such file, or one cannot be read.
    """
    if not path.exists():
        raise FileNotFoundError(f"there are no calibration samples in {path}: it is neither a file nor a folder.")
    takes_labels = "labels" in inspect.signature(model.forward).parameters
    tokenizer = getattr(processing, "tokenizer", processing)
    image_processor = getattr(processing, "image_processor", processing)
    if path.is_dir():
        if not isinstance(image_processor, ImageProcessingMixin):
            raise ValueError(f"{path} is a folder, so of images, and no image processor is saved with the model.")
        process = cast(Callable[..., Mapping[str, torch.Tensor]], image_processor)
        rows = _read_images(path, process, model, samples, seed, takes_labels)
    else:
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ValueError(f"{path} is a file, so a text, and no tokenizer is saved with the model.")
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or length
        rows = _read_text(path, tokenizer, samples, min(length, positions, tokenizer.model_max_length))
        if takes_labels and model.can_generate():
            rows["labels"] = rows["input_ids"]
    count = len(next(iter(rows.values())))
    return [{name: values[i : i + batch_size] for name, values in rows.items()} for i in range(0, count, batch_size)]


def _read_text(path: Path, tokenizer: PreTrainedTokenizerBase, samples: int, length: int) -> dict[str, torch.Tensor]:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(samples * length * _CHARACTERS)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}).") from error
    if not text.strip():
        raise ValueError(f"there are no calibration samples in {path}: it has no text.")
    if tokenizer.is_fast:
        options = {"truncation": True, "max_length": length, "return_overflowing_tokens": True}
        pieces = tokenizer(text, return_attention_mask=False, **options)["input_ids"]
    else:  # Those written in Python cut a text once.
        tokens = tokenizer(text, return_attention_mask=False)["input_ids"]
        pieces = [tokens[i : i + length] for i in range(0, len(tokens), length)]
    pieces = pieces if len(pieces) == 1 else [piece for piece in pieces if len(piece) == length]
    return {"input_ids": torch.tensor(pieces[:samples])}


def _read_images(
    folder: Path,
    process: Callable[..., Mapping[str, torch.Tensor]],
    model: PreTrainedModel,
    samples: int,
    seed: int,
    takes_labels: bool,
) -> dict[str, torch.Tensor]:
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("images need Pillow: pip install pillow.") from error
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _IMAGES)
    if not files:
        raise ValueError(f"there are no calibration samples in {folder}: it holds no images.")
    drawn = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))[:samples]
    chosen = [files[int(i)] for i in drawn]
    mode = "L" if getattr(model.config, "num_channels", 3) == 1 else "RGB"
    images = []
    for path in chosen:
        with Image.open(path) as image:
            images.append(image.convert(mode))
    rows = {"pixel_values": process(images=images, return_tensors="pt")["pixel_values"]}
    if takes_labels and any(path.parent != folder for path in files):
        rows["labels"] = torch.tensor(_labels_of(chosen, folder, cast(dict[str, int], model.config.label2id)))
    return rows


def _labels_of(files: Sequence[Path], folder: Path, numbers: Mapping[str, int]) -> list[int]:
    labels = []
    for path in files:
        name = path.parent.name if path.parent != folder else ""
        if name not in numbers and not (name.isdecimal() and int(name) in numbers.values()):
            raise ValueError(
                f"{path} lies in {name!r}, which is no label of the model. Its labels are {', '.join(numbers)}. Put "
                "each image into a folder with the name of its label, or all of them into one without others."
            )
        labels.append(numbers[name] if name in numbers else int(name))
    return labels
