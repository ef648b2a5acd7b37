"""LoRA layers that leave pruned weights at zero, in forward passes and when they are merged."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from torch import nn
from transformers.pytorch_utils import Conv1D

_INITS = (True, False, "gaussian", "orthogonal", "eva")  # that leave base weights alone


class MaskedLinear(Linear):
    """A LoRA layer of peft on a Linear or Conv1D, `y = x (W + M ∘ Σ s B A)ᵀ + b`: its adapters reach no pruned weight.

    Made of a `peft.tuners.lora.Linear` by its class alone: parameters, names and files are peft's. Adapters that are
    added to it later are masked too.

    A product with `W + M ∘ s B A` is all there is in float32 and float64, if nothing else looks at the layer. With
    dropout, under autocast, and in lower precision, where small adapters would be lost in the sum, `M ∘ s B A` has a
    product of its own. Each pass makes it anew, and none is kept: that costs little beside the many tokens of a batch,
    and much beside the few with which text is generated. Merge before.

    Attributes:
        sparsity_mask: `[shape of the weight]`, bool: True where a weight is kept. Not in the state dict. None under
            FSDP2, where no process holds a mask of the whole weight: what is zero in the gathered weight is pruned.
    """

    sparsity_mask: torch.Tensor | None

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Adds an adapter.

        It may not begin with what is taken from the base weight, which would fill the zeros, or be of a variant of
        LoRA that cannot be masked.
        """
        if (how := config.init_lora_weights) not in _INITS:
            raise ValueError(f"init_lora_weights={how!r} changes base weights, and fills their zeros. Take True.")
        require_plain({adapter_name: self.resolve_lora_variant(config=config)})
        super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """What an adapter adds to the weight, of its shape: zero where it is pruned."""
        delta = super().get_delta_weight(adapter)
        weight: Any = self.get_base_layer().weight
        return delta.where(_kept(self._mask_on(delta.device), weight), 0)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`[…, in]` → `[…, out]`; not with different adapters for the samples of a batch."""
        adapters = [name for name in self.active_adapters if name in self.lora_A]
        if kwargs.get("adapter_names") is not None:
            raise ValueError("adapter_names, one for each sample of a batch, cannot be used where sparsity is kept.")
        if self.disable_adapters or self.merged or not adapters:
            return super().forward(x, *args, **kwargs)
        base: Any = self.get_base_layer()
        dropouts = [self.lora_dropout[name] for name in adapters]
        drops = self.training and not all(isinstance(dropout, nn.Identity) for dropout in dropouts)
        if not drops and self._is_precise(x, base, adapters) and not _is_looked_at(base):
            y = self._product(x, adapters, with_base=True)
        else:
            y = self.base_layer(x, *args, **kwargs)
            for name, dropout in zip(adapters, dropouts, strict=True):
                y = y + self._product(dropout(x).to(y.dtype), [name])
        for name in adapters:
            if self.lora_bias[name]:
                y = y + (self.lora_B[name].bias * self.scaling[name]).to(y.dtype)
        return y

    def _product(self, x: torch.Tensor, adapters: Sequence[str], *, with_base: bool = False) -> torch.Tensor:
        """`x (M ∘ Σ s B A)ᵀ`, or what the whole layer gives: `x (W + M ∘ Σ s B A)ᵀ + b`."""
        base: Any = self.get_base_layer()
        mask = self._mask_on(x.device)
        weight = bias = None
        if with_base:
            weight, bias = base.weight, base.bias
        elif mask is None:  # Else it is not touched: DeepSpeed would gather it again, and it would be kept.
            weight = base.weight.detach()
        how = _How(self.fan_in_fan_out, tuple(self.scaling[name] for name in adapters), with_base)
        factors = [part[name].weight for name in adapters for part in (self.lora_A, self.lora_B)]
        if any(tensor is not None and tensor.is_meta for tensor in (weight, *factors)):
            raise ValueError("weights were offloaded (meta device), where masks do not reach. Merge adapters before.")
        return _MaskedProduct.apply(x, weight, bias, mask, how, *factors)

    def _is_precise(self, x: torch.Tensor, base: nn.Module, adapters: Sequence[str]) -> bool:
        dtypes = {base.weight.dtype, *(self.lora_A[name].weight.dtype for name in adapters)}
        precise = x.dtype in (torch.float32, torch.float64) and dtypes == {x.dtype}
        return precise and not torch.is_autocast_enabled(x.device.type)

    def _mask_on(self, device: torch.device) -> torch.Tensor | None:
        # No buffer: DistributedDataParallel sends those of the first process to all others, in each forward pass.
        if self.sparsity_mask is not None and self.sparsity_mask.device != device:
            with torch.inference_mode(False):  # Later passes will save it for their backward ones.
                self.sparsity_mask = self.sparsity_mask.to(device)
        return self.sparsity_mask


def require_plain(variants: Mapping[str, object]) -> None:
    """Requires plain LoRA, with or without the scaling of rsLoRA.

    Args:
        variants: Adapter → what peft calls its `LoraVariant`, if there is one.

    Raises:
        ValueError: if there is one.
    """
    for name, variant in variants.items():
        if variant is not None:
            raise ValueError(
                f"the adapter {name!r} is a {type(variant).__name__}, which does more than add to weights, so that "
                "sparsity cannot be kept. Take plain LoRA, with or without use_rslora."
            )


def _is_looked_at(base: nn.Module) -> bool:
    """Whether a layer does more than multiply by its weight, or something waits for it to be called."""
    if type(base).forward not in (nn.Linear.forward, Conv1D.forward) or "forward" in vars(base):
        return True
    hooks = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks)
    # Calibrations wait in a mode of torch's functions.
    return any(hooks) or torch._C._len_torch_function_stack() > 0


class _How(NamedTuple):
    """How a masked product is made.

    Attributes:
        fan_in_fan_out: Whether the weight is `[in, out]`, as that of Conv1D.
        scalings: `s` of each pair of factors.
        with_base: Whether `W` is added, or `M ∘ Σ s B A` stands alone.
    """

    fan_in_fan_out: bool
    scalings: tuple[float, ...]
    with_base: bool

    def as_matrix(self, of_weight: torch.Tensor) -> torch.Tensor:
        """What has the weight's shape, as `[out, in]`; and back."""
        return of_weight.T if self.fan_in_fan_out else of_weight

    def matrix(
        self, dtype: torch.dtype, weight: Any, mask: torch.Tensor | None, factors: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """`[out, in]`: `W + M ∘ Σ s B A`. The weight may be None if it is not added, and there is a mask."""
        scaled = [s * (b @ a) for s, a, b in zip(self.scalings, factors[::2], factors[1::2], strict=True)]
        delta = functools.reduce(torch.Tensor.add_, scaled).masked_fill_(~self.as_matrix(_kept(mask, weight)), 0)
        return (delta.add_(self.as_matrix(weight)) if self.with_base else delta).to(dtype)


class _MaskedProduct(torch.autograd.Function):
    """`x (W + M ∘ Σ s B A)ᵀ + b`, by a weight that is made anew in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        mask: torch.Tensor | None,
        how: _How,
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, mask, *factors)
        ctx.how = how
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, how.matrix(x.dtype, weight, mask, factors), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, mask, *factors = ctx.saved_tensors
        wanted, how = ctx.needs_input_grad, ctx.how
        found: list[torch.Tensor | None] = [None] * len(wanted)
        rows = gradient.reshape(-1, gradient.shape[-1])
        if wanted[0]:
            found[0] = gradient @ how.matrix(x.dtype, weight, mask, factors)
        if wanted[2]:
            found[2] = rows.sum(0)
        if wanted[1] or any(wanted[5:]):
            of_weight = rows.T @ x.reshape(-1, x.shape[-1])  # [out, in]
            if wanted[1]:
                found[1] = how.as_matrix(of_weight)
            of_delta = of_weight.where(how.as_matrix(_kept(mask, weight)), 0).to(factors[0].dtype)
            for i, scaling in enumerate(how.scalings):
                a, b = factors[2 * i : 2 * i + 2]
                found[5 + 2 * i] = scaling * (b.T @ of_delta) if wanted[5 + 2 * i] else None
                found[6 + 2 * i] = scaling * (of_delta @ a.T) if wanted[6 + 2 * i] else None
        return tuple(found)


def _kept(mask: torch.Tensor | None, weight: Any) -> torch.Tensor:
    """Where adapters may reach: by the mask, or by the weight if there is none."""
    return weight != 0 if mask is None else mask
