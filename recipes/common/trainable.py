"""What of a pruned model is trained: all of it, LoRA adapters, or biases and norms alone."""

from peft import LoraConfig, get_peft_model
from torch import nn

TRAINABLE = ("full", "lora", "bias+norm")


def make_trainable(model: nn.Module, which: str, rank: int) -> nn.Module:
    """Freezes what is not trained, and adds what is.

    Args:
        model: The pruned model; changed in place.
        which: One of `TRAINABLE`: "lora" adapts every Linear but the head, "bias+norm" is PERP (Zimmer et al. 2023,
            arXiv 2312.15230).
        rank: Rank of the adapters.

    Returns:
        The model that is trained.
    """
    if which == "lora":
        return get_peft_model(model, LoraConfig(target_modules="all-linear", r=rank, lora_alpha=2 * rank))
    for parameter in model.parameters():
        parameter.requires_grad_(which == "full" or parameter.ndim == 1)
    return model
