"""A granularity: what is removed together, and all that depends on it in a cut."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import ClassVar

from torch import nn

from ..scopes import SCOPES
from ..structures.budgets import MEASURES
from ..structures.groups import KINDS, NO_STRUCTURES, Structures
from ..weights.masks import MaskSet
from ..weights.targets import Target
from .cuts import Cut, Quota, floors_of_weights


class Granularity(ABC):
    """What is removed together. As a string it is spelled as in a config."""

    spelling: ClassVar[str]
    """How configs spell it, for messages."""
    options: ClassVar[tuple[str, ...]] = ()
    """The fields of a config that are fields of it too."""
    kinds: tuple[str, ...] = ()
    """The kinds of structures that go as a whole; none where weights go."""
    needs_whole_weights: ClassVar[bool] = False
    """Whether it cannot choose among the rows that a process holds of sharded weights."""
    can_reconstruct: ClassVar[bool] = False
    """Whether methods that reconstruct can choose by it."""

    @classmethod
    @abstractmethod
    def read(cls, text: str) -> "Granularity | None":
        """What a config spells; None if it is not of this class. Raises ValueError if it is, and cannot be."""

    @property
    def fixed_sparsity(self) -> float | None:
        """The only sparsity that it can have, if it is so."""
        return None

    @property
    def pays_if(self) -> str:
        """What zeros need in order to save time or memory."""
        return "a runtime makes use of them"

    # What of a config goes with it.

    def require_options(self, asked: Mapping[str, object]) -> None:
        """Requires that it goes with what else a config asks for: the fields that do not have their defaults."""
        for name in ("multiple_of", "shrink_at_end", "reconstruct", "uniform", *(f"keep_{m}" for m in MEASURES)):
            if name in asked:
                raise ValueError(
                    f"{name} is about structures, and granularity {str(self)!r} has none. Choose one of "
                    f"{', '.join(KINDS)}."
                )

    def require_reconstruction(self, criterion: str, scope: str, score_steps: int) -> None:
        """Requires that a method that reconstructs can choose by it, and goes with what else a config asks for."""
        if not self.can_reconstruct:
            raise ValueError(
                f"{criterion} chooses weights one by one or N of every M; granularity {str(self)!r} does not go with "
                "it."
            )
        if scope == "row":
            raise ValueError(
                f"{criterion} compares weights within blocks of columns; scope says how sparse each layer is and must "
                f"be one of {', '.join(scope for scope in SCOPES if scope != 'row')}; got 'row'."
            )
        if score_steps != 1:
            raise ValueError(f"{criterion} scores anew as it goes; leave score_steps out.")

    def auto_scope(self, scope: str, reconstructs: bool) -> str:
        """What `scope="auto"` means, with a criterion that has declared a scope, or a method that reconstructs."""
        return scope

    def auto_schedule(self, rounds: int | None, initial_sparsity: float | None) -> str:
        """What `schedule="auto"` means."""
        return "auto"

    def attainable(self, sparsities: list[float], rounds_are_asked: bool) -> list[float]:
        """The sparsities nearest to those of some rounds that it can have; raises if two rounds would have the same.

        If nobody has asked for so many rounds, those that get no further are left out.
        """
        return sparsities

    # What it does with a model.

    def check(self, targets: Iterable[Target]) -> None:  # noqa: B027
        """Requires that it fits the shapes of all targets; the error names each module that it does not fit."""

    def find(self, model: nn.Module, targets: Mapping[str, Target]) -> Structures:
        """The structures that go as a whole; none where weights go."""
        return NO_STRUCTURES

    def named(self, targets: Mapping[str, Target], structures: Structures) -> tuple[Mapping[str, str], str]:
        """What can have a sparsity of its own → the name of its module; and what these are, for messages."""
        return {name: target.module for name, target in targets.items()}, "targeted modules"

    def require_prunable(self, model: nn.Module, cut: Cut) -> None:  # noqa: B027
        """Requires that the last cut of a config can be made."""

    @abstractmethod
    def mask(self, cut: Cut) -> MaskSet:
        """Scores, chooses and masks; the model is not touched.

        Raises:
            ValueError: if a score is NaN, or the masks so far prune more than is asked for.
        """

    def quotas(self, cut: Cut) -> Mapping[str, Quota]:
        """What a method that reconstructs is to prune of each target."""
        raise NotImplementedError(f"no method that reconstructs chooses by granularity {self}.")

    def shortfall(self, cut: Cut, masks: MaskSet) -> str | None:
        """A sentence that says why a cut pruned nothing, or too much or little; None if it did as asked.

        Args:
            cut: What was asked for.
            masks: What the cut has come to.
        """
        if not cut.sparsity or masks.masked:
            return None
        return (
            f"The cut to sparsity {cut.sparsity:g} pruned nothing: it rounds to none in each pool of weights that "
            "compete. Choose a higher sparsity, or a scope that pools more."
        )

    def floors(self, cut: Cut) -> list[float]:
        """The lowest sparsities that are still possible, by each pool, on the way to the one of a cut."""
        return floors_of_weights(cut)

    def nearest(self, sparsities: list[float]) -> list[float]:
        """The sparsities that it can have and that are nearest to some, each once."""
        return sparsities
