"""Layer inputs and outputs: what each targeted weight is multiplied with, and gives, whichever module does it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..weights.targets import Target


@dataclass(frozen=True)
class Product:
    """One use of a targeted weight, or of one expert of it. Each row of the weight is a dot product with its inputs.

    Attributes:
        target: The target.
        part: Which of the parts is used; None if all of them are.
        source: The tensor that the weight is multiplied with, as the operation got it.
        inputs: Number of samples → `[parts, samples, positions, fan_in]`, what the rows of each part are multiplied
            with.
        output: What the operation gave.
        rows: Values of the output's shape and number of samples → `[parts, samples, positions, rows of a part]`.
        grid: The dimensions in whose row-major order the positions lie, and what is behind them, without those of
            one element; only the number of positions where they were flattened before; empty where their order is
            one of its own.
    """

    target: Target
    part: int | None
    source: torch.Tensor
    inputs: Callable[[int], torch.Tensor]
    output: torch.Tensor
    rows: Callable[[torch.Tensor, int], torch.Tensor]
    grid: tuple[int, ...] = ()

    @property
    def part_slice(self) -> slice:
        """The parts that are used, as an index."""
        return slice(None) if self.part is None else slice(self.part, self.part + 1)


_MakeProduct = Callable[[Target, torch.Tensor, torch.Tensor, torch.Tensor], Product]
# What is multiplied, with what may be a targeted weight, and which axis of that holds the inputs.
_Found = Iterator[tuple[torch.Tensor, torch.Tensor, int, _MakeProduct]]


class ProductWatch(TorchFunctionMode):
    """A context that hands every product of a targeted weight to a callback.

    Weights are known by their storage, which they keep when FSDP2 frees its memory between passes. So it does not
    matter which module multiplies them, and fused experts, which multiply slices of one tensor without a module of
    their own, are seen as well. Left out are uses of a transposed weight, as in the decoder of a tied autoencoder:
    what they multiply is not what its rows are multiplied with.

    Args:
        targets: The targets.
        on_product: Called with each product, after it was computed, without gradients.
    """

    def __init__(self, targets: Mapping[str, Target], on_product: Callable[[Product], None]) -> None:
        super().__init__()
        self._targets: dict[int, list[Target]] = {}  # Several in one storage, as after `vector_to_parameters`.
        for target in targets.values():
            self._targets.setdefault(target.weight.untyped_storage()._cdata, []).append(target)
        self._on_product = on_product

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function, and the callback if it multiplied a target."""
        output = func(*args, **(kwargs or {}))
        if (read := _READERS.get(func)) is not None:
            for x, weight, inputs, make_product in read(*args, **(kwargs or {})):
                target = self._target_of(weight)
                if target is not None and weight.stride(inputs) == target.weight.stride(target.axes[-1]):
                    with torch.no_grad():
                        self._on_product(make_product(target, x, weight, output))
        return output

    def _target_of(self, weight: torch.Tensor) -> Target | None:
        """The target of which a tensor is all, or a part."""
        if weight.layout is not torch.strided:
            return None
        offset = weight.storage_offset()
        before = [t for t in self._targets.get(weight.untyped_storage()._cdata, ()) if t.offset <= offset]
        target = max(before, key=lambda t: t.offset, default=None)
        return target if target is not None and offset < target.offset + target.weight.numel() else None


def _linear(target: Target, x: torch.Tensor, weight: torch.Tensor, output: torch.Tensor) -> Product:
    """`x [..., in]` times a matrix or one expert, in either layout; the output is `[..., out]`."""
    part, grid, x = None, _grid_of(x), x.detach()
    if target.weight.ndim == 3:  # An expert is a slice of it, and has positions in an order of its own.
        part, grid = (weight.storage_offset() - target.offset) // weight.numel(), ()

    def by_samples(values: torch.Tensor, samples: int) -> torch.Tensor:
        return values.reshape(1, samples, -1, values.shape[-1])

    return Product(target, part, x, lambda samples: by_samples(x, samples), output, by_samples, grid)


def _grid_of(x: torch.Tensor) -> tuple[int, ...]:
    """`Product.grid` of `[…, features]`, which may be a view of what has more dimensions."""
    shape: Sequence[int] = x.shape if x.ndim > 2 else x.shape[:1]
    base = x._base
    if x.ndim == 2 and base is not None and base.ndim > 2 and base.numel() == x.numel() and x.is_contiguous():
        # The rows are what lies in memory, from its beginning to its end.
        order = sorted(range(base.ndim), key=base.stride, reverse=True)
        if base.permute(order).is_contiguous():
            shape = [base.shape[i] for i in order]
    return tuple(size for size in shape if size > 1)


def _linear_from_left(target: Target, x: torch.Tensor, weight: torch.Tensor, output: torch.Tensor) -> Product:
    """`weight [out, in] · x [..., in, positions]`."""
    x = x.detach()

    def by_samples(values: torch.Tensor, samples: int) -> torch.Tensor:
        return values.mT.reshape(1, samples, -1, values.shape[-2])

    return Product(target, None, x, lambda samples: by_samples(x, samples), output, by_samples)


def _all_experts(target: Target, x: torch.Tensor, weight: torch.Tensor, output: torch.Tensor) -> Product:
    """`x [experts, positions, in] · weight [experts, in, out]`: whose positions these are is not known."""
    x = x.detach()

    def of_experts(values: torch.Tensor, samples: int) -> torch.Tensor:
        return values.unsqueeze(1)

    return Product(target, None, x, lambda samples: of_experts(x, samples), output, of_experts)


def _convolution(stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1) -> _MakeProduct:
    """`x [samples, channels, height, width]`, of which each row of the weight sees one patch a position."""

    def make_product(target: Target, x: torch.Tensor, weight: torch.Tensor, output: torch.Tensor) -> Product:
        x = x.detach()
        kernel, steps = weight.shape[2:], (dilation, dilation) if isinstance(dilation, int) else dilation
        pads = (padding, padding) if isinstance(padding, int) else padding
        if padding == "valid":
            pads = (0, 0)

        def inputs(samples: int) -> torch.Tensor:
            padded, pad = x, pads
            if padding == "same":
                extra = [step * (size - 1) for size, step in zip(kernel, steps, strict=True)]
                sides = [side for n in reversed(extra) for side in (n // 2, n - n // 2)]
                padded, pad = F.pad(x, sides), (0, 0)
            patches = F.unfold(padded, kernel, steps, pad, stride)  # [samples, channels · kernel, positions]
            return (
                patches.unflatten(1, (groups, -1)).permute(1, 0, 3, 2).reshape(groups, samples, -1, weight[0].numel())
            )

        def rows(values: torch.Tensor, samples: int) -> torch.Tensor:
            values = values.flatten(2).unflatten(1, (groups, -1)).permute(1, 0, 3, 2)
            return values.reshape(groups, samples, -1, len(weight) // groups)

        return Product(target, None, x, inputs, output, rows)

    return make_product


def _read_linear(input: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> _Found:
    yield input, weight, -1, _linear


def _read_addmm(input: torch.Tensor, mat1: torch.Tensor, mat2: torch.Tensor, **_: Any) -> _Found:
    yield mat1, mat2, -2, _linear


def _read_matmul(input: torch.Tensor, mat2: torch.Tensor, **_: Any) -> _Found:
    if mat2.ndim > 1:
        yield input, mat2, -2, _all_experts if mat2.ndim == 3 else _linear
    if input.ndim == 2:
        yield mat2, input, -1, _linear_from_left


def _read_conv2d(input: torch.Tensor, weight: torch.Tensor, bias: Any = None, *where: Any, **options: Any) -> _Found:
    yield input, weight, 1, _convolution(*where, **options)


_READERS: dict[Any, Callable[..., _Found]] = {
    F.linear: _read_linear,
    F.conv2d: _read_conv2d,
    **dict.fromkeys([torch.addmm, torch.Tensor.addmm], _read_addmm),
    **dict.fromkeys([torch.mm, torch.bmm, torch.matmul], _read_matmul),
    **dict.fromkeys([torch.Tensor.mm, torch.Tensor.bmm, torch.Tensor.matmul, torch.Tensor.__matmul__], _read_matmul),
}
