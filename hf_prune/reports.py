"""Reports: how sparse a model is, and how it became so."""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import overload

import torch
from torch import nn

from .access import accessible
from .config import PruningConfig
from .costs import Cost
from .masks import masked_in
from .processes import sum_over_processes_
from .shards import is_sharded, own
from .structures.finding import find_places
from .structures.members import Place, kept_in, nonzeros, parameters_of
from .tables import table
from .targets import find_targets

HISTORY_NAME = "pruning_history.json"
PLOT_NAME = "pruning.png"


@dataclass(frozen=True)
class ModuleSparsity:
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

    @property
    def sparsity(self) -> float:
        """Fraction of the weights that are zero."""
        return self.zeros / max(self.total, 1)


@dataclass(frozen=True)
class StructureSparsity:
    """One row of a `SparsityReport` of whole structures.

    Attributes:
        name: The module that they are in.
        kind: "head", "neuron", "channel" or "layer".
        zeros: Number of structures of which all is zero.
        total: Number of structures.
        masked: Number of structures of which a mask holds all at zero, None where no mask is known.
    """

    name: str
    kind: str
    zeros: int
    total: int
    masked: int | None = None

    @property
    def sparsity(self) -> float:
        """Fraction of the structures of which all is zero."""
        return self.zeros / self.total


@dataclass(frozen=True)
class SparsityReport:
    """How sparse a model is. Prints as a table.

    Attributes:
        modules: A row for each targeted weight; where whole structures go, for each parameter that they own a part of.
        model_zeros: Number of zeros among all parameters of the model.
        model_total: Number of all parameters of the model.
        structures: A row for the structures of each place, where the granularity is one of structures.
    """

    modules: tuple[ModuleSparsity, ...]
    model_zeros: int
    model_total: int
    structures: tuple[StructureSparsity, ...] = ()

    @property
    def _rows(self) -> Sequence[ModuleSparsity | StructureSparsity]:
        return self.structures or self.modules

    @property
    def units(self) -> str:
        """What is counted: weights, or structures where whole ones go."""
        return " and ".join(f"{kind}s" for kind in dict.fromkeys(row.kind for row in self.structures)) or "weights"

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
        }

    def __str__(self) -> str:
        if self.structures:
            rows = [["place", "structures", "zeros", "sparsity"]]
            rows += [[s.name, f"{s.total:,} {s.kind}s", f"{s.zeros:,}", f"{s.sparsity:.4f}"] for s in self.structures]
            rows += [[f"all {self.units}", f"{self.total:,}", f"{self.zeros:,}", f"{self.sparsity:.4f}"]]
        else:
            rows = [["module", "shape", "zeros", "sparsity"]]
            rows += [
                [m.name, " x ".join(map(str, m.shape)), f"{m.zeros:,}", f"{m.sparsity:.4f}"] for m in self.modules
            ]
            rows += [["targets", f"{self.total:,}", f"{self.zeros:,}", f"{self.sparsity:.4f}"]]
        rows += [["whole model", f"{self.model_total:,}", f"{self.model_zeros:,}", f"{self.model_sparsity:.4f}"]]
        text = table(rows, rules=(1, len(rows) - 2))
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
        ValueError: as `find_targets` and `find_places` do.
    """
    with accessible(model):
        places: dict[str, Place] = {}
        names: Iterable[str] = () if masks is None else masks
        if masks is None or config is not None:
            targets = find_targets(model, *((config.target_modules, config.exclude_modules) if config else ()))
            places = find_places(model, config, targets) if config else {}
            names = (parameters_of(places) or targets) if masks is None else masks
        alive, kept = (kept_in(places, values) for values in (nonzeros(places), masks or {}))
        rows_of_places = tuple(
            StructureSparsity(
                name,
                place.kind,
                zeros=int((~alive[name]).sum()),
                total=place.count,
                masked=None if masks is None else int((~kept[name]).sum()),
            )
            for name, place in places.items()
        )
        zeros = _zeros_of(list(model.parameters()))
        rows = []
        for name in names:
            weight = model.get_parameter(name)
            masked = None if masks is None else masked_in(masks[name])
            shape = tuple(weight.shape)
            rows.append(ModuleSparsity(name.removesuffix(".weight"), shape, zeros[id(weight)], weight.numel(), masked))
        total = sum(weight.numel() for weight in model.parameters())
        return SparsityReport(tuple(rows), sum(zeros.values()), total, rows_of_places)


def _zeros_of(weights: Sequence[torch.Tensor]) -> dict[int, int]:
    """The number of zeros of each tensor, by its id; of sharded ones on all processes together."""
    counts = torch.tensor([own(weight).numel() - int(own(weight).count_nonzero()) for weight in weights])
    sharded = torch.tensor([is_sharded(weight) for weight in weights])
    if sharded.any():
        everywhere = sum_over_processes_(counts.to(own(weights[0]).device)).cpu()
        counts = torch.where(sharded, everywhere, counts)
    return {id(weight): count for weight, count in zip(weights, counts.tolist(), strict=True)}


@dataclass
class Round:
    """What one round asked for, reached and cost.

    Attributes:
        round: Its number, from 1; 0 is the zeros that were held from the start.
        step: Number of optimizer steps finished when the cut was made.
        asked: Sparsity asked for; None for round 0.
        reached: Sparsity of the masks after the cut.
        masked: Number of weights masked away; of structures, where whole ones go.
        zeros: Number of targeted weights that are zero after the cut, above `masked` by those that are zero anyway; of
            structures of which all is zero, where whole ones go.
        total: Number of targeted weights; of structures, where whole ones go.
        criterion: What scores the weights; in round 0 nothing did.
        after_cut: The metric right after the cut; None if nothing measured it.
        best: The best value of the metric in the round; None without an evaluation.
        best_step: Number of optimizer steps finished at the best value.
        last: The last value of the metric in the round; None without an evaluation.
        ended: Why the round ended: one of the words of `hf_prune.pacing`, or "stopped" if something else stopped the
            training; None while it goes on.
        steps: Number of optimizer steps in the round.
        samples: Number of training samples in the round: steps times batch size times accumulation times processes, as
            if the last step of an epoch were as full as the others.
        tokens: Number of input tokens in the round, None unless the training arguments count them.
        evaluations: Number of evaluations in the round, the one right after the cut left out.
        seconds: Wall-clock time of the round, evaluations included.
    """

    round: int
    step: int
    asked: float | None
    reached: float
    masked: int
    zeros: int
    total: int
    criterion: str
    after_cut: float | None = None
    best: float | None = None
    best_step: int | None = None
    last: float | None = None
    ended: str | None = None
    steps: int = 0
    samples: int = 0
    tokens: int | None = None
    evaluations: int = 0
    seconds: float = 0.0


@dataclass
class PruningHistory(Sequence[Round]):
    """The rounds of a run, in order. Prints as a table.

    Attributes:
        metric: Name of the metric that `dense`, `after_cut`, `best` and `last` give.
        asked: The sparsity that each round was to reach, those included that the run did not get to.
        greater_is_better: Which way the metric improves.
        ended: Why the run ended, in the words of the last round; None while it goes on.
        dense: The metric before any weight was masked; None if nothing measured it, or zeros were held from the start.
        evaluations: `(step, value)` of each evaluation of the run, those right after a cut left out.
        rounds: The rounds.
        language_model: Whether the model generates text, so that the exponential of its loss is a perplexity.
        costs: What a forward pass over a training batch takes with masked structures ("masked", as much as the dense
            model) and right afterwards without them ("shrunk"); empty if nothing was removed.
    """

    metric: str = "eval_loss"
    greater_is_better: bool = False
    asked: list[float] = field(default_factory=list)
    ended: str | None = None
    dense: float | None = None
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    language_model: bool = False
    costs: dict[str, Cost] = field(default_factory=dict)

    @overload
    def __getitem__(self, index: int) -> Round: ...
    @overload
    def __getitem__(self, index: slice) -> list[Round]: ...
    def __getitem__(self, index: int | slice) -> Round | list[Round]:
        return self.rounds[index]

    def __len__(self) -> int:
        return len(self.rounds)

    def gain(self, value: float, over: float | None) -> float:
        """By how much a value of the metric improves on another.

        Args:
            value: The metric.
            over: What it is compared with; None if there is nothing yet.

        Returns:
            The improvement: above zero if `value` is better, infinity over None, NaN if `value` is.
        """
        if math.isnan(value) or over is None:
            return math.nan if math.isnan(value) else math.inf
        return value - over if self.greater_is_better else over - value

    def to_dict(self) -> dict[str, object]:
        """The history as JSON primitives."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> "PruningHistory":
        """The inverse of `to_dict`."""
        rounds = [Round(**row) for row in values["rounds"]]  # type: ignore[attr-defined]
        evaluations = [tuple(pair) for pair in values["evaluations"]]  # type: ignore[attr-defined]
        costs = {name: Cost(**cost) for name, cost in values.get("costs", {}).items()}  # type: ignore[attr-defined]
        return cls(**{**values, "rounds": rounds, "evaluations": evaluations, "costs": costs})  # type: ignore[arg-type]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the history as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PruningHistory":
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not a history.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a pruning history ({error!r}).") from error

    def __str__(self) -> str:
        columns = {
            "round": ["dense", *(str(row.round) for row in self)],
            "step": ["", *(str(row.step) for row in self)],
            "sparsity": [f"{0:.4f}", *(f"{row.reached:.4f}" for row in self)],
            f"{self.metric} after the cut": [_number(self.dense), *(_number(row.after_cut) for row in self)],
            "best": ["", *(_number(row.best) for row in self)],
            "last": ["", *(_number(row.last) for row in self)],
        }
        # Where only the loss is known, its exponential is shown too, and marked for what it is.
        if exponential := self.language_model and self.metric == "eval_loss":
            losses = [self.dense, *(row.last for row in self)]
            columns["exp(last)*"] = [_number(None if x is None else perplexity_from_loss(x)) for x in losses]
        if any(row.ended not in (None, "planned", "max_steps") for row in self):
            columns["ended"] = ["", *(row.ended or "" for row in self)]
        lines = [table([list(columns), *zip(*columns.values(), strict=True)], rules=(1,))]
        if exponential:
            lines.append("* the exponential of a mean of batch means, not weighted by tokens")
        if savings := self.savings():
            lines.append(savings)
        if shortfall := self.shortfall():
            lines.append(shortfall)
        return "\n".join(lines)

    def savings(self) -> str | None:
        """A sentence that says what was saved where structures were removed; None if none were."""
        if not self.costs:
            return None
        masked, shrunk = self.costs["masked"], self.costs["shrunk"]
        sentence = f"Shrunk from {masked.parameters:,} to {shrunk.parameters:,} parameters"
        if masked.flops is None or shrunk.flops is None:
            return f"{sentence}."
        return f"{sentence}, and from {masked.flops / 1e9:.3g} to {shrunk.flops / 1e9:.3g} GFLOPs for a batch."

    def shortfall(self) -> str | None:
        """A sentence that says by how much a run that has ended missed its target; None if it did not."""
        done, reached = (self[-1].round, self[-1].reached) if self else (0, 0.0)
        if self.ended is None or done >= len(self.asked):
            return None
        return (
            f"Training ended after round {done} of {len(self.asked)}: the sparsity is {reached:.4f}, "
            f"not the {self.asked[-1]:.4f} asked for."
        )

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws sparsity and metric against steps into an image file.

        Args:
            path: Where to; the suffix says the format, such as `.png`.

        Raises:
            ModuleNotFoundError: if matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("plots need matplotlib: pip install matplotlib.") from error
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        end = max([step for step, _ in self.evaluations] + [row.step + row.steps for row in self] + [1])
        if self.dense is not None:
            axes[0].axhline(self.dense, color="gray", linestyle="--", label="dense")
        if self.evaluations:
            axes[0].plot(*zip(*self.evaluations, strict=True), color="C0", marker=".", label="while training")
        if cuts := [(row.step, row.after_cut) for row in self if row.after_cut is not None]:
            axes[0].plot(*zip(*cuts, strict=True), color="C3", marker="v", linestyle="", label="right after a cut")
        axes[0].set_ylabel(self.metric)
        values = [v for v in (self.dense, *(v for _, v in self.evaluations), *(v for _, v in cuts)) if v and v > 0]
        if values and max(values) > 20 * min(values):
            axes[0].set_yscale("log")
        if axes[0].get_legend_handles_labels()[0]:
            figure.legend(loc="outside upper center", ncols=3)
        steps = [0, *(row.step for row in self), end]
        sparsity = [0.0, *(row.reached for row in self)]
        axes[1].stairs(sparsity, steps, color="C1", baseline=None)
        axes[1].set(xlabel="step", ylabel="sparsity", ylim=(0, 1))
        for axis in axes:
            for row in self:
                axis.axvline(row.step, color="lightgray", linewidth=0.8, zorder=0)
        figure.savefig(path, dpi=150)


def plot_beside(history: PruningHistory, folder: Path) -> None:
    """Draws a history into the folder of its model, if there is something to draw, and something to draw with."""
    if history and find_spec("matplotlib") is not None:
        history.plot(folder / PLOT_NAME)


def perplexity_from_loss(loss: float) -> float:
    """`exp(loss)`, or infinity where that overflows.

    Trainer's `eval_loss` is a mean of batch means, so its exponential is not weighted by tokens: a token of a short
    batch counts more than one of a long batch. Prefer `hf_prune.metrics.perplexity_metrics` where the model can be
    evaluated.
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if abs(value) >= 1000 else f"{value:.4f}"
