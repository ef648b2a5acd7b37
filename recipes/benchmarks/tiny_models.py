"""Tiny models of Transformers' model types, made from their default configs, and how far their outputs are apart."""

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from hf_prune.structures.small_models import call_exactly, small_model_like

MAPPINGS = ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_CLASSIFICATION")


def model_types() -> dict[str, str]:
    """Model type → the class of its first mapping."""
    found: dict[str, str] = {}
    for mapping in MAPPINGS:
        for model_type, classes in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").items():
            found.setdefault(model_type, classes if isinstance(classes, str) else classes[0])
    return found


def tiny(model_type: str) -> PreTrainedModel:
    """A tiny model of a type's default config, with random weights.

    Raises:
        ValueError: if there is none.
    """
    try:
        kind = getattr(transformers, model_types()[model_type])
        with torch.device("meta"):
            large = kind(AutoConfig.for_model(model_type))
        model = small_model_like(large)
    except Exception as error:  # Configs and classes fail in their own ways where their defaults fit nothing.
        raise ValueError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
            parameter.copy_(parameter.float())  # Some are loaded in float32, whatever the rest is.
    return model


def outputs_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tensors that a model gives for its example."""
    with torch.no_grad():
        given = call_exactly(model)
    named = dict(given) if hasattr(given, "keys") else {str(i): value for i, value in enumerate(given)}
    return {name: value for name, value in named.items() if torch.is_tensor(value) and value.is_floating_point()}


def gap(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of norms; infinite if shapes or what is finite differ."""
    if found.keys() != expected.keys() or any(found[name].shape != expected[name].shape for name in expected):
        return float("inf")
    gaps = []
    for name, value in expected.items():
        finite = value.isfinite()
        if not torch.equal(finite, found[name].isfinite()):
            return float("inf")
        gaps.append(((found[name] - value)[finite].norm() / value[finite].norm().clamp(min=1e-30)).item())
    return max(gaps, default=float("inf"))
