"""Example inputs: a small batch with which a model can be called, made from what its config says."""

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..weights.timm import config_of_timm

_SIDE = 64  # Of the image for a network that does not say how large its images are.
_LARGEST_SIDE = 256  # Networks of convolutions take images of any size; large ones only take time.
_TOKENS = 16
_AUDIO = 4000  # samples, a quarter of a second at 16 kHz
_KEYS = 5  # Encoder states for a decoder that stands alone.


def example_batch(model: PreTrainedModel) -> dict[str, torch.Tensor] | None:
    """One sample of random inputs, on the model's device, the same at each call; None if nothing is known of them."""
    config: Any = model.config
    generator = torch.Generator().manual_seed(0)
    batch: dict[str, torch.Tensor] = {}
    if model.main_input_name == "input_ids":
        batch = dict.fromkeys(("input_ids", "decoder_input_ids"), _tokens(model, generator))
    elif model.main_input_name == "pixel_values":
        batch = {"pixel_values": torch.randn(image_shape(model), generator=generator)}
    elif model.main_input_name == "input_features" and hasattr(config, "num_mel_bins"):
        # Whisper takes as many frames as its positions, which its convolutions halve.
        frames = 2 * getattr(config, "max_source_positions", 4 * _TOKENS)
        batch = {
            "input_features": torch.randn(1, config.num_mel_bins, frames, generator=generator),
            "decoder_input_ids": _tokens(model, generator),
        }
    elif model.main_input_name == "input_values":
        batch = {"input_values": torch.randn(1, _AUDIO, generator=generator)}
    if getattr(config, "add_cross_attention", False):
        width = getattr(config, "cross_attention_hidden_size", None) or config.hidden_size
        batch["encoder_hidden_states"] = torch.randn(1, _KEYS, width, generator=generator)
    taken = inspect.signature(type(model).forward).parameters
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in batch.items() if name in taken} or None


def image_shape(model: nn.Module) -> tuple[int, int, int, int]:
    """`[1, channels, height, width]` of an image that a model takes."""
    config: Any = getattr(model.config, "vision_config", model.config)
    timm = next(filter(None, map(config_of_timm, model.modules())), {})
    size = getattr(config, "image_size", None) or timm.get("input_size", (_SIDE,))[-1]
    side = size if isinstance(size, int) else max(size)
    if not hasattr(config, "patch_size"):  # What cuts images into patches has a position for each.
        side = min(side, _LARGEST_SIDE)
    first = first_convolution(model)
    return 1, getattr(config, "num_channels", 3 if first is None else first.in_channels), side, side


def first_convolution(model: nn.Module) -> nn.Conv2d | None:
    """The first convolution over images, None if there is none."""
    return next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)


def _tokens(model: PreTrainedModel, generator: torch.Generator) -> torch.Tensor:
    """`[1, tokens]`, of which the last ends the sequence: some heads read what stands there."""
    config: Any = model.config.get_text_config()
    # Positions of some begin behind that of padding.
    length = max(1, min(_TOKENS, (getattr(config, "max_position_embeddings", None) or 2 * _TOKENS) - 2))
    ids = torch.randint(config.vocab_size, (1, length), generator=generator)
    marks = [getattr(config, name) for name in ("pad_token_id", "eos_token_id") if hasattr(config, name)]
    for mark in marks:
        if isinstance(mark, int):
            ids[ids == mark] = (mark + 1) % config.vocab_size
    if hasattr(config, "eos_token_id") and isinstance(marks[-1], int) and 0 <= marks[-1] < config.vocab_size:
        ids[0, -1] = marks[-1]
    return ids
