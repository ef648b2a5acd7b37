"""Readers: calibration samples from a text or from a folder of images."""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..calibration.batches import Batch
from .opening import Processing

_CHARACTERS = 16  # read for each token that is asked for: few languages need as many
_PARTS = ("tokenizer", "image_processor")
_IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def read_batches(
    path: Path,
    model: PreTrainedModel,
    processing: Sequence[Processing],
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
        processing: Its tokenizer, its image processor, or a processor that has them.
        samples: Number of samples; there may be fewer.
        batch_size: Number of samples in a batch.
        length: Number of tokens in a sample of text; fewer if the model has fewer positions.
        seed: Seed of the draw.

    Returns:
        Batches of `input_ids` (`[B, length]`) or `pixel_values` (`[B, C, H, W]`), with `labels` where there are some.
    """
    if not path.exists():
        raise FileNotFoundError(f"there are no calibration samples in {path}: it is neither a file nor a folder.")
    takes_labels = "labels" in inspect.signature(model.forward).parameters
    parts = [part for each in processing for part in (each, *(getattr(each, name, None) for name in _PARTS))]
    tokenizer = next((part for part in parts if isinstance(part, PreTrainedTokenizerBase)), None)
    image_processor = next((part for part in parts if isinstance(part, ImageProcessingMixin)), None)
    if path.is_dir():
        if image_processor is None:
            raise ValueError(f"{path} is a folder, so of images, and no image processor is saved with the model.")
        process = cast(Callable[..., Mapping[str, torch.Tensor]], image_processor)
        rows = _read_images(path, process, model, samples, seed, takes_labels)
    else:
        if tokenizer is None:
            raise ValueError(f"{path} is a file, so a text, and no tokenizer is saved with the model.")
        rows = _read_text(path, tokenizer, samples, min(length, _positions(model), tokenizer.model_max_length))
        if takes_labels and model.can_generate():
            rows["labels"] = rows["input_ids"]
    count = len(next(iter(rows.values())))
    return [{name: values[i : i + batch_size] for name, values in rows.items()} for i in range(0, count, batch_size)]


def _positions(model: PreTrainedModel) -> int:
    """The number of tokens that a model can read."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name and module.padding_idx is not None:
            positions = min(positions, module.num_embeddings - module.padding_idx - 1)  # as RoBERTa counts them
    return int(positions)


def _read_text(path: Path, tokenizer: PreTrainedTokenizerBase, samples: int, length: int) -> dict[str, torch.Tensor]:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(samples * length * _CHARACTERS)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}).") from error
    if not text.strip():
        raise ValueError(f"there are no calibration samples in {path}: it has no text.")
    if length <= (special := tokenizer.num_special_tokens_to_add()):
        raise ValueError(f"length must be above {special}, the tokens that are added to each sample, got {length}.")
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
    # One by one, because a folder that is a link to another place is followed only if it is asked itself.
    places = [folder, *(path for path in sorted(folder.iterdir()) if path.is_dir())]
    files = sorted({path for place in places for path in place.rglob("*") if path.suffix.lower() in _IMAGES})
    if not files:
        raise ValueError(f"there are no calibration samples in {folder}: it holds no images.")
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))
    chosen = [files[int(i)] for i in order[:samples]]
    mode = "L" if getattr(model.config, "num_channels", 3) == 1 else "RGB"
    images = []
    for path in chosen:
        try:
            with Image.open(path) as image:
                images.append(image.convert(mode))
        except Image.DecompressionBombError as error:
            raise ValueError(f"{path} is too large: {error}") from error
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
