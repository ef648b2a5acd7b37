"""LoRA on pruned models: adapters that fill no zeros."""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from .shards import has_shards
from .zero import has_partitions

Model = TypeVar("Model", bound=nn.Module)


def keep_sparsity(model: Model, masks: Mapping[str, torch.Tensor] | None = None) -> Model:
    """Has the LoRA adapters of a model leave pruned weights at zero, in forward passes, merges and unmerges.

    What an adapter adds to a weight is masked: `W + M ∘ s B A`. So the model that is trained is the model that
    `merge_and_unload` gives, with the zeros that it had; without it a merge fills them. Adapters are saved and loaded
    as ever; masks are not saved with them, so call this again on what `PeftModel.from_pretrained` gives.

    Args:
        model: A `PeftModel`, unwrapped; its layers are changed in place. Adapters may be added later.
        masks: Parameter → bool mask, True = kept, by the names of the pruned model, with or without those that peft
            has added; such as `PruningTrainerCallback.masks`. If None, what is not zero is kept.

    Returns:
        The model.

    Raises:
        ValueError: if there are no LoRA adapters, or none on a weight with zeros; if a masked weight is not zero, a
            mask has another shape, adapters are merged, or of a kind that cannot be masked: DoRA, and others that do
            more than to add a product of two matrices; or if several processes hold parts of the model. The model is
            then as it was.

    Source: peft's LoRA, Hu et al. 2021, arXiv 2106.09685.
    """
    from peft.tuners.lora.layer import Linear, LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    from .masked_lora import MaskedLinear, require_plain

    if has_shards(model) or has_partitions(model):
        raise ValueError("several processes hold parts of the model: call keep_sparsity before they divide it.")
    layers: dict[str, Any] = {name: each for name, each in model.named_modules() if isinstance(each, BaseTunerLayer)}
    if not layers:
        raise ValueError(f"this {type(model).__name__} has no adapters. Add them first: peft.get_peft_model.")
    given = None if masks is None else {_plain_name(name): mask for name, mask in masks.items()}
    found: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        weight = getattr(layer.get_base_layer(), "weight", None)
        if not torch.is_tensor(weight) or not weight.is_floating_point():
            continue
        mask = weight != 0 if given is None else given.get(_plain_name(f"{name}.weight"))
        if mask is None or bool(mask.all()):
            continue
        if mask.shape != weight.shape:
            raise ValueError(f"the mask of {name!r} has shape {list(mask.shape)}, its weight {list(weight.shape)}.")
        if bool(weight[~mask.to(weight.device)].any()):
            raise ValueError(f"masked weights of {name!r} are not zero. Set them to zero with MaskSet.apply_.")
        if type(layer) not in (Linear, MaskedLinear):
            kind = "LoRA on such a layer" if isinstance(layer, LoraLayer) else "adapters of another kind"
            raise ValueError(
                f"{name!r} is a {type(layer).__module__}.{type(layer).__name__}: {kind} cannot keep sparsity. It can "
                "be kept of LoRA on Linear and Conv1D."
            )
        require_plain(layer, list(layer.lora_A))
        if layer.merged:
            raise ValueError(f"the adapters of {name!r} are merged, and may have filled zeros. Unmerge them first.")
        found[name] = mask
    if not found:
        raise ValueError(
            "no adapter is on a weight with zeros: there is no sparsity to keep. Prune the base model first, or let "
            "target_modules of the LoraConfig name pruned modules."
        )
    for name, mask in found.items():
        layer = layers[name]
        layer.__class__ = MaskedLinear
        layer.sparsity_mask = mask.to(layer.get_base_layer().weight.device)
    return model


def _plain_name(name: str) -> str:
    """The name of a parameter in the model without peft."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")
