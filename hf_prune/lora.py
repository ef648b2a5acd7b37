"""LoRA on pruned models: adapters that fill no zeros."""

import dataclasses
import logging
import re
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from .masks import masked_in
from .shards import has_shards, is_sharded, whole
from .targets import Adapter, Target
from .zero import has_partitions

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)


def has_adapters(model: nn.Module) -> bool:
    """Whether peft has put adapters into a model."""
    return hasattr(model, "peft_config")


def keep_sparsity(model: Model, masks: Mapping[str, torch.Tensor] | None = None) -> Model:
    """Has the LoRA adapters of a model leave pruned weights at zero, in forward passes, merges and unmerges.

    What an adapter adds to a weight is masked: `W + M ∘ s B A`. So the model that is trained is the model that
    `merge_and_unload` gives, with the zeros that it had; without it a merge fills them. Adapters are saved and loaded
    as ever; masks are not saved with them, so call this again on what `PeftModel.from_pretrained` gives.
    Zeros of weights that are trained themselves (`modules_to_save`) are held by `PruningTrainerCallback` alone.

    Args:
        model: A `PeftModel`, unwrapped; its layers are changed in place. Adapters that are added to these layers later
            are masked too; after adding some to others, call this again.
        masks: Parameter → bool mask, True = kept, by the names of the pruned model, with or without those that peft
            has added; such as `PruningTrainerCallback.masks`. If None, what is not zero is kept.

    Returns:
        The model.

    Raises:
        ValueError: if there are no LoRA adapters, or none on a weight with zeros; if a masked weight is not zero, a
            mask has another shape, adapters are merged, or of a kind that cannot be masked: DoRA, and others that do
            more than add a product of two matrices; or if several processes hold parts of the model. The model is
            then as it was.

    Source: peft's LoRA, Hu et al. 2021, arXiv 2106.09685.
    """
    if has_shards(model) or has_partitions(model):
        raise ValueError("several processes hold parts of the model: call keep_sparsity before they divide it.")
    layers = _adapted(model)
    if not layers:
        raise ValueError(f"this {type(model).__name__} has no adapters. Add them first: peft.get_peft_model.")
    given = None if masks is None else {_plain_name(name): mask for name, mask in masks.items()}
    found: dict[str, torch.Tensor] = {}
    for name, (_, weight) in layers.items():
        mask = weight != 0 if given is None else given.get(name)
        if mask is None or bool(mask.all()):
            continue
        if mask.shape != weight.shape:
            raise ValueError(f"the mask of {name!r} has shape {list(mask.shape)}, its weight {list(weight.shape)}.")
        if bool(weight[~mask.to(weight.device)].any()):
            raise ValueError(f"masked weights of {name!r} are not zero. Set them to zero with MaskSet.apply_.")
        found[name] = mask
    if not found:
        raise ValueError(
            "no adapter is on a weight with zeros: there is no sparsity to keep. Prune the base model first, or let "
            "target_modules of the LoraConfig name pruned modules."
        )
    require_maskable_adapters(model, found)
    mask_adapters_(model, found)
    return model


def require_maskable_adapters(model: nn.Module, names: Collection[str]) -> None:
    """Requires that the adapters on pruned parameters can be masked.

    Args:
        model: The model with its adapters.
        names: The parameters that are pruned, with or without the names that peft has added.

    Raises:
        ValueError: if one is another kind than plain LoRA on Linear or Conv1D, or is merged.
    """
    from peft.tuners.lora.layer import Linear, LoraLayer

    from .masked_lora import MaskedLinear, require_plain

    layers = _adapted(model)
    for name in map(_plain_name, names):
        if name not in layers:
            continue
        layer, _ = layers[name]
        if type(layer) not in (Linear, MaskedLinear):
            kind = "LoRA on such a layer" if isinstance(layer, LoraLayer) else "adapters of another kind"
            raise ValueError(
                f"{name!r} is in a {type(layer).__module__}.{type(layer).__name__}: {kind} cannot keep sparsity. It "
                "can be kept of LoRA on Linear and Conv1D."
            )
        require_plain(layer, list(layer.lora_A))
        if layer.merged:
            raise ValueError(f"the adapters of {name!r} are merged, and may have filled zeros. Unmerge them first.")


def mask_adapters_(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
    """Has LoRA layers leave at zero what is pruned of their weights; where there is no adapter, nothing changes.

    Under FSDP2 all processes call this, and adapters leave every zero of the weights alone: see `MaskedLinear`.

    Args:
        model: The model with its adapters; `require_maskable_adapters` has found nothing wrong with them.
        masks: As in `keep_sparsity`. Masked weights are zero.
    """
    from .masked_lora import MaskedLinear

    layers = _adapted(model)
    for name, mask in ((_plain_name(name), mask) for name, mask in masks.items()):
        if name not in layers:
            continue
        layer, weight = layers[name]
        layer.__class__ = MaskedLinear
        layer.sparsity_mask = None if is_sharded(weight) else mask.to(weight.device)
        if is_sharded(weight) and (more := masked_in(weight.detach() != 0) - masked_in(mask)):
            logger.warning(
                "%d weights of %r are zero without being pruned. Under FSDP2 adapters are masked by the zeros, and "
                "leave these at zero too.", more, name,
            )  # fmt: skip


def with_adapters(model: nn.Module, targets: Mapping[str, Target]) -> dict[str, Target]:
    """Targets that know what the active LoRA adapters add to them; all processes call this.

    Args:
        model: The model with its adapters.
        targets: What `find_targets` found in it.

    Returns:
        The same, by the same names. Adapters that are merged, or do more than add, are left out.
    """
    from peft.tuners.lora.layer import Linear

    from .masked_lora import MaskedLinear

    layers = _adapted(model)

    def adapters_on(name: str) -> tuple[Adapter, ...]:
        layer: Any = layers.get(_plain_name(name), (None,))[0]
        if type(layer) not in (Linear, MaskedLinear) or layer.merged or layer.disable_adapters:
            return ()
        return tuple(
            Adapter(whole(layer.lora_A[each].weight.detach()), whole(layer.lora_B[each].weight.detach()), scaling)
            for each, scaling in layer.scaling.items()
            if each in layer.active_adapters and each in layer.lora_A and each not in layer.lora_variant
        )

    return {name: dataclasses.replace(target, adapters=adapters_on(name)) for name, target in targets.items()}


def _adapted(model: nn.Module) -> dict[str, tuple[Any, torch.Tensor]]:
    """The layers of peft with the floating-point parameters that they adapt, by their plain names."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            base = layer.get_base_layer()
            # Of experts that are one parameter it has the name, and of attention in one piece there is no `weight`.
            own = getattr(layer, "parameter_name", "weight" if hasattr(base, "weight") else "in_proj_weight")
            weight = getattr(base, own, None)
            if torch.is_tensor(weight) and weight.is_floating_point():
                found[_plain_name(f"{name}.{own}")] = (layer, weight)
    return found


def _plain_name(name: str) -> str:
    """The name of a parameter in the model without peft."""
    return re.sub(r"(\.base_layer)+\.", ".", name.removeprefix("base_model.model."))
