"""PruningConfig: what to prune, how far, and when."""

import copy
import dataclasses
import itertools
import json
import math
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_type_hints

from . import granularities, schedules
from .checks import require_fraction, require_kind, require_regex
from .criteria import CRITERIA
from .reconstruction.sparsegpt import RECONSTRUCTIONS
from .scopes import SCOPES
from .training.optimizers import OPTIMIZER_STATES
from .weights.targets import is_regex

CONFIG_NAME = "pruning_config.json"
RESTORE = ("best", "last")
CRITERION_NAMES = (*CRITERIA, *RECONSTRUCTIONS)


@dataclass(frozen=True)
class PruningConfig:
    """What to prune, how far, and when. `PruningConfig(sparsity=0.8)` is complete.

    Fields hold JSON primitives only, and each is a flag for `transformers.HfArgumentParser`.

    Args:
        sparsity: Fraction of the targeted weights to remove, in `[0, 1)`. May be left out where it follows from
            something else: from an N:M granularity, from `sparsities`, or with `hold_zeros` alone, which then prunes
            nothing further.
        schedule: How sparse after each round: a key of `hf_prune.schedules.SCHEDULES`. For N:M, "auto" is one cut, or
            "constant" where `rounds` is given.
        rounds: Number of rounds; the schedule's own default if None.
        initial_sparsity: Sparsity after the first cut of the hybrid schedule.
        sparsities: The absolute sparsity after each round, rising, instead of a schedule.
        criterion: What a weight is worth: a key of `hf_prune.criteria.CRITERIA`, or a method of
            `hf_prune.reconstruction.sparsegpt.RECONSTRUCTIONS` ("sparsegpt"), which also changes the weights that it
            keeps so that each layer's outputs stay what they were.
        calibration_samples: Number of training samples that a criterion or scope looks at in each cut, if it looks at
            data; of all processes together.
        score_steps: Number of steps in which a cut reaches its sparsity, each leaving the same share of what the one
            before has left, with new scores for each. Helps criteria that look at data.
        granularity: What is removed together: "unstructured", "N:M" (N kept of every M along the input dimension,
            which fixes the sparsity at `1 − N/M`), "block:RxC", or whole structures: "head" (of attention; with
            grouped queries, a key-value head and its queries), "neuron" (of feed-forward networks), "head+neuron",
            "channel" (of convolutional networks) or "layer". The sparsities of structures are fractions of their
            number, and heads and neurons are ranked among themselves.
        scope: Which weights compete: "global" (all), "layer" (per tensor, each equally sparse), "row" (per output,
            each equally sparse), "erk" (per tensor, by the Erdős–Rényi kernel rule) or "owl" (per tensor, by the
            outliers of its inputs and weights); "auto" is row for wanda and global for all others. N:M competes
            within its groups and takes "auto" only. Structures compete everywhere ("global") or within their layer
            ("layer", each losing the same share); whole layers take "auto" only. With sparsegpt the scope says how
            sparse each layer is, and weights compete within blocks of its columns: "global" is as by the criterion
            fisher, which needs labels and gradients, and "layer" as in its paper, which needs neither.
        layer_sparsity: Regular expression of module names → their own final sparsity, also as JSON text. The first
            that matches the whole name counts. These modules leave the competition, and `sparsity` holds for the
            rest. At earlier rounds they are as far on their way as the rest.
        target_modules: Modules to prune instead of the default ones; see `hf_prune.weights.targets.find_targets`.
        exclude_modules: Modules to leave out.
        begin: Where the first round begins: 1 or more is a number of steps, below 1 a fraction of the run.
        end: Where the rounds end, in the same words; if None, after a quarter of the steps that follow `begin`, with
            patience after half of them, or as many as the rounds need. What the run has left after it belongs to the
            last round.
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
        hold_zeros: Weights that are zero at the start enter the mask first and stay zero.
        multiple_of: The number of neurons or channels that remain in a layer is a multiple of this, or all of them.
        shrink_at_end: Whether `PruningTrainerCallback` removes pruned structures when training ends: see
            `hf_prune.shrink`. Until then they are masked.
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

    sparsity: float | None = field(
        default=None, metadata={"help": "Fraction of the targeted weights to remove, in [0, 1)."}
    )
    schedule: str = field(
        default="auto", metadata={"help": f"How sparse after each round: {', '.join(schedules.SCHEDULES)}."}
    )
    rounds: int | None = field(
        default=None, metadata={"help": "Number of rounds; the schedule's own default if left out."}
    )
    initial_sparsity: float | None = field(
        default=None, metadata={"help": "Sparsity after the first cut of the hybrid schedule."}
    )
    sparsities: list[float] | None = field(
        default=None, metadata={"help": "Absolute sparsity after each round, instead of a schedule."}
    )
    criterion: str = field(
        default="magnitude", metadata={"help": f"What a weight is worth: {', '.join(CRITERION_NAMES)}."}
    )
    calibration_samples: int = field(
        default=128, metadata={"help": "Training samples that a criterion looks at in each cut."}
    )
    score_steps: int = field(
        default=1, metadata={"help": "Steps in which a cut reaches its sparsity, each with new scores."}
    )
    granularity: str = field(
        default="unstructured",
        metadata={
            "help": "What is removed together: unstructured, N:M, block:RxC, or whole structures: "
            f"{', '.join(granularities.STRUCTURES)}."
        },
    )
    scope: str = field(default="auto", metadata={"help": f"Which weights compete: {', '.join(SCOPES)}."})
    # The order inside of these three unions is what HfArgumentParser can read.
    layer_sparsity: dict[str, float] | str | None = field(
        default=None,
        metadata={"help": 'Regular expression of module names to their own sparsity, as JSON: {".*mlp.*": 0.9}.'},
    )
    target_modules: list[str] | None | str = field(  # noqa: RUF036
        default=None, metadata={"help": "Modules to prune: exact names, last components or regular expressions."}
    )
    exclude_modules: list[str] | None | str = field(  # noqa: RUF036
        default=None, metadata={"help": "Modules to leave out: exact names, last components or regular expressions."}
    )
    begin: float = field(
        default=0.0, metadata={"help": "Where the first round begins: steps, or below 1 a fraction of the run."}
    )
    end: float | None = field(
        default=None,
        metadata={
            "help": "Where the rounds end, in the same words; after a quarter of what follows begin if left out, with "
            "patience after half of it."
        },
    )
    # A number too: HfArgumentParser cannot read `int | list[int]`.
    patience: list[int] | None = field(
        default=None,
        metadata={"help": "Evaluations without improvement that end a round: one number, or one for each round."},
    )
    min_delta: float = field(default=0.0, metadata={"help": "An improvement of the metric is a gain above this."})
    max_round_steps: int | None = field(
        default=None, metadata={"help": "The most steps that a round with patience may take."}
    )
    min_round_steps: int | None = field(
        default=None, metadata={"help": "The steps that patience leaves to each later round."}
    )
    restore: str = field(
        default="best", metadata={"help": f"What a round with patience hands on: {' or '.join(RESTORE)} weights."}
    )
    metric: str | None = field(
        default=None, metadata={"help": "Evaluation metric that patience and the history follow."}
    )
    restart_lr: bool = field(default=False, metadata={"help": "Start the learning-rate schedule anew at each cut."})
    optimizer_state: str = field(
        default="mask", metadata={"help": f"What a cut does to the optimizer: {', '.join(OPTIMIZER_STATES)}."}
    )
    hold_zeros: bool = field(default=False, metadata={"help": "Keep at zero what is zero at the start."})
    multiple_of: int = field(
        default=8, metadata={"help": "The number of neurons or channels that remain is a multiple of this."}
    )
    shrink_at_end: bool = field(default=True, metadata={"help": "Remove pruned structures when training ends."})
    uniform: bool = field(
        default=False,
        metadata={"help": "Remove as many structures everywhere, so that an ordinary config says what is left."},
    )

    def __post_init__(self) -> None:
        if isinstance(self.layer_sparsity, str):
            object.__setattr__(self, "layer_sparsity", _parse_layer_sparsity(self.layer_sparsity))
        if isinstance(self.patience, int):
            object.__setattr__(self, "patience", [self.patience])
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            value = list(value) if isinstance(value, tuple) else copy.copy(value)  # The caller's own may change later.
            require_kind(name, value, hint)
            object.__setattr__(self, name, value)
        if self.sparsity is not None:
            require_fraction("sparsity", self.sparsity)
        for value in self.sparsities or []:
            require_fraction("each of sparsities", value)
        for pattern, value in self.own_sparsities.items():
            if not isinstance(pattern, str):
                raise ValueError(f"layer_sparsity must map regular expressions to sparsities, got {pattern!r}.")
            require_fraction(f"layer_sparsity[{pattern!r}]", value)
            require_regex("layer_sparsity", pattern)
        self._check_patterns()
        for name in ("calibration_samples", "score_steps", "multiple_of"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        known = {
            "criterion": CRITERION_NAMES,
            "scope": SCOPES,
            "optimizer_state": OPTIMIZER_STATES,
            "restore": RESTORE,
        }
        for name, allowed in known.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}.")
        self._check_begin_and_end()
        if self._pattern is not None:
            for name in ("scope", "layer_sparsity"):
                if getattr(self, name) not in ("auto", None):
                    raise ValueError(
                        f"{name} does not apply to granularity {self.granularity!r}: weights compete within their "
                        f"groups, and each layer has the same sparsity. Leave {name} out."
                    )
        self._check_structures()
        if self.criterion in RECONSTRUCTIONS:
            self._check_reconstruction()
        # Computed once here so that a schedule that cannot be is an error at once.
        object.__setattr__(self, "_round_sparsities", self._resolve_rounds())
        self._check_patience()

    def _check_structures(self) -> None:
        if not isinstance(granularities.parse(self.granularity), granularities.Structural):
            for name in ("multiple_of", "shrink_at_end", "uniform"):
                if getattr(self, name) != getattr(type(self), name):
                    raise ValueError(
                        f"{name} is about structures, and granularity {self.granularity!r} has none. Choose one of "
                        f"{', '.join(granularities.STRUCTURES)}."
                    )
            return
        allowed = ["auto"]
        if self.granularity != "layer":
            allowed += ["layer"] if self.uniform else ["global", "layer"]
        if self.scope not in allowed:
            raise ValueError(
                f"scope must be one of {', '.join(allowed)} with granularity {self.granularity!r}"
                f"{' and uniform' if self.uniform else ''}; got {self.scope!r}."
            )
        if self.layer_sparsity and self.uniform:
            raise ValueError(
                "layer_sparsity contradicts uniform, which removes the same number everywhere. Leave one of them out."
            )
        if self.layer_sparsity and self.granularity == "layer":
            raise ValueError("layer_sparsity does not apply to granularity 'layer': all layers are one pool.")
        if self.multiple_of != type(self).multiple_of and self.granularity in ("head", "layer"):
            raise ValueError(
                f"multiple_of is about neurons and channels, and granularity {self.granularity!r} has none. Leave it "
                "out."
            )

    def _check_reconstruction(self) -> None:
        if not isinstance(granularities.parse(self.granularity), (granularities.Unstructured, granularities.Pattern)):
            raise ValueError(
                f"{self.criterion} chooses weights one by one or N of every M; granularity {self.granularity!r} does "
                "not go with it."
            )
        if self.scope == "row":
            raise ValueError(
                f"{self.criterion} compares weights within blocks of columns; scope says how sparse each layer is "
                f"and must be one of {', '.join(scope for scope in SCOPES if scope != 'row')}; got 'row'."
            )
        if self.score_steps != 1:
            raise ValueError(f"{self.criterion} scores anew as it goes; leave score_steps out.")

    def _check_patterns(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            patterns = getattr(self, name)
            for pattern in [patterns] if isinstance(patterns, str) else patterns or []:
                if not isinstance(pattern, str):
                    raise ValueError(f"{name} must hold names or regular expressions, got {pattern!r}.")
                if isinstance(patterns, str) or is_regex(pattern):
                    require_regex(name, pattern)

    def _check_begin_and_end(self) -> None:
        if not 0 <= self.begin < math.inf:
            raise ValueError(f"begin must be 0 or more (steps, or below 1 a fraction of the run), got {self.begin}.")
        if self.end is not None and not 0 < self.end < math.inf:
            raise ValueError(f"end must be above 0 (steps, or below 1 a fraction of the run), got {self.end}.")
        for name in ("begin", "end"):
            if (value := getattr(self, name)) is not None and value >= 1 and value % 1:
                raise ValueError(f"{name} must be a whole number of steps where it is not below 1, got {value}.")
        # Steps and fractions compare only when the length of the run is known.
        if self.end is not None and (self.begin >= 1) == (self.end >= 1) and self.begin >= self.end:
            raise ValueError(f"begin must be before end, got begin={self.begin} and end={self.end}.")

    def _check_patience(self) -> None:
        numbers = [("patience", number) for number in self.patience or []]
        numbers += [(name, getattr(self, name)) for name in ("max_round_steps", "min_round_steps")]
        for name, number in numbers:
            if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {number!r}.")
        if not 0 <= self.min_delta < math.inf:
            raise ValueError(f"min_delta must be 0 or more, in units of the metric, got {self.min_delta}.")
        if self.patience is None:
            for name in ("min_delta", "max_round_steps", "min_round_steps", "restore"):
                if getattr(self, name) != getattr(type(self), name):
                    raise ValueError(f"{name} needs patience: without it, rounds are spread evenly.")
            return
        if not self.round_sparsities:
            raise ValueError(
                "patience needs rounds to end, and with hold_zeros alone there are none. Give a sparsity."
            )
        if not 1 <= len(self.patience) <= len(self.round_sparsities):
            raise ValueError(
                f"patience must have one number, or at most one for each of the {len(self.round_sparsities)} rounds, "
                f"got {len(self.patience)}."
            )
        if self.max_round_steps is not None and (self.min_round_steps or 1) > self.max_round_steps:
            raise ValueError(
                f"min_round_steps must be at most max_round_steps, got {self.min_round_steps} and "
                f"{self.max_round_steps}."
            )

    @property
    def round_sparsities(self) -> list[float]:
        """The absolute sparsity after each round; empty where zeros are held and nothing further is pruned."""
        return list(self._round_sparsities)  # type: ignore[attr-defined]

    @property
    def own_sparsities(self) -> dict[str, float]:
        """`layer_sparsity` as a dict, empty if there is none."""
        assert not isinstance(self.layer_sparsity, str)  # `__post_init__` has read it.
        return dict(self.layer_sparsity or {})

    def sparsities_of(self, names: Iterable[str], sparsity: float) -> dict[str, float]:
        """The sparsity in a round of each name that `layer_sparsity` matches: as far on its way to its final one.

        Args:
            names: Names of modules, or of groups of structures.
            sparsity: The sparsity of the round.

        Returns:
            Name → sparsity. What no pattern matches is left out.
        """
        progress = sparsity / self.round_sparsities[-1] if self.round_sparsities[-1] else 1.0
        return {
            name: own[0] * progress
            for name in names
            if (own := [value for pattern, value in self.own_sparsities.items() if re.fullmatch(pattern, name)])
        }

    def require_layer_sparsity_matches(self, names: Collection[str], what: str) -> None:
        """Requires that each pattern of `layer_sparsity` matches something.

        Args:
            names: Names of modules, or of groups of structures.
            what: What they are, for the message.

        Raises:
            ValueError: if a pattern matches none of them.
        """
        for pattern in self.own_sparsities:
            if not any(re.fullmatch(pattern, name) for name in names):
                raise ValueError(
                    f"layer_sparsity: {pattern!r} matches none of the {what}, such as {next(iter(names))!r}. It has "
                    "to match a whole name."
                )

    def _resolve_rounds(self) -> list[float]:
        given = [n for n in ("rounds", "initial_sparsity") if getattr(self, n) is not None]
        given += ["schedule"] if self.schedule != "auto" else []
        if self.sparsities is not None:
            values = schedules.explicit(self.sparsities)
            if given or (self.sparsity is not None and self.sparsity != values[-1]):
                raise ValueError(f"sparsities says all about the rounds; leave out {', '.join(given) or 'sparsity'}.")
            return self._on_pattern(values)
        target = self._target_sparsity()
        if target is None:
            given += ["layer_sparsity"] if self.layer_sparsity else []
            if given:
                raise ValueError(f"{', '.join(given)} needs a sparsity. With hold_zeros alone, nothing is pruned.")
            return []
        schedule = self.schedule
        if schedule == "auto" and self._pattern is not None and self.initial_sparsity is None:
            # The few steps that a pattern has on its way are taken one by one.
            schedule = "one_shot" if self.rounds is None else "constant"
        return self._on_pattern(schedules.resolve(schedule, target, self.rounds, self.initial_sparsity))

    @property
    def _pattern(self) -> granularities.Pattern | None:
        granularity = granularities.parse(self.granularity)
        return granularity if isinstance(granularity, granularities.Pattern) else None

    def _target_sparsity(self) -> float | None:
        if self._pattern is not None:
            fixed = 1 - self._pattern.n / self._pattern.m
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

    def _on_pattern(self, values: list[float]) -> list[float]:
        """For N:M, moves each sparsity to the nearest pattern k:M on the way."""
        if self._pattern is None:
            return values
        n, m = self._pattern.n, self._pattern.m
        dropped = [round(value * m) for value in values]
        if self.rounds is None and self.sparsities is None:
            dropped = sorted(set(dropped) - {0})  # Nobody asked for rounds that would not get further.
        if dropped[-1] != m - n or any(a >= b for a, b in itertools.pairwise([0, *dropped])):
            raise ValueError(
                f"the rounds of {self.granularity} go through (M-1):M, (M-2):M … {n}:{m}: each prunes one more or "
                f"several of every {m}, and the last ends at {1 - n / m:g}; got sparsities "
                f"{', '.join(f'{value:g}' for value in values)}. Take fewer rounds, or another schedule."
            )
        return [count / m for count in dropped]

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


def _parse_layer_sparsity(text: str) -> dict[str, float]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"layer_sparsity is not JSON ({error}), got {text!r}.") from error
    if not isinstance(values, dict):
        raise ValueError(f'layer_sparsity must be an object such as {{".*mlp.*": 0.9}}, got {text!r}.')
    return values
