"""Second moments: what goes into each weight, stage by stage, as the changed layers before it make it."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn
from transformers.utils.logging import tqdm

from ..calibration.activations import Product
from ..calibration.batches import Batch, size_of
from ..calibration.contexts import eager_experts, undisturbed
from ..calibration.samples import DELAY, read_samples, require_samples
from ..calibration.statistics import require_finite, unpadded_inputs, unpadded_outputs
from ..distributed.processes import sum_over_processes_
from ..weights.targets import Target
from .stages import Stages

_BAND = 512  # Rows of second moments that are computed at a time, from their first diagonal element to the right.


class SecondMoments:
    """`X Xᵀ` of a target's inputs `X`, for each of its parts.

    Args:
        model: The model, unwrapped.
        target: The target.

    Attributes:
        sums: `[parts, fan_in, fan_in]`, in float32 or better; whole once `finish_` was called.
        totals: `[parts, fan_in]`: the sum of the columns of `X`.
        positions: `[parts]`: over how many columns of `X`.
        cross: `[parts, fan_in, rows]`: `X Δᵀ`, where `Δ` is the dense model's residual stream minus the current one,
            right behind the target; None if nobody asked, or if its output is added to nothing.
        differences: `[parts, rows]`: the sum of the columns of `Δ`.
    """

    def __init__(self, model: nn.Module, target: Target, *, with_dense: bool = False) -> None:
        self._model, self._target, device = model, target, target.weight.device
        size = torch.Size([target.parts, target.fan_in, target.fan_in])
        self.sums = torch.zeros(size, device=device, dtype=compute_dtype(target))
        self.totals = self.sums.new_zeros(size[:2])
        self.positions = torch.zeros(target.parts, device=device, dtype=torch.int64)
        rows = target.weight.numel() // (target.parts * target.fan_in)
        self.cross = self.sums.new_zeros(target.parts, target.fan_in, rows) if with_dense else None
        self.differences = self.sums.new_zeros(target.parts, rows)
        self._unknown = torch.zeros((), device=device)
        self._bands = [slice(start, start + _BAND) for start in range(0, target.fan_in, _BAND)]

    def add_(self, product: Product, batch: Batch) -> Callable[[torch.Tensor | None], None]:
        """Adds the inputs of a product; what is given back adds the difference that goes with them."""
        x = unpadded_inputs(product, batch, self._model).to(self.sums.dtype)
        self.positions[product.part_slice] += x.shape[1]
        self.totals[product.part_slice] += x.sum(1)
        for here in self._bands:  # They are symmetric, and what is to their left need not be computed.
            on = slice(here.start, None)
            self.sums[product.part_slice, here, on].baddbmm_(x[..., here].mT, x[..., on])
        x = x.clone() if self.cross is not None else x  # The model may go on to change it in place.

        def add_difference_(difference: torch.Tensor | None) -> None:
            if self.cross is None or difference is None:
                self._unknown += 1
                return
            values = unpadded_outputs(difference, product, batch, self._model).to(x.dtype)
            self.differences[product.part_slice] += values.sum(1)
            self.cross[product.part_slice].baddbmm_(x.mT, values)

        return add_difference_

    def finish_(self) -> None:
        """Adds up what all processes have seen; raises if it is not finite."""
        self.sums, self.totals = sum_over_processes_(self.sums), sum_over_processes_(self.totals)
        self.positions = sum_over_processes_(self.positions)
        if self.cross is not None:
            self.cross, self.differences = sum_over_processes_(self.cross), sum_over_processes_(self.differences)
            # A stream may overflow where the model itself does not, as where it is clamped afterwards.
            if sum_over_processes_(self._unknown) or not self.cross.isfinite().all():
                self.cross = None
        for here in self._bands:
            behind = slice(here.stop, None)
            self.sums[:, behind, here] = self.sums[:, here, behind].mT
        require_finite(self.sums, f"what {self._target.module!r} is multiplied with")


def change_in_stages_(
    model: nn.Module,
    targets: Mapping[str, Target],
    batches: Iterable[Batch],
    samples: int,
    change_: Callable[[Sequence[str], SecondMoments | None], None],
    *,
    with_dense: bool = False,
    show_progress: bool = False,
) -> None:
    """Changes weights by the second moments of their inputs, in the order of a forward pass.

    A layer sees the inputs that the changed layers before it give. In memory are the second moments of one target
    (fused experts have some each), and the outputs of finished blocks, and of finished parts of others, that later
    passes still read.

    Args:
        model: The model, unwrapped; called as a calibration calls it.
        targets: The weights.
        batches: What the model is called with, as `read_samples` takes them.
        samples: Number of samples to read, of all processes together.
        change_: Gets the names of targets with the same inputs, and their moments; of a target that no pass has used
            None, before all others.
        with_dense: Whether the moments say how far the residual stream is from that of the dense model, which is the
            model as it is now. Another pass goes through each layer for it.
        show_progress: Whether a bar shows how far it is, if it takes more than a few seconds.

    Raises:
        ValueError: if there are no samples, or activations are not finite (the message names the module).
    """
    with undisturbed(model), eager_experts(model), _in_full_precision():
        data = list(read_samples(model, batches, samples))
        require_samples(model, sum(map(size_of, data)), samples)
        with Stages(model, targets, data, with_dense=with_dense) as stages:
            for name in stages.unused:
                change_([name], None)
            for stage in tqdm(stages.order, desc="Pruning", unit="layer", delay=DELAY, disable=not show_progress):
                moments = SecondMoments(model, targets[stage.names[0]], with_dense=with_dense)
                if with_dense:
                    stages.run_beside_dense(stage, moments.add_)
                else:
                    stages.run(stage, moments.add_)
                moments.finish_()
                change_(stage.names, moments)
                del moments  # Before there are others.
                stages.finish(stage)


def compute_dtype(target: Target) -> torch.dtype:
    """The dtype in which a target is changed: float32 or better."""
    return torch.promote_types(target.weight.dtype, torch.float32)


@contextlib.contextmanager
def _in_full_precision() -> Iterator[None]:
    """Matrix products of float32 in float32, whatever is set for the training."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
