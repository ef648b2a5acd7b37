"""LoRA on pruned models: adapters that fill no zeros."""

import dataclasses
import logging
from collections.abc import Container, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ..distributed.processes import rank_and_size
from ..distributed.shards import has_shards, is_sharded, whole
from ..distributed.zero import gather_with_, has_partitions
from ..weights.masks import MaskSet, masked_in
from ..weights.targets import Adapter, Target, plain_name

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)
Value = TypeVar("Value")


class _Adapted(NamedTuple):
    """A layer of peft, with the parameter that it adapts, and its name without what peft has added."""

    name: str
    layer: Any
    weight: torch.Tensor


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
        TypeError: if a mask is not a bool tensor.
        ValueError: if there are no LoRA adapters, or none on a weight with zeros; if a masked weight is not zero, a
            mask has another shape or belongs to no parameter, or a weight is not in memory; if adapters are merged,
            or of a kind that cannot be masked: DoRA, and others that do more than add a product of two matrices; or
            if several processes hold parts of the model. The model is then as it was.

    Source: peft's LoRA, Hu et al. 2021, arXiv 2106.09685.
    """
    if has_shards(model) or has_partitions(model):
        raise ValueError("several processes hold parts of the model: call keep_sparsity before they divide it.")
    layers = _adapted(model)
    if not layers:
        raise ValueError(f"this {type(model).__name__} has no adapters. Add them first: peft.get_peft_model.")
    given = None if masks is None else _by_parameter(model, MaskSet(masks))
    found: dict[torch.Tensor, torch.Tensor] = {}
    for name, _, weight in layers:
        if weight.is_meta:
            raise ValueError(f"{name!r} is not in memory (meta device): load the model whole, on one device.")
        mask = weight != 0 if given is None else given.get(weight)
        if mask is None or bool(mask.all()):
            continue
        if mask.shape != weight.shape:
            raise ValueError(f"the mask of {name!r} has shape {list(mask.shape)}, its weight {list(weight.shape)}.")
        if bool(weight[~mask.to(weight.device)].any()):
            raise ValueError(f"masked weights of {name!r} are not zero. Set them to zero with MaskSet.apply_.")
        found[weight] = mask
    if not found:
        raise ValueError(
            "no adapter is on a weight with zeros: there is no sparsity to keep. Prune the base model first, or let "
            "target_modules of the LoraConfig name pruned modules."
        )
    _require_maskable(layers, found)
    _mask_(layers, found)
    return model


def keeps_sparsity(model: nn.Module) -> bool:
    """Whether adapters of a model are masked."""
    if not has_adapters(model):
        return False
    from .masked_lora import MaskedLinear

    return any(isinstance(module, MaskedLinear) for module in model.modules())


def require_maskable_adapters(model: nn.Module, names: Iterable[str]) -> None:
    """Requires that the adapters on pruned parameters can be masked: plain LoRA on Linear or Conv1D, not merged."""
    _require_maskable(_adapted(model), _by_parameter(model, dict.fromkeys(names)))


def mask_adapters_(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
    """Has LoRA layers leave at zero what is pruned of their weights; where there is no adapter, nothing changes.

    `require_maskable_adapters` has found nothing wrong with them, and masked weights are zero. Under FSDP2 all
    processes call this, and adapters leave every zero of the weights alone: see `MaskedLinear`.
    """
    _mask_(_adapted(model), _by_parameter(model, masks))


def with_adapters(model: nn.Module, targets: Mapping[str, Target]) -> dict[str, Target]:
    """Targets that know what the active LoRA adapters add to them; all processes call this.

    Adapters that are merged, or do more than add, are left out.
    """
    from peft.tuners.lora.layer import Linear

    from .masked_lora import MaskedLinear

    layers: dict[torch.Tensor, Any] = {weight: layer for _, layer, weight in _adapted(model)}

    def adapters_on(weight: torch.Tensor) -> tuple[Adapter, ...]:
        layer: Any = layers.get(weight)
        if type(layer) not in (Linear, MaskedLinear) or layer.merged or layer.disable_adapters:
            return ()
        return tuple(
            Adapter(whole(layer.lora_A[each].weight.detach()), whole(layer.lora_B[each].weight.detach()), scaling)
            for each, scaling in layer.scaling.items()
            if each in layer.active_adapters and each in layer.lora_A and each not in layer.lora_variant
        )

    return {n: dataclasses.replace(target, adapters=adapters_on(target.weight)) for n, target in targets.items()}


def _require_maskable(layers: Iterable[_Adapted], weights: Container[torch.Tensor]) -> None:
    from peft.tuners.lora.layer import Linear, LoraLayer

    from .masked_lora import MaskedLinear, require_plain

    for name, layer, weight in layers:
        if weight not in weights:
            continue
        if any(isinstance(module, FSDPModule) for module in layer.modules()):
            raise ValueError(
                f"FSDP2 gathers {name!r} or its adapters by themselves, and masked adapters need both at once. Wrap "
                "whole transformer layers, by transformer_layer_cls_to_wrap."
            )
        if type(layer) not in (Linear, MaskedLinear):
            kind = "LoRA on such a layer" if isinstance(layer, LoraLayer) else "adapters of another kind"
            raise ValueError(
                f"{name!r} is in a {type(layer).__module__}.{type(layer).__name__}: {kind} cannot keep sparsity. It "
                "can be kept of LoRA on Linear and Conv1D. If the zeros of this one were not pruned, give masks of "
                "what was."
            )
        require_plain(layer.lora_variant)
        if layer.merged:
            raise ValueError(f"the adapters of {name!r} are merged, and may have filled zeros. Unmerge them first.")


def _mask_(layers: Iterable[_Adapted], masks: Mapping[torch.Tensor, torch.Tensor]) -> None:
    from .masked_lora import MaskedLinear

    for name, layer, weight in layers:
        if weight not in masks:
            continue
        mask = masks[weight]
        layer.__class__ = MaskedLinear
        layer.sparsity_mask = None
        for part in (*layer.lora_A.values(), *layer.lora_B.values()):
            gather_with_(layer, part.weight)
        if not is_sharded(weight):
            with torch.inference_mode(False):  # Later passes will save it for their backward ones.
                layer.sparsity_mask = mask.to(weight.device, copy=mask.is_inference())
        elif more := masked_in(weight.detach() != 0) - masked_in(mask):
            logger.log(
                logging.DEBUG if rank_and_size()[0] else logging.WARNING,
                "%d weights of %r are zero without being pruned. Under FSDP2 adapters are masked by the zeros, and "
                "leave these at zero too.", more, name,
            )  # fmt: skip


def _adapted(model: nn.Module) -> list[_Adapted]:
    """The layers of peft on floating-point parameters; of layers on layers all."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = []
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            base = layer.get_base_layer()
            # Of experts that are one parameter it has the name, and of attention in one piece there is no `weight`.
            own = getattr(layer, "parameter_name", "weight" if hasattr(base, "weight") else "in_proj_weight")
            weight = getattr(base, own, None)
            if torch.is_tensor(weight) and weight.is_floating_point():
                found.append(_Adapted(_plain_name(f"{name}.{own}"), layer, weight))
    return found


def _by_parameter(model: nn.Module, values: Mapping[str, Value]) -> dict[torch.Tensor, Value]:
    """Values by the parameter that their name means, be it with or without what peft has added to names.

    Parameters and not names, as several modules may share one.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    plain = {_plain_name(name): parameter for name, parameter in own.items()}
    if strange := [name for name in values if name not in own and name not in plain]:
        raise ValueError(f"the model has no parameter {strange[0]!r}; the masks are of another model.")
    return {own[name] if name in own else plain[name]: value for name, value in values.items()}


def _plain_name(name: str) -> str:
    """The name of a parameter in the model without peft."""
    return plain_name(name.removeprefix("base_model.model."))
