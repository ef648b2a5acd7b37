"""PruningConfig: what to prune, how far, and when."""

import copy
import dataclasses
import inspect
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import get_args, get_origin, get_type_hints

from .criteria import RECONSTRUCTIONS
from .granularities import parse as parse_granularity
from .pacing.patience import require_patience
from .pacing.timing import require_begin_and_end
from .schedules import SCHEDULES, explicit, resolve
from .scopes import SCOPES
from .selection.granularity import Granularity
from .selection.layer_sparsity import read as read_layer_sparsity
from .selection.scoring import WITH_AUTO, criterion_of, require_scorable
from .selection.whole_structures import MULTIPLE_OF
from .structures.budgets import share_to_keep
from .weights.targets import is_regex

CONFIG_NAME = "pruning_config.json"
RESTORE = ("best", "last")
OPTIMIZER_STATES = ("mask", "reset", "keep")
_CHOICES: dict[str, Iterable[str]] = {
    "schedule": SCHEDULES,
    "criterion": WITH_AUTO,
    "scope": SCOPES,
    "optimizer_state": OPTIMIZER_STATES,
    "restore": RESTORE,
}


def _with_help(config: type["PruningConfig"]) -> type["PruningConfig"]:
    """Gives each field its entry in the docstring, and what there is to choose from, as the help of its flag."""
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", inspect.getdoc(config) or "", flags=re.MULTILINE)
    help_of = {name: " ".join(text.split()).replace("%", "%%") for name, text in entries}  # None under `-OO`.
    for field in dataclasses.fields(config):
        choices = f" One of: {', '.join(_CHOICES[field.name])}." if field.name in _CHOICES else ""
        field.metadata = MappingProxyType({"help": help_of.get(field.name, "") + choices})
    return config


@_with_help
@dataclass(frozen=True)
class PruningConfig:
    """What to prune, how far, and when. `PruningConfig(sparsity=0.8)` is complete.

    Fields hold JSON primitives only, and each is a flag for `transformers.HfArgumentParser`.

    Args:
        sparsity: Fraction of the targeted weights to remove, in `[0, 1)`. May be left out where N:M, `sparsities` or
            `keep_…` say it, or with `hold_zeros` alone, which then prunes nothing further.
        keep_parameters: Share of the parameters that is left in the end, in `(0, 1]`, in place of a sparsity: as many
            structures go as it takes. A schedule says how much is gone after each round.
        keep_flops: The same for the floating-point operations of a forward pass over the first batch.
        keep_latency: The same for its time, on the device where the model is.
        schedule: How sparse after each round: a key of `hf_prune.SCHEDULES`. For N:M, "auto" is one cut, or
            "constant" where `rounds` is given.
        rounds: Number of rounds; the schedule's own default if None.
        initial_sparsity: Sparsity after the first cut of the hybrid schedule.
        sparsities: The absolute sparsity after each round, rising, instead of a schedule.
        criterion: What a weight is worth: a key of `hf_prune.criteria.CRITERIA`; a method of `RECONSTRUCTIONS` there
            ("sparsegpt"), which changes the weights that it keeps so that layers give what they gave; or what a
            structure is worth, a key of `hf_prune.structures.criteria.STRUCTURE_CRITERIA`. "auto" is magnitude for
            weights and channels, block_influence for layers, reap for experts, activation for widths, and for heads,
            queries and neurons gate_fisher, or activation if samples have no labels.
        calibration_samples: Number of training samples that a cut looks at, in total over all processes, if it does.
        score_steps: Number of steps in which a cut reaches its sparsity, each scored anew and leaving the same share.
        granularity: What is removed together: "unstructured", "N:M" (N kept of every M along the input dimension,
            which fixes the sparsity at `1 − N/M`), "block:RxC", or kinds of structures, joined by +: "head" (with
            grouped queries, a key-value head and its queries), "query", "neuron" (of feed-forward networks), "width"
            (of the residual stream), "expert", "layer", "channel" (of convolutional networks). Their sparsities are
            fractions of their number, and each kind is ranked among itself.
        scope: Which weights compete: "global" (all), "layer" (per tensor, each equally sparse), "row" (per output,
            each equally sparse), "erk" (per tensor, by the Erdős–Rényi kernel rule) or "owl" (per tensor, by the
            outliers of its inputs and weights); "auto" is row for wanda and global for all others. N:M competes
            within its groups and takes "auto" only. Structures compete everywhere ("global") or within their layer
            ("layer", each losing the same share); whole layers and widths take "auto" only. With sparsegpt the scope
            says how sparse each layer is, and weights compete within blocks of its columns: "global" is as by fisher,
            which needs labels and gradients, and "layer" as in its paper, which needs neither.
        layer_sparsity: Regular expression of module names → their own final sparsity, also as JSON text, or `@FILE`
            with what `hf_prune.sensitivity` has measured, by which the sparsity is divided. The first expression that
            matches the whole name counts. These modules leave the competition, and `sparsity` holds for the
            rest. At earlier rounds they are as far on their way as the rest.
        target_modules: Modules to prune instead of the default ones; see `hf_prune.weights.targets.find_targets`.
        exclude_modules: Modules to leave out.
        begin: Where the first round begins: 1 or more is a number of steps, below 1 a fraction of the run.
        end: Where the rounds end, as in `begin`; if None, after a quarter of the steps that follow `begin`, with
            patience after half of them, or as many as the rounds need. The rest of the run belongs to the last round.
        patience: A round ends when the metric has not improved for this many evaluations; a list gives one number a
            round, and the last repeats. Patience divides the steps up to `end` among the rounds; a round that ends
            early leaves its steps to later ones. If None, rounds are spread evenly.
        min_delta: With patience, an improvement is a gain above this, in units of the metric.
        max_round_steps: With patience, the most steps that a round may take; no limit if None.
        min_round_steps: With patience, the steps that are kept for each later round, so that the last cut always
            comes before `end`; an equal share if None.
        restore: With patience, what a round hands on to the next cut, and the last one to the saved model: its "best"
            weights, of which a copy is kept in CPU memory and in checkpoints, or its "last".
        metric: The evaluation metric that patience and the history follow; `metric_for_best_model` of the training
            arguments if None, else `eval_loss`. The training arguments' `greater_is_better` says which way it
            improves if it is their metric, or they name none; otherwise its name does: losses, perplexities and
            errors fall (see `hf_prune.training.monitor.FALLING`).
        restart_lr: Each cut starts the learning-rate schedule anew, with its warm-up, compressed to what the round may
            take at most. Otherwise it goes on.
        optimizer_state: What a cut does to the optimizer: "mask" zeroes what it remembers of pruned weights, "reset"
            forgets everything, "keep" touches nothing. What is not of the weights' shape, such as Adafactor's factored
            moments, cannot be masked.
        hold_zeros: What is zero at the start enters the mask first and stays zero.
        multiple_of: The number of neurons, channels or widths that remain is a multiple of this, or all of them.
        shrink_at_end: Whether `PruningTrainerCallback` removes pruned structures when training ends: see
            `hf_prune.shrink`. Until then they are masked.
        reconstruct: With heads, queries and neurons: a cut solves the projections that read what goes anew on what
            stays, so that each layer gives about what it gave: see `hf_prune.reconstruction.compensation`. It takes
            calibration samples, but no labels, and fills zeros of single weights.
        uniform: Remove the same number of structures everywhere, so that an ordinary config of the model's family says
            what is left, and the model loads where hf_prune is not installed. An error where the family cannot say it.

    Raises:
        ValueError: if a value is outside of its range, unknown, or contradicts another.

    Example:
        >>> PruningConfig(sparsity=0.75, schedule="constant", rounds=3).round_sparsities
        [0.25, 0.5, 0.75]
        >>> PruningConfig(granularity="2:4").round_sparsities
        [0.5]
    """

    sparsity: float | None = None
    keep_parameters: float | None = None
    keep_flops: float | None = None
    keep_latency: float | None = None
    schedule: str = "auto"
    rounds: int | None = None
    initial_sparsity: float | None = None
    sparsities: list[float] | None = None
    criterion: str = "auto"
    calibration_samples: int = 128
    score_steps: int = 1
    granularity: str = "unstructured"
    scope: str = "auto"
    # The order inside of these three unions is what HfArgumentParser can read.
    layer_sparsity: dict[str, float] | str | None = None
    target_modules: list[str] | None | str = None  # noqa: RUF036
    exclude_modules: list[str] | None | str = None  # noqa: RUF036
    begin: float = 0.0
    end: float | None = None
    patience: list[int] | None = None  # A number too: HfArgumentParser cannot read `int | list[int]`.
    min_delta: float = 0.0
    max_round_steps: int | None = None
    min_round_steps: int | None = None
    restore: str = "best"
    metric: str | None = None
    restart_lr: bool = False
    optimizer_state: str = "mask"
    hold_zeros: bool = False
    multiple_of: int = MULTIPLE_OF
    shrink_at_end: bool = True
    reconstruct: bool = False
    uniform: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.patience, int):
            object.__setattr__(self, "patience", [self.patience])
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            value = list(value) if isinstance(value, tuple) else copy.copy(value)  # The caller's own may change later.
            _require_kind(name, value, hint)
            object.__setattr__(self, name, value)
        if self.sparsity is not None:
            _require_fraction("sparsity", self.sparsity)
        for value in self.sparsities or []:
            _require_fraction("each of sparsities", value)
        if isinstance(self.layer_sparsity, str):
            final = self.sparsities[-1] if self.sparsities else self.sparsity
            object.__setattr__(self, "layer_sparsity", read_layer_sparsity(self.layer_sparsity, final))
        self._require_patterns()
        for name in ("calibration_samples", "score_steps", "multiple_of"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}.")
        granularity = parse_granularity(self.granularity, multiple_of=self.multiple_of, uniform=self.uniform)
        asked = {f.name: v for f in dataclasses.fields(self) if (v := getattr(self, f.name)) != f.default}
        granularity.require_options(asked)
        require_scorable(*criterion_of(self.criterion, granularity.kinds), granularity.kinds)
        if self.criterion in RECONSTRUCTIONS:
            granularity.require_reconstruction(self.criterion, self.scope, self.score_steps)
        # Computed once here so that a schedule that cannot be is an error at once.
        object.__setattr__(self, "_round_sparsities", self._resolve_rounds(granularity))
        require_begin_and_end(self.begin, self.end)
        require_patience(asked, len(self.round_sparsities))

    def _require_patterns(self) -> None:
        for pattern, value in self.own_sparsities.items():
            if not isinstance(pattern, str):
                raise ValueError(f"layer_sparsity must map regular expressions to sparsities, got {pattern!r}.")
            _require_fraction(f"layer_sparsity[{pattern!r}]", value)
            _require_regex("layer_sparsity", pattern)
        for name in ("target_modules", "exclude_modules"):
            patterns = getattr(self, name)
            for pattern in [patterns] if isinstance(patterns, str) else patterns or []:
                if not isinstance(pattern, str):
                    raise ValueError(f"{name} must hold names or regular expressions, got {pattern!r}.")
                if isinstance(patterns, str) or is_regex(pattern):
                    _require_regex(name, pattern)

    @property
    def round_sparsities(self) -> list[float]:
        """The absolute sparsity after each round, or the share gone of what `keep` names; empty for no cuts."""
        return list(self._round_sparsities)  # type: ignore[attr-defined]

    @property
    def keep(self) -> tuple[str, float] | None:
        """What users pay for (a key of `hf_prune.structures.budgets.MEASURES`), and the share of it that is left."""
        return share_to_keep(vars(self))

    @property
    def own_sparsities(self) -> dict[str, float]:
        """`layer_sparsity` as a dict, empty if there is none."""
        assert not isinstance(self.layer_sparsity, str)  # `__post_init__` has read it.
        return dict(self.layer_sparsity or {})

    def _resolve_rounds(self, granularity: Granularity) -> list[float]:
        keep = self.keep
        given = [n for n in ("rounds", "initial_sparsity") if getattr(self, n) is not None]
        given += ["schedule"] if self.schedule != "auto" else []
        if self.sparsities is not None:
            values = explicit(self.sparsities)
            if given or (self.sparsity is not None and self.sparsity != values[-1]):
                raise ValueError(f"sparsities says all about the rounds; leave out {', '.join(given) or 'sparsity'}.")
            return granularity.attainable(values, rounds_are_asked=True)
        target = self._target_sparsity(granularity) if keep is None else 1 - keep[1]
        if target is None:
            given += ["layer_sparsity"] if self.layer_sparsity else []
            if given:
                raise ValueError(f"{', '.join(given)} needs a sparsity. With hold_zeros alone, nothing is pruned.")
            return []
        auto = self.schedule == "auto"
        schedule = granularity.auto_schedule(self.rounds, self.initial_sparsity) if auto else self.schedule
        values = resolve(schedule, target, self.rounds, self.initial_sparsity)
        return granularity.attainable(values, rounds_are_asked=self.rounds is not None)

    def _target_sparsity(self, granularity: Granularity) -> float | None:
        if (fixed := granularity.fixed_sparsity) is not None:
            if self.sparsity is not None and not math.isclose(self.sparsity, fixed):
                raise ValueError(
                    f"granularity {self.granularity!r} fixes sparsity at {fixed:g}, got {self.sparsity}. "
                    "Leave sparsity out, or choose another granularity."
                )
            return fixed
        if self.sparsity is None and not self.hold_zeros:
            raise ValueError(
                "sparsity is missing. Give a fraction in [0, 1), a list of sparsities, an N:M granularity, or "
                "hold_zeros=True to keep the zeros of a sparse model and prune nothing further."
            )
        return self.sparsity

    def to_dict(self) -> dict[str, object]:
        """The fields as JSON primitives."""
        return dataclasses.asdict(self)

    def without_defaults(self) -> str:
        """What was asked for, as JSON: the sparsity, and the fields that somebody has set."""
        default = type(self)(sparsity=0.5).to_dict()
        asked = {name: v for name, v in self.to_dict().items() if name == "sparsity" or v != default[name]}
        return json.dumps(asked, indent=2)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> "PruningConfig":
        """The inverse of `to_dict`.

        Raises:
            ValueError: if there is an unknown key, or a value is bad.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(
                f"unknown key {', '.join(map(repr, unknown))} in a pruning config. Known are {', '.join(known)}. "
                "Was it saved by a newer version of hf_prune?"
            )
        if str(values.get("layer_sparsity")).startswith("@"):  # It may come from somebody else.
            raise ValueError("a saved pruning config must hold the numbers of layer_sparsity, not a file's name.")
        return cls(**values)  # type: ignore[arg-type]

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes `pruning_config.json` into a folder, which is made if there is none."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        (Path(folder) / CONFIG_NAME).write_text(text, encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> "PruningConfig":
        """Reads `pruning_config.json` from a folder.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is not JSON, has an unknown key, or a bad value.
        """
        path = Path(folder) / CONFIG_NAME
        if not path.is_file():
            raise FileNotFoundError(f"no {CONFIG_NAME} in {folder}.")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}).") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} does not hold a pruning config, but {values!r}.")
        return cls.from_dict(values)


def asked_in(folder: Path) -> str | None:
    """What `PruningConfig.without_defaults` says of a saved model; None if no config lies beside it."""
    return PruningConfig.from_pretrained(folder).without_defaults() if (folder / CONFIG_NAME).is_file() else None


def _require_kind(name: str, value: object, hint: object) -> None:
    """Requires the type that an annotation names. What a list or dict holds is not looked at."""
    kinds = [get_origin(kind) or kind for kind in get_args(hint) or (hint,)]
    # Whole numbers pass for fractions, but True and False do not pass for numbers.
    allowed = [*kinds, int] if float in kinds else kinds
    if not isinstance(value, tuple(allowed)) or isinstance(value, bool) != (bool in kinds):
        words = " or ".join("None" if kind is NoneType else kind.__name__ for kind in kinds)
        raise ValueError(f"{name} must be {words}, got {value!r}.")


def _require_fraction(name: str, value: object) -> None:
    """Requires a number in `[0, 1)`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number in [0, 1), got {value!r}.")
    if not 0 <= value < 1:
        hint = f" Did you mean {value / 100:g}?" if 1 < value < 100 else ""
        raise ValueError(f"{name} must be in [0, 1), got {value}.{hint}")


def _require_regex(name: str, pattern: str) -> None:
    """Requires a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name}: {pattern!r} is not a regular expression ({error}).") from error
