"""Batches: how many samples one holds, and how they are cut out of it.

Samples lie along the first dimension of tensors, with two exceptions: padding-free batches hold sequences behind one
another in a single row, and vision-language batches hold patches, tiles or images of all samples behind one another.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

import torch
from torch import nn

Batch = Mapping[str, Any]

IGNORED_LABEL = -100
"""The label of a position that has none, everywhere in Transformers."""

# Their first dimension is that of samples, whatever else a batch holds, and in whatever order.
_BY_SAMPLE = ("input_ids", "inputs_embeds", "decoder_input_ids", "attention_mask", "labels")
# These say where sequences begin, for kernels; of a sequence alone there is nothing to say.
_BOUNDARIES = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
_PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


def is_batch(given: object) -> TypeGuard[Batch]:
    """Whether something is a dict with a tensor that has dimensions."""
    return isinstance(given, Mapping) and any(torch.is_tensor(value) and value.ndim for value in given.values())


def size_of(batch: Batch) -> int:
    """Number of samples in a batch."""
    named = (batch[name] for name in _BY_SAMPLE if name in batch)
    return next(len(v) for v in itertools.chain(named, batch.values()) if torch.is_tensor(v) and v.ndim)


def singles_of(batch: Batch) -> Iterator[Batch]:
    """The samples of a batch, each as a batch of its own."""
    return (take_samples(batch, slice(i, i + 1)) for i in range(size_of(batch)))


def take_samples(batch: Batch, which: slice | torch.Tensor) -> Batch:
    """Some of the samples of a batch; the batch itself, if these are all of them, in their order.

    Raises:
        ValueError: if it holds rows of which it is not known whose they are.
    """
    size = size_of(batch)
    chosen = torch.arange(size)[which if isinstance(which, slice) else which.cpu()].tolist()
    if chosen == list(range(size)):
        return batch
    if name := next((name for name, value in batch.items() if not _can_cut(name, value, size)), None):
        raise ValueError(
            f"cannot split a batch of {size} samples: {name!r} has {len(batch[name])} rows, and nothing says which "
            "belong to which sample. Give batches of one sample."
        )

    def select(name: str, value: Any) -> Any:
        if isinstance(value, list) and len(value) == size:  # as the labels of detection are
            return [value[i] for i in chosen]
        if not torch.is_tensor(value) or not value.ndim:
            return value
        if _is_of_axes(name, value, size):
            return value[:, which]
        return value[which] if len(value) == size else value

    return {name: select(name, value) for name, value in batch.items()}


def can_cut(batch: Batch) -> bool:
    """Whether the samples of a batch lie along the first dimension of its tensors."""
    size = size_of(batch)
    return size == 1 or all(_can_cut(name, value, size) for name, value in batch.items())


def _can_cut(name: str, value: Any, size: int) -> bool:
    """Whether the samples lie along the first dimension, or share the value: one row, or weights of classes."""
    is_shared = not torch.is_tensor(value) or value.ndim < 2 or len(value) < 2
    return is_shared or len(value) == size or _is_of_axes(name, value, size)


def _is_of_axes(name: str, value: torch.Tensor, size: int) -> bool:
    """Whether these are the positions of time, height and width, and maybe of text: `[axes, samples, tokens]`."""
    return name == "position_ids" and value.ndim == 3 and len(value) in (3, 4) and value.shape[1] == size


def unpacked(batch: Batch, placeholders: Mapping[str, int]) -> list[Batch]:
    """What a batch holds, as batches whose samples lie along the first dimension.

    Args:
        batch: The batch.
        placeholders: As `placeholders_of` the model.

    Returns:
        The batch itself, or a batch for each of its samples; the former also where these cannot be told apart.
    """
    return _sequences(batch) or _with_own_images(batch, placeholders) or [batch]


def placeholders_of(model: nn.Module) -> dict[str, int]:
    """The token that stands for a piece of an image, and the one for a piece of a video, if a model has them."""
    config, names = getattr(model, "config", None), itertools.product(_PIXELS, ("index", "id"))
    found = ((kind, getattr(config, f"{kind}_token_{ending}", None)) for kind, ending in names)
    return {kind: token for kind, token in found if token is not None}


def _sequences(batch: Batch) -> list[Batch] | None:
    """The sequences that lie behind one another in a single row, as padding-free collators make it."""
    tokens = next((batch[name] for name in ("input_ids", "inputs_embeds") if torch.is_tensor(batch.get(name))), None)
    # With a mask a model attends from one sequence to the next: then they are one sample.
    if tokens is None or tokens.ndim < 2 or len(tokens) != 1 or batch.get("attention_mask") is not None:
        return None
    length, labels = tokens.shape[1], batch.get("labels")
    starts = _starts(batch, length)
    ends, count = [*starts[1:], length], len(starts)
    if count < 2:
        return None
    if torch.is_tensor(labels) and labels.shape == (1, length):
        # What pads a row to a multiple of some length are sequences of one token, without a label.
        while len(starts) > 1 and ends[-1] - starts[-1] == 1 and labels[0, starts[-1]] == IGNORED_LABEL:
            starts.pop()
            ends.pop()

    def cut(value: Any, i: int) -> Any:
        here = slice(starts[i], ends[i])
        if torch.is_tensor(value) and value.ndim > 1:
            if value.shape[:2] == (1, length):
                return value[:, here]
            return value[:, :, here] if value.ndim == 3 and value.shape[1:] == (1, length) else value
        is_by_sequence = isinstance(value, list) or (torch.is_tensor(value) and value.ndim)
        return value[i : i + 1] if is_by_sequence and len(value) == count else value

    return [
        {name: cut(value, i) for name, value in batch.items() if name not in _BOUNDARIES} for i in range(len(starts))
    ]


def _starts(batch: Batch, length: int) -> list[int]:
    """Where sequences begin in a row of tokens."""
    ends, positions, index = (batch.get(name) for name in ("cu_seq_lens_q", "position_ids", "seq_idx"))
    if torch.is_tensor(ends):
        return list(ends[:-1].tolist())
    begins = torch.zeros(length, dtype=torch.bool)
    begins[:1] = True
    if torch.is_tensor(positions) and positions.shape == (1, length):
        jumps = positions[0].diff().cpu() != 1
        if (positions[0, 1:].cpu()[jumps] == positions[0, :1].cpu()).all():  # Others number something else.
            begins[1:] = jumps
    elif torch.is_tensor(index) and index.shape == (1, length):
        begins[1:] = index[0].diff().cpu() != 0
    return list(begins.nonzero().flatten().tolist())


def _with_own_images(batch: Batch, placeholders: Mapping[str, int]) -> list[Batch] | None:
    """The samples with their images and videos, where these lie behind one another in tensors of their own."""
    size, counts = size_of(batch), dict[str, list[int]]()
    for kind, pixels in _PIXELS.items():
        values, grid = batch.get(pixels), batch.get(f"{kind}_grid_thw")
        # With more dimensions than a list of images has, the first one is that of samples.
        if not torch.is_tensor(values) or (values.ndim > 4 and len(values) == size):
            continue
        rows, images = _rows_and_images(batch, values, grid, placeholders.get(kind))
        for name, value in batch.items():
            if _kind_of(name) == kind and (isinstance(value, list) or (torch.is_tensor(value) and value.ndim)):
                if grid is not None and name != pixels and len(value) == len(grid):
                    counts[name] = images
                elif len(value) == len(values):
                    counts[name] = rows
    rest = {name: value for name, value in batch.items() if name not in counts}
    is_known = bool(counts) and all(counts.values()) and can_cut(rest)
    if size == 1 or not is_known or all(count == [1] * size for count in counts.values()):
        return None
    singles = [dict(take_samples(rest, slice(i, i + 1))) for i in range(size)]
    for name, of_samples in counts.items():
        for single, end, count in zip(singles, itertools.accumulate(of_samples), of_samples, strict=True):
            if count:  # Text alone has no images.
                single[name] = batch[name][end - count : end]
    return list(singles)


def _kind_of(name: str) -> str | None:
    """What a tensor of a batch tells of, by its name: videos, images, or neither."""
    if "video" in name or name.startswith("second_per_grid"):
        return "video"
    return "image" if any(word in name for word in ("image", "pixel", "spatial_shapes")) else None


def _rows_and_images(
    batch: Batch, pixels: torch.Tensor, grid: torch.Tensor | None, placeholder: int | None
) -> tuple[list[int], list[int]]:
    """How many rows of pixels each sample has, and of how many images; nothing where that cannot be told.

    Assumes equally many placeholder tokens for each row. An image with a grid has `t · h · w` rows.
    """
    ids = batch.get("input_ids")
    sizes = next((batch[name] for name in ("image_sizes", "spatial_shapes") if torch.is_tensor(batch.get(name))), None)
    if grid is None and sizes is not None and (sizes != sizes[:1]).any():
        return [], []  # Images of other sizes have other numbers of tokens.
    if placeholder is not None and torch.is_tensor(ids):
        counts = (ids == placeholder).sum(1) * len(pixels)
        total = int(counts.sum()) // max(len(pixels), 1)
        if not total or (counts % total).any():
            return [], []
        rows = counts // total
    elif grid is not None and len(grid) == size_of(batch):  # one of each sample
        rows = grid.prod(1)
    else:
        return [], []
    if grid is None:
        return rows.tolist(), rows.tolist()
    ends, wanted = [0, *grid.prod(1).cumsum(0).tolist()], [0, *rows.cumsum(0).tolist()]
    if not set(wanted) <= set(ends):
        return [], []
    at = [ends.index(end) for end in wanted]
    return rows.tolist(), [after - before for before, after in itertools.pairwise(at)]
