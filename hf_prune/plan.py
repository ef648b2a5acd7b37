"""The plan: what a config means for one model, resolved and checked once."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from .calibration.batches import Batch, is_batch
from .config import PruningConfig
from .criteria import RECONSTRUCTIONS, Statistics, magnitude, needs_of, scope_of
from .distributed.zero import has_partitions
from .granularities import parse as parse_granularity
from .recovery.lora import has_adapters, require_maskable_adapters
from .scopes import GLOBAL, SCOPES, Scope
from .selection.cuts import Cut, Quota
from .selection.granularity import Granularity
from .selection.scoring import AnyCriterion, Scorer, criterion_of, require_finite_weights, require_scorable
from .structures.budgets import Budget
from .structures.finding import held_zeros, zeros_of
from .structures.groups import Structures, parameters_of
from .weights.masks import MaskSet
from .weights.targets import Target, are_sharded, find_targets

_LEAST = 1e-9
"""A sparsity at which nothing goes yet, and at which it is asked whether anything can; at 0 it is not."""


@dataclass(frozen=True, eq=False)
class Settings:
    """What a config means for any model.

    Attributes:
        config: The config; what it says of time, of the optimizer and of what happens at the end is read there.
        granularity: What is removed together.
        scope: What competes with what.
        criterion: What a weight is worth; with a method that reconstructs, how sparse each layer is.
        criterion_name: The name of what scores the weights.
        reconstructs: Whether a method of `RECONSTRUCTIONS` prunes, which also changes the weights that it keeps.
        is_default: Whether nobody has chosen the criterion.
    """

    config: PruningConfig
    granularity: Granularity
    scope: Scope
    criterion: AnyCriterion
    criterion_name: str
    reconstructs: bool
    is_default: bool

    @property
    def needs(self) -> tuple[str, ...]:
        """The statistics that a cut reads."""
        scored = () if self.reconstructs and self.scope != GLOBAL else needs_of(self.criterion)
        return tuple(dict.fromkeys((*scored, *self.scope.needs)))

    @property
    def compensates(self) -> bool:
        """Whether what reads pruned structures is solved anew."""
        return self.config.reconstruct

    @property
    def looks_at_data(self) -> bool:
        """Whether a cut needs calibration samples."""
        is_measured = self.config.keep is not None and self.config.keep[0] != "parameters"
        return bool(self.needs) or self.reconstructs or self.compensates or is_measured


def resolve(config: PruningConfig, criterion: AnyCriterion | None = None) -> Settings:
    """Resolves the words of a config, whatever the model.

    Args:
        config: The config.
        criterion: A criterion in place of the config's.

    Raises:
        ValueError: if the criterion has declared a scope that there is not, or scores other structures.
    """
    granularity = parse_granularity(config.granularity, multiple_of=config.multiple_of, uniform=config.uniform)
    reconstructs = criterion is None and config.criterion in RECONSTRUCTIONS
    name, chosen = criterion_of(config.criterion, granularity.kinds)
    if criterion is not None:
        name, chosen = str(getattr(criterion, "__qualname__", type(criterion).__qualname__)), criterion
    require_scorable(name, chosen, granularity.kinds)
    auto = granularity.auto_scope(scope_of(chosen), reconstructs)
    scope = auto if config.scope == "auto" else config.scope
    if scope not in SCOPES:
        raise ValueError(f"the criterion {name} declares the scope {scope!r}; it must be one of {', '.join(SCOPES)}.")
    is_default = criterion is None and config.criterion == "auto"
    return Settings(config, granularity, SCOPES[scope] or GLOBAL, chosen, name, reconstructs, is_default)


@dataclass(frozen=True, eq=False)
class Plan(Settings):
    """What a config means for one model.

    Attributes:
        targets: Parameter name → target.
        structures: The structures that go as a whole; none where weights go.
        own_sparsities: Target or group of structures → its own final sparsity.
        seed: For criteria that draw random numbers.
    """

    targets: Mapping[str, Target]
    structures: Structures
    own_sparsities: Mapping[str, float]
    seed: int = 0

    @classmethod
    def of(
        cls, model: nn.Module, config: PruningConfig, criterion: AnyCriterion | None = None, *, seed: int = 0
    ) -> "Plan":
        """Resolves a config for a model, and checks that it can be pruned so.

        Args:
            model: The model, unwrapped; its parameters can be looked at.
            config: The config.
            criterion: A criterion in place of the config's.
            seed: For criteria that draw random numbers.

        Raises:
            ValueError: as `resolve` and `find_targets` do; if the granularity does not fit a shape, or the model's
                structures; if a pattern of `layer_sparsity` matches nothing; or if weights are sharded and whole ones
                are needed.
        """
        settings = resolve(config, criterion)
        granularity, targets = settings.granularity, find_targets(model, config.target_modules, config.exclude_modules)
        granularity.check(targets.values())
        if are_sharded(targets.values()) and (settings.reconstructs or granularity.needs_whole_weights):
            what = f"criterion {config.criterion!r}" if settings.reconstructs else f"granularity {str(granularity)!r}"
            raise ValueError(
                f"{what} needs whole weights, and FSDP has sharded them. Prune unstructured, N:M or in blocks by "
                "another criterion, or train with DistributedDataParallel."
            )
        structures = granularity.find(model, targets)
        plan = cls(
            config,
            granularity,
            settings.scope,
            settings.criterion,
            settings.criterion_name,
            settings.reconstructs,
            settings.is_default,
            targets,
            structures,
            _own_sparsities(config.own_sparsities, *granularity.named(targets, structures)),
            seed,
        )
        if config.round_sparsities:
            plan._require_prunable(model)
        return plan

    def _require_prunable(self, model: nn.Module) -> None:
        """Requires that the last cut can be made, as far as that can be told before samples are seen."""
        final, budget = self.config.round_sparsities[-1], None
        if self.config.keep is not None:
            if self.config.keep[0] == "parameters":
                budget = self.budget(model)
            else:
                final = min(final, _LEAST)  # What is measured is tried in the cut.
        self.granularity.require_prunable(model, self.cut(MaskSet(), final, budget=budget))

    def budget(self, model: nn.Module, batches: Callable[[], Iterable[Batch]] | None = None) -> Budget | None:
        """What users pay for; None if the config says how many structures go.

        Args:
            model: The model, unwrapped.
            batches: Gives batches, anew at each call. FLOPs and latency are measured with the first.

        Raises:
            ValueError: if these are to be measured without a batch, or cannot be on this model.
        """
        if self.config.keep is None:
            return None
        measure, _ = self.config.keep
        batch = None if batches is None or measure == "parameters" else next(iter(batches()), None)
        if batch is not None and not is_batch(batch):
            raise TypeError(f"batches must be dicts of tensors, with which the model is called; got {batch!r:.80}.")
        return Budget(model, measure, self.structures, batch)

    @property
    def uses_default_criterion(self) -> bool:
        """Whether the config leaves the criterion open, and what it then is looks at samples."""
        return self.is_default and bool(needs_of(self.criterion))

    @property
    def reads_labels(self) -> bool:
        """Whether the default criterion is the one for samples with labels."""
        return self.uses_default_criterion and self.criterion_name != self.without_labels().criterion_name

    def without_labels(self) -> "Plan":
        """The same with the default criterion for samples without labels."""
        return self._by(*criterion_of("auto", self.granularity.kinds, has_labels=False))

    def with_magnitude(self) -> "Plan":
        """The same with what is left where no samples can be looked at."""
        return self._by("magnitude", magnitude)

    def _by(self, name: str, criterion: AnyCriterion) -> "Plan":
        scope = self.scope
        if self.config.scope == "auto":
            scope = SCOPES[self.granularity.auto_scope(scope_of(criterion), False)] or GLOBAL
        return dataclasses.replace(self, criterion=criterion, criterion_name=name, scope=scope)

    @property
    def parameters(self) -> Mapping[str, torch.Tensor]:
        """What has a mask, by name: the targets, or all that structures own."""
        return parameters_of(self.structures) or {name: target.weight for name, target in self.targets.items()}

    def cut(
        self, masks: MaskSet, sparsity: float, statistics: Statistics | None = None, budget: Budget | None = None
    ) -> Cut:
        """What is decided in a cut from some masks to an absolute sparsity, or share of a budget that is gone."""
        final = self.config.round_sparsities[-1]
        progress = sparsity / final if final else 1.0
        own = {name: value * progress for name, value in self.own_sparsities.items()}
        scorer = Scorer(self.criterion, statistics or {}, self.seed)
        return Cut(self.targets, masks, sparsity, self.scope, own, scorer, self.structures, budget)

    @torch.no_grad()
    def next_masks(
        self, masks: MaskSet, sparsity: float, statistics: Statistics | None = None, budget: Budget | None = None
    ) -> MaskSet:
        """Scores, chooses and masks once, up to an absolute sparsity; the model is not touched.

        Args:
            masks: The masks so far, none before the first round; what they prune stays pruned, and counts.
            sparsity: In `[0, 1)`.
            statistics: What the criterion has declared to need.
            budget: What the sparsity is a share of, where it is not of weights or structures.

        Returns:
            A mask for each of `parameters`.

        Raises:
            ValueError: if a weight is not finite, a score is NaN or has a wrong shape, or the criterion changed a
                weight (the message names the tensor); or if the masks so far prune more than the sparsity.
            TypeError: if the criterion gives something that is not a tensor.
        """
        require_finite_weights(self.targets.values())
        found = self.granularity.mask(self.cut(masks, sparsity, statistics, budget))
        if budget is not None:  # How many go is only known now.
            self.granularity.require_prunable(budget.model, self.cut(found, sparsity, budget=budget))
        return found

    @torch.no_grad()
    def quotas(self, masks: MaskSet, sparsity: float, statistics: Statistics) -> Mapping[str, Quota]:
        """What a method that reconstructs is to prune of each target; raises what `next_masks` does."""
        require_finite_weights(self.targets.values())
        return self.granularity.quotas(self.cut(masks, sparsity, statistics))

    def shortfall(self, masks: MaskSet, sparsity: float, budget: Budget | None = None) -> str | None:
        """A sentence that says by how much a cut missed its sparsity, and what can be had; None if it did not."""
        return self.granularity.shortfall(self.cut(MaskSet(), sparsity, budget=budget), masks)

    def steps(self, masks: MaskSet, sparsity: float, budget: Budget | None = None) -> list[float]:
        """The rising sparsities on a cut's way: `score_steps` steps that each leave the same share of what is left."""
        steps, final = self.config.score_steps, self.config.round_sparsities[-1]
        if steps == 1:
            return [sparsity]
        # No pool can get back what it has lost.
        before = min(max(self.granularity.floors(self.cut(masks, final, budget=budget)), default=0.0), final)
        share = (1 - sparsity) / (1 - before)
        nearest = self.granularity.nearest([1 - (1 - before) * share ** (step / steps) for step in range(1, steps)])
        return [*(step for step in nearest if before < step < sparsity), sparsity]

    def zeros(self, model: nn.Module) -> MaskSet:
        """The masks of what is zero in the model."""
        return zeros_of(model, self.targets, self.structures)

    def held_zeros(self, model: nn.Module) -> MaskSet:
        """The masks that hold all zeros of the targets, as `hold_zeros` asks for.

        Raises:
            ValueError: if they are not those of whole structures, where structures go.
        """
        return held_zeros(model, self.targets, self.structures)

    def require_room(self, masks: MaskSet) -> None:
        """Tries the first cut on masks that are there: if they leave it no room, now is the time to say so.

        Raises:
            ValueError: if the masks prune more than the first round asks for.
        """
        if self.config.round_sparsities:
            # Any scores will do. What a rule has to know is not there yet, and with it there is too little room only
            # where there is without.
            scope = self.scope if self.scope.measure is None else GLOBAL
            tried = dataclasses.replace(self, criterion=magnitude, scope=scope)
            if self.config.keep is None:
                tried.next_masks(masks, self.config.round_sparsities[0])

    def require_trainable(self, model: nn.Module) -> None:
        """Requires that the model can be trained while it is pruned.

        Raises:
            ValueError: if what is pruned could not be shrunk at the end; if base weights under adapters cannot be
                pruned by the criterion while these are trained; or if it scores by their movement what is frozen.
        """
        if self.structures and self.config.shrink_at_end and has_partitions(model):
            raise ValueError(
                "DeepSpeed holds on to the shapes that parameters have, so that they cannot be shrunk at the end of "
                "training. Set shrink_at_end=False, and call shrink on the saved model."
            )
        if not has_adapters(model):
            scored = self.parameters.keys() & self.targets
            frozen = [t.module for name, t in self.targets.items() if name in scored and not t.weight.requires_grad]
            if "movement" in self.needs and frozen:
                raise ValueError(
                    f"criterion {self.criterion_name!r} cannot score frozen weights, which do not move: "
                    f"{', '.join(frozen[:3])} ({len(frozen)} in all). Unfreeze them (requires_grad_(True)), add them "
                    "to exclude_modules, or choose another criterion."
                )
            return
        if self.reconstructs:
            raise ValueError(
                f"criterion {self.criterion_name!r} changes base weights, which checkpoints of adapters do not hold. "
                "Prune first (hf_prune.prune), and add adapters then."
            )
        if "movement" in self.needs:
            raise ValueError(
                "base weights under adapters do not move, so that criterion 'movement' says nothing of them. Take "
                "another one, or prune before adapters are added."
            )
        require_maskable_adapters(model, self.targets)


def _own_sparsities(patterns: Mapping[str, float], modules: Mapping[str, str], what: str) -> dict[str, float]:
    """`layer_sparsity` of each name by its module; the first pattern that matches counts.

    Raises:
        ValueError: if a pattern matches none.
    """
    for pattern in patterns:
        if not any(re.fullmatch(pattern, module) for module in modules.values()):
            raise ValueError(
                f"layer_sparsity: {pattern!r} matches none of the {what}, such as {next(iter(modules.values()))!r}. "
                "It has to match a whole name."
            )
    found = {n: [value for pattern, value in patterns.items() if re.fullmatch(pattern, m)] for n, m in modules.items()}
    return {name: values[0] for name, values in found.items() if values}
