"""Reports: how sparse a model is."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..config import PruningConfig
from ..distributed.gathering import accessible
from ..distributed.processes import sum_over_processes_
from ..distributed.shards import is_sharded, own
from ..plan import resolve
from ..structures.budgets import Remaining
from ..structures.groups import KINDS, NO_STRUCTURES, Structures, in_layers_that_stay, kept_in, nonzeros, parameters_of
from ..weights.masks import masked_in
from ..weights.targets import find_targets
from .plots import Drawn, figure_of_modules
from .tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Counted:
    """What has a number of `zeros`, of a `total`."""

    @property
    def sparsity(self: Any) -> float:
        """Fraction of the total that is zero."""
        return self.zeros / max(self.total, 1)


@dataclass(frozen=True)
class ModuleSparsity(Counted):
    """One row of a `SparsityReport`.

    Attributes:
        name: The module (for fused experts, the parameter).
        shape: The weight's shape.
        zeros: Number of weights that are zero.
        total: Number of weights.
        masked: Number of weights that a mask holds at zero, None where no mask is known. Zeros beyond it, of a
            layer that was initialised with zeros for example, are free to become something else.
    """

    name: str
    shape: tuple[int, ...]
    zeros: int
    total: int
    masked: int | None = None


@dataclass(frozen=True)
class StructureSparsity(Counted):
    """One row of a `SparsityReport` of whole structures.

    Attributes:
        name: The module that they are in.
        kind: One of `hf_prune.structures.groups.KINDS`.
        zeros: Number of structures of which all is zero.
        total: Number of structures.
        masked: Number of structures of which a mask holds all at zero, None where no mask is known.
    """

    name: str
    kind: str
    zeros: int
    total: int
    masked: int | None = None


def structure_rows(structures: Iterable[StructureSparsity]) -> list[list[str]]:
    """Structures as cells, the head of the table first."""
    rows = [["place", "structures", "zeros", "sparsity"]]
    return rows + [[s.name, f"{s.total:,} {KINDS[s.kind]}", f"{s.zeros:,}", f"{s.sparsity:.4f}"] for s in structures]


@dataclass(frozen=True)
class SparsityReport(Drawn):
    """How sparse a model is. Prints as a table.

    Attributes:
        modules: A row for each targeted weight; where whole structures go, for each parameter that they own a part of.
        model_zeros: Number of zeros among all parameters of the model.
        model_total: Number of all parameters of the model.
        structures: A row for the structures of each group, where the granularity is one of structures.
        remaining: What remains once shrunk, where a share to keep was given.
    """

    modules: tuple[ModuleSparsity, ...]
    model_zeros: int
    model_total: int
    structures: tuple[StructureSparsity, ...] = ()
    remaining: Remaining | None = None

    @property
    def _rows(self) -> Sequence[ModuleSparsity | StructureSparsity]:
        return self.structures or self.modules

    @property
    def units(self) -> str:
        """What is counted: weights, or structures where whole ones go."""
        return " and ".join(KINDS[kind] for kind in dict.fromkeys(row.kind for row in self.structures)) or "weights"

    @property
    def zeros(self) -> int:
        """Number of units that are zero."""
        return sum(row.zeros for row in self._rows)

    @property
    def total(self) -> int:
        """Number of units."""
        return sum(row.total for row in self._rows)

    @property
    def masked(self) -> int | None:
        """Number of units that a mask holds at zero, None where no mask is known."""
        counts = [row.masked for row in self._rows if row.masked is not None]
        return sum(counts) if len(counts) == len(self._rows) else None

    @property
    def sparsity(self) -> float:
        """Fraction of the units that are zero."""
        return self.zeros / max(self.total, 1)

    @property
    def model_sparsity(self) -> float:
        """Fraction of all parameters that are zero: embeddings, heads, norms and biases included."""
        return self.model_zeros / max(self.model_total, 1)

    def to_dict(self) -> dict[str, object]:
        """The report as JSON primitives."""
        return {
            "sparsity": self.sparsity,
            "zeros": self.zeros,
            "masked": self.masked,
            "total": self.total,
            "model_sparsity": self.model_sparsity,
            "model_zeros": self.model_zeros,
            "model_total": self.model_total,
            "modules": [
                {**dataclasses.asdict(m), "shape": list(m.shape), "sparsity": m.sparsity} for m in self.modules
            ],
            "structures": [{**dataclasses.asdict(row), "sparsity": row.sparsity} for row in self.structures],
            "remaining": self.remaining and dataclasses.asdict(self.remaining),
        }

    def figure(self) -> "Figure":
        """The sparsity of each row: a column for each layer of the model."""
        return figure_of_modules({row.name: row.sparsity for row in self._rows})

    def __str__(self) -> str:
        if self.structures:
            rows = structure_rows(self.structures)
            rows += [[f"all {self.units}", f"{self.total:,}", f"{self.zeros:,}", f"{self.sparsity:.4f}"]]
        else:
            rows = [["module", "shape", "zeros", "sparsity"]]
            rows += [
                [m.name, " x ".join(map(str, m.shape)), f"{m.zeros:,}", f"{m.sparsity:.4f}"] for m in self.modules
            ]
            rows += [["targets", f"{self.total:,}", f"{self.zeros:,}", f"{self.sparsity:.4f}"]]
        rows += [["whole model", f"{self.model_total:,}", f"{self.model_zeros:,}", f"{self.model_sparsity:.4f}"]]
        text = table(rows, rules=(1, len(rows) - 2))
        if self.remaining is not None:
            text += f"\n{self.remaining}"
        beyond = 0 if self.masked is None else self.zeros - self.masked
        if beyond > 0:
            text += f"\n{beyond:,} of the zeros are not pruned: they were zero before."
        elif beyond < 0:
            text += f"\nAt least {-beyond:,} masked weights are not zero. Set them to zero with MaskSet.apply_."
        return text


@torch.no_grad()
def sparsity_report(
    model: nn.Module, config: PruningConfig | None = None, masks: Mapping[str, torch.Tensor] | None = None
) -> SparsityReport:
    """Counts the zeros of a model.

    Args:
        model: The model, unwrapped.
        config: Its `target_modules` and `exclude_modules` say which weights are targets, the default ones if None; its
            granularity says whether structures are counted.
        masks: Masks by parameter name, to tell zeros that are held from others. The targets are then theirs.

    Returns:
        The report.

    Raises:
        ValueError: as `find_targets` and `Granularity.find` do.
    """
    with accessible(model):
        structures = NO_STRUCTURES
        names: Iterable[str] = () if masks is None else masks
        if masks is None or config is not None:
            targets = find_targets(model, *((config.target_modules, config.exclude_modules) if config else ()))
            structures = resolve(config).granularity.find(model, targets) if config else NO_STRUCTURES
            names = (parameters_of(structures) or targets) if masks is None else masks
        return count_zeros(model, names, structures, masks)


@torch.no_grad()
def count_zeros(
    model: nn.Module, names: Iterable[str], structures: Structures, masks: Mapping[str, torch.Tensor] | None = None
) -> SparsityReport:
    """Counts the zeros of some parameters, of structures, and of a whole model whose parameters can be looked at."""
    alive, kept = (kept_in(structures, values) for values in (nonzeros(structures), masks or {}))
    # What is in a layer that goes is counted with the layer.
    counted = in_layers_that_stay(structures, alive if masks is None else kept)
    rows_of_structures = tuple(
        StructureSparsity(
            name,
            group.kind,
            zeros=int((~alive[name]).sum()),
            total=group.count,
            masked=None if masks is None else int((~kept[name]).sum()),
        )
        for name, group in structures.items()
        if name in counted
    )
    zeros = _zeros_of(list(model.parameters()))
    rows = []
    for name in names:
        weight = model.get_parameter(name)
        masked = None if masks is None else masked_in(masks[name])
        shape = tuple(weight.shape)
        rows.append(ModuleSparsity(name.removesuffix(".weight"), shape, zeros[id(weight)], weight.numel(), masked))
    total = sum(weight.numel() for weight in model.parameters())
    return SparsityReport(tuple(rows), sum(zeros.values()), total, rows_of_structures)


def _zeros_of(weights: Sequence[torch.Tensor]) -> dict[int, int]:
    """The number of zeros of each tensor, by its id; of sharded ones on all processes together."""
    counts = torch.tensor([own(weight).numel() - int(own(weight).count_nonzero()) for weight in weights])
    sharded = torch.tensor([is_sharded(weight) for weight in weights])
    if sharded.any():
        everywhere = sum_over_processes_(counts.to(own(weights[0]).device)).cpu()
        counts = torch.where(sharded, everywhere, counts)
    return {id(weight): count for weight, count in zip(weights, counts.tolist(), strict=True)}
