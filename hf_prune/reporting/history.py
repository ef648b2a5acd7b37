"""History: the rounds of a run, as a table, a file and a plot."""

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from ..calibration.costs import Cost
from .plots import Drawn, figure_of_run
from .tables import number, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HISTORY_NAME = "pruning_history.json"


@dataclass
class Round:
    """What one round asked for, reached and cost.

    Attributes:
        round: Its number, from 1; 0 is the zeros that were held from the start.
        step: Number of optimizer steps finished when the cut was made.
        asked: Sparsity asked for, or the share of `measure` that was to be gone; None for round 0.
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
        ended: Why the round ended: one of the words of `hf_prune.pacing.patience`, or "stopped" if something else
            stopped the training; None while it goes on.
        steps: Number of optimizer steps in the round.
        samples: Number of training samples in the round: steps times batch size times accumulation times processes, as
            if the last step of an epoch were as full as the others.
        tokens: Number of input tokens in the round, None unless the training arguments count them.
        evaluations: Number of evaluations in the round, the one right after the cut left out.
        seconds: Wall-clock time of the round, evaluations included.
        shortfall: A sentence that says by how much the cut missed what was asked for; None if it did not.
        left: Share of the dense model's parameters, FLOPs or latency that is left, where such a share was asked for.
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
    shortfall: str | None = None
    left: float | None = None


@dataclass
class PruningHistory(Drawn, Sequence[Round]):
    """The rounds of a run, in order. Prints as a table.

    Attributes:
        metric: Name of the metric that `dense`, `after_cut`, `best` and `last` give.
        asked: The sparsity that each round was to reach, or the share of `measure` that was to be gone, those
            included that the run did not get to.
        greater_is_better: Which way the metric improves.
        ended: Why the run ended, in the words of the last round; None while it goes on.
        dense: The metric before any weight was masked; None if nothing measured it, or zeros were held from the start.
        evaluations: `(step, value)` of each evaluation of the run, those right after a cut left out.
        rounds: The rounds.
        language_model: Whether the model generates text, so that the exponential of its loss is a perplexity.
        costs: What a forward pass over a training batch takes with masked structures ("masked", as much as the dense
            model) and right afterwards without them ("shrunk"); empty if nothing was removed.
        measure: What `asked` is a share of: "parameters", "FLOPs" or "latency"; None where it is the sparsity.
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
    measure: str | None = None

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
        """The history as JSON primitives; what is not finite, which JSON has no numbers for, as "nan" or "inf"."""
        return _each(_as_json, dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> "PruningHistory":
        """The inverse of `to_dict`."""
        values = _each(_from_json, values)
        rounds = [Round(**row) for row in values["rounds"]]  # type: ignore[attr-defined]
        evaluations = [(step, value) for step, value in values["evaluations"]]  # type: ignore[attr-defined]
        costs = {name: Cost(**cost) for name, cost in values.get("costs", {}).items()}  # type: ignore[attr-defined]
        history = cls(**{**values, "rounds": rounds, "evaluations": evaluations, "costs": costs})  # type: ignore[arg-type]
        records: list[Round | Cost] = [*rounds, *costs.values()]
        for record in records:
            for field_ in dataclasses.fields(record):
                _require_kind(field_.name, getattr(record, field_.name), field_.type)
        _require_kind("metric", history.metric, str)
        _require_kind("dense", history.dense, float | None)
        _require_kind("ended", history.ended, str | None)
        _require_kind("measure", history.measure, str | None)
        for value in (*history.asked, *itertools.chain(*evaluations)):
            _require_kind("asked or evaluations", value, float)
        if costs and set(costs) != {"masked", "shrunk"}:
            raise ValueError(f"costs must be of masked and shrunk, got {', '.join(costs)}")
        return history

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
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a pruning history ({error!r}).") from error

    def __str__(self) -> str:
        columns = {
            "round": ["dense", *(str(row.round) for row in self)],
            "step": ["", *(str(row.step) for row in self)],
            "sparsity": [f"{0:.4f}", *(f"{row.reached:.4f}" for row in self)],
            **({f"{self.measure} left": [f"{1:.4f}", *(number(row.left) for row in self)]} if self.measure else {}),
            f"{self.metric} after the cut": [number(self.dense), *(number(row.after_cut) for row in self)],
            "best": ["", *(number(row.best) for row in self)],
            "last": ["", *(number(row.last) for row in self)],
        }
        # Where only the loss is known, its exponential is shown too, and marked for what it is.
        if exponential := self.language_model and self.metric == "eval_loss":
            losses = [self.dense, *(row.last for row in self)]
            columns["exp(last)*"] = [number(None if x is None else perplexity_from_loss(x)) for x in losses]
        if any(row.ended not in (None, "planned", "max_steps") for row in self):
            columns["ended"] = ["", *(row.ended or "" for row in self)]
        lines = [table([list(columns), *zip(*columns.values(), strict=True)], rules=(1,))]
        if exponential:
            lines.append("* the exponential of a mean of batch means, not weighted by tokens")
        return "\n".join(filter(None, [*lines, self.savings(), self.shortfall()]))

    def rows(self) -> list[list[str]]:
        """The rounds as cells: a head, a row for the dense model, and one for each round."""
        asked = ["asked", "reached"] if self.measure is None else [f"{self.measure} asked", "left", "sparsity"]
        rows = [["round", "step", *asked, f"{self.metric} after the cut", "best", "last", "ended"]]
        rows.append(["dense", "", *("" for _ in asked), number(self.dense), "", "", ""])
        for row in self:
            values = [row.asked, row.reached]
            if self.measure is not None:
                values = [None if row.asked is None else 1 - row.asked, row.left, row.reached]
            shares = ["" if value is None else f"{value:.4f}" for value in values]
            metrics = [number(value) for value in (row.after_cut, row.best, row.last)]
            rows.append([str(row.round), str(row.step), *shares, *metrics, row.ended or ""])
        return rows

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
        if self.ended is None:
            return None
        done, reached = (self[-1].round, self[-1].reached) if self else (0, 0.0)
        if done < len(self.asked):
            what, asked = "sparsity", self.asked[-1]
            if self.measure is not None:
                what, asked = f"share of {self.measure} that is left", 1 - asked
                reached = self[-1].left if self and self[-1].left is not None else 1.0
            return (
                f"Training ended after round {done} of {len(self.asked)}: the {what} is {reached:.4f}, "
                f"not the {asked:.4f} asked for."
            )
        return self[-1].shortfall if self else None

    def figure(self) -> "Figure":
        """Metric and sparsity against steps: cuts and the best of each round are marked."""
        return figure_of_run(
            self.metric,
            self.evaluations,
            dense=self.dense,
            after_cuts=[(row.step, row.after_cut) for row in self if row.after_cut is not None],
            bests=[(row.best_step, row.best) for row in self if row.best is not None and row.best_step is not None],
            sparsity=[(row.step, row.reached) for row in self],
            end=max([row.step + row.steps for row in self], default=0),
        )


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


def _require_kind(name: str, value: object, kind: Any) -> None:
    """Requires a value of a type, in JSON's sense: a whole number is a number, and a huge one is none."""
    if not isinstance(value, kind) and not (type(value) is int and isinstance(float(value), kind)):
        raise ValueError(f"{name} holds {value!r}")
    if isinstance(value, int):
        float(value)


_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def _as_json(value: object) -> object:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _from_json(value: object) -> object:
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


def _each(change: Callable[[object], object], value: Any) -> Any:
    """Nested lists and dicts, with each value in them changed."""
    if isinstance(value, Mapping):
        return {name: _each(change, each) for name, each in value.items()}
    return [_each(change, each) for each in value] if isinstance(value, (list, tuple)) else change(value)
