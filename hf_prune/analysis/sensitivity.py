"""Sensitivity: one place after the other is pruned alone, measured, and put back."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn
from transformers.utils.logging import tqdm

from ..calibration.batches import Batch, size_of
from ..calibration.contexts import undisturbed
from ..calibration.passes import loss_of
from ..calibration.samples import DELAY, CalibrationData, read_samples, repeatable, require_samples
from ..calibration.saved_statistics import CalibrationStatistics
from ..calibration.statistics import LabelCounts
from ..config import PruningConfig
from ..distributed.processes import sum_over_processes_
from ..distributed.shards import has_shards
from ..distributed.zero import has_partitions
from ..plan import Plan
from ..pruning import cut_, for_samples, statistics_for
from ..reconstruction.compensation import solved_by_compensation
from ..selection.whole_structures import COUNTED_IN_MULTIPLES, MULTIPLE_OF, ONE_POOL
from ..structures.experts import bar_pruned_
from ..structures.groups import KINDS, kinds_of
from ..structures.ranking import require_attainable
from ..structures.routing import bars_any, unbar_
from ..weights.masks import MaskSet
from .report import Sensitivity, SensitivityReport

LEVELS = (0.25, 0.5, 0.75)

Metric = Callable[[nn.Module], float]
"""Maps a model to a number."""


def sensitivity(
    model: nn.Module,
    config: PruningConfig,
    dataloader: Iterable[Batch],
    *,
    levels: Sequence[float] = LEVELS,
    metric: Metric | None = None,
    greater_is_better: bool = False,
    statistics: CalibrationStatistics | None = None,
    seed: int = 0,
) -> SensitivityReport:
    """Measures what each place of a model costs if it alone is pruned, and each kind.

    A place is a weight, or the structures of one kind in one module, such as the neurons of a layer. Each number is
    that of the model which `prune` makes with `sparsity=0` and `layer_sparsity={place: level}`, to the last bit; of a
    kind it is that of all its places at the level. It takes one calibration, and one measurement for each number and
    one for the dense model. Where so much of a place cannot go, or the metric is not finite, there is no number.

    Args:
        model: The model, unwrapped and dense; it is left as it was.
        config: Granularity, criterion, scope and targets; how much it prunes does not matter.
        dataloader: Batches, as for `prune`; the first `config.calibration_samples` samples are read. They calibrate,
            and without a `metric` it is on them that the loss is measured.
        levels: The sparsities, rising, in `(0, 1)`.
        metric: Measures the model in evaluation mode. By default the mean loss over labels.
        greater_is_better: Whether it rises as the model gets better.
        statistics: What `collect_statistics` has found out about this model.
        seed: For criteria that draw random numbers.

    Returns:
        The report.

    Raises:
        ValueError: if there is no dataloader, if levels do not rise between 0 and 1, if the config has no levels to
            choose (N:M) or wants layers to be equal (`uniform`), if parameters are sharded, if the metric of the dense
            model is not finite; or as `prune` does.
    """
    levels = tuple(float(level) for level in levels)
    if not levels or list(levels) != sorted(set(levels)) or not 0 < levels[0] <= levels[-1] < 1:
        raise ValueError(f"levels must rise between 0 and 1, got {', '.join(map(str, levels)) or 'none'}.")
    if dataloader is None:
        raise ValueError("sensitivity is measured on samples. Give a dataloader.")
    if has_shards(model) or has_partitions(model):
        raise ValueError("sensitivity cuts whole models. Measure it on one process, before training.")
    sweep = _Sweep(model, _at_zero_sparsity(config), dataloader, statistics, seed)
    measure = metric or sweep.loss
    name_of_metric = getattr(measure, "__name__", type(measure).__name__)
    dense = sweep.measured(measure)
    if dense is None:
        raise ValueError(
            f"{name_of_metric} of the dense model is not finite, so that nothing can be compared with it."
        )
    places, kinds = sweep.places(), sweep.kinds()
    rows = []
    total = len(levels) * (len(places) + len(kinds))
    with tqdm(total=total, desc="Measuring sensitivity", unit="cut", delay=DELAY) as bar:
        for row, is_kind in [*((place, False) for place in places), *((kind, True) for kind in kinds)]:
            name, names, count = row
            values: list[float | None] = []
            for level in levels:
                value = None
                if sweep.can_cut(names, level):
                    with sweep.cut(names, level):
                        value = sweep.measured(measure)
                values.append(value)
                bar.update()
            rows.append(Sensitivity(name, count, tuple(values), is_kind))
    return SensitivityReport(
        name_of_metric, greater_is_better, dense, levels, tuple(rows), config.granularity, sweep.plan.criterion_name
    )


_OF_SCORES = (
    "criterion",
    "granularity",
    "scope",
    "calibration_samples",
    "target_modules",
    "exclude_modules",
    "multiple_of",
    "reconstruct",
)
"""What of a config says how a place is pruned, and not how far or when."""

_Row = tuple[str, tuple[str, ...], int]
"""What it is called, the targets or groups of structures that are cut, and how large they are."""


class _Sweep:
    """Cuts of one model, each undone after it."""

    def __init__(
        self,
        model: nn.Module,
        config: PruningConfig,
        dataloader: Iterable[Batch],
        statistics: CalibrationStatistics | None,
        seed: int,
    ) -> None:
        self._model, self._config, self._seed = model, config, seed
        data = CalibrationData(repeatable(dataloader), {} if statistics is None else statistics.of_model(model))
        self.plan = for_samples(model, Plan.of(model, config, seed=seed), data)
        samples = config.calibration_samples
        self._samples = list(read_samples(model, dataloader, samples))
        require_samples(model, sum(map(size_of, self._samples)), samples)
        self._data = dataclasses.replace(data, known=statistics_for(model, self.plan, data))
        self._labels = LabelCounts(model)
        self._before = {name: tensor.detach().cpu().clone() for name, tensor in self._changing().items()}

    def _changing(self) -> dict[str, torch.Tensor]:
        """What a cut may change, by name."""
        plan, changed = self.plan, dict(self.plan.parameters)
        changed |= {name: target.weight for name, target in plan.targets.items()} if plan.reconstructs else {}
        if plan.compensates:
            names: dict[torch.Tensor, str] = {parameter: name for name, parameter in self._model.named_parameters()}
            solved = solved_by_compensation(self._model, plan.targets, plan.structures)
            changed |= {names[each]: each for each in solved}
        return changed

    def places(self) -> list[_Row]:
        """What can have a sparsity of its own."""
        if set(self.plan.granularity.kinds) and set(self.plan.granularity.kinds) <= ONE_POOL:
            return []
        modules, _ = self.plan.granularity.named(self.plan.targets, self.plan.structures)
        groups = self.plan.structures
        return [
            (module, (name,), groups[name].count if groups else self.plan.targets[name].weight.numel())
            for name, module in modules.items()
            if not groups or groups[name].kind not in ONE_POOL
        ]

    def kinds(self) -> list[_Row]:
        """All of each kind: of structures, or of modules that are called alike."""
        groups, places, found = self.plan.structures, self.places(), dict[str, list[_Row]]()
        for place in places:
            of_kind = KINDS[groups[place[1][0]].kind] if groups else place[0].rpartition(".")[2]
            found.setdefault(of_kind, []).append(place)
        rows = [
            (f"all {kind}", tuple(row[1][0] for row in rows), sum(row[2] for row in rows))
            for kind, rows in found.items()
            if len(rows) > 1
        ]
        one_pool = [kind for kind in kinds_of(groups) if kind in ONE_POOL]
        counts = {kind: sum(group.count for group in groups.values() if group.kind == kind) for kind in one_pool}
        return rows + [(f"all {KINDS[kind]}", (kind,), counts[kind]) for kind in one_pool]

    def can_cut(self, names: Sequence[str], level: float) -> bool:
        """Whether so much of some places can go: of structures some have to stay."""
        try:
            if set(names) <= ONE_POOL:
                self._plan_of_kind(names[0], level)
            for name in self.plan.structures.keys() & set(names):
                require_attainable({name: self.plan.structures[name]}, level, {})
        except ValueError:
            return False
        return True

    def _plan_of_kind(self, kind: str, level: float) -> Plan:
        multiple = self._config.multiple_of if kind in COUNTED_IN_MULTIPLES else MULTIPLE_OF
        config = dataclasses.replace(self._config, granularity=kind, sparsity=level, multiple_of=multiple)
        return Plan.of(self._model, config, seed=self._seed)

    def measured(self, measure: Metric) -> float | None:
        """What a metric says of the model as it is now, in evaluation mode; None if that is not finite."""
        with undisturbed(self._model):
            value = float(measure(self._model))
        return value if math.isfinite(value) else None

    @contextlib.contextmanager
    def cut(self, names: Sequence[str], level: float) -> Iterator[None]:
        """Has some places pruned to a level meanwhile, or all of a kind that is one pool."""
        plan, sparsity = dataclasses.replace(self.plan, own_sparsities=dict.fromkeys(names, level)), 0.0
        if set(names) <= ONE_POOL:
            plan, sparsity = self._plan_of_kind(names[0], level), level
        was_barred = bars_any(self._model)
        bar_pruned_(self._model, plan.structures)
        try:
            cut_(self._model, plan, MaskSet(), sparsity, self._data)
            yield
        finally:
            with torch.no_grad():
                for name, values in self._before.items():
                    parameter = self._model.get_parameter(name)
                    if not torch.equal(parameter.cpu(), values):
                        parameter.copy_(values)
            if not was_barred:
                unbar_(self._model)

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        """The mean loss over labels."""
        totals = torch.zeros(2, dtype=torch.float64, device=next(model.parameters()).device)
        for batch in self._samples:
            count = self._labels(batch).sum().double()
            totals += torch.stack([loss_of(model, batch).double() * count, count])
        total, count = sum_over_processes_(totals)
        return float(total / count)


def _at_zero_sparsity(config: PruningConfig) -> PruningConfig:
    """What a config says but for how much is pruned, which is nothing."""
    if config.uniform:
        raise ValueError("sensitivity prunes single layers, and uniform wants all to be equal. Leave uniform out.")
    blank = {field.name: field.default for field in dataclasses.fields(config)}
    try:
        return PruningConfig(**{**blank, **{name: getattr(config, name) for name in _OF_SCORES}, "sparsity": 0.0})
    except ValueError as error:
        if config.sparsity is None and ":" in config.granularity:
            raise ValueError(
                f"granularity {config.granularity!r} has one sparsity, and sensitivity tries several. Choose another "
                "granularity."
            ) from error
        raise
