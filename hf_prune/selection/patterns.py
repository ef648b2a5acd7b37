"""Patterns: N weights of every M are kept."""

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from ..weights.masks import MaskSet
from ..weights.targets import Target
from .cuts import Cut, Quota, mask_one_by_one
from .granularity import Granularity
from .lowest import drop_lowest_of_each


@dataclass(frozen=True)
class Pattern(Granularity):
    """`n` weights kept of every `m` along the input dimension; 2:4 is what sparse tensor cores compute with."""

    n: int
    m: int
    spelling = "N:M (such as 2:4)"
    can_reconstruct = True

    @classmethod
    def read(cls, text: str) -> "Pattern | None":
        """Reads `N:M`."""
        if not (found := re.fullmatch(r"(\d+):(\d+)", text)):
            return None
        n, m = map(int, found.groups())
        if not 0 < n < m:
            raise ValueError(f"granularity N:M keeps N of every M and needs 0 < N < M, got {text!r}.")
        return cls(n, m)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def fixed_sparsity(self) -> float:
        """`1 − N/M`."""
        return 1 - self.n / self.m

    @property
    def pays_if(self) -> str:
        """Kernels for the pattern."""
        kernels = "`hf_prune.to_sparse_semi_structured(model)` does of 2:4 on GPUs"
        return f"a runtime makes use of the pattern {self}, as {kernels}"

    def require_options(self, asked: Mapping[str, object]) -> None:
        """Weights compete within their groups, and nowhere else."""
        for name in ("scope", "layer_sparsity"):
            if name in asked:
                raise ValueError(
                    f"{name} does not apply to granularity {str(self)!r}: weights compete within their groups, and "
                    f"each layer has the same sparsity. Leave {name} out."
                )
        super().require_options(asked)

    def auto_scope(self, scope: str, reconstructs: bool) -> str:
        """A pattern says how sparse each layer is, so that no criterion has to."""
        return "layer" if reconstructs else scope

    def auto_schedule(self, rounds: int | None, initial_sparsity: float | None) -> str:
        """The few steps that a pattern has on its way are taken one by one."""
        if initial_sparsity is not None:
            return "auto"
        return "one_shot" if rounds is None else "constant"

    def attainable(self, sparsities: list[float], rounds_are_asked: bool) -> list[float]:
        """Those of the nearest patterns `k:M`."""
        dropped = [round(value * self.m) for value in sparsities]
        if not rounds_are_asked:
            dropped = sorted(set(dropped) - {0})
        if dropped[-1] != self.m - self.n or any(a >= b for a, b in itertools.pairwise([0, *dropped])):
            raise ValueError(
                f"the rounds of {self} go through (M-1):M, (M-2):M … {self}: each prunes one more or several of every "
                f"{self.m}, and the last ends at {self.fixed_sparsity:g}; got sparsities "
                f"{', '.join(f'{value:g}' for value in sparsities)}. Take fewer rounds, or another schedule."
            )
        return [count / self.m for count in dropped]

    def check(self, targets: Iterable[Target]) -> None:
        """Requires that groups of `m` tile the input dimension of every target."""
        bad = [target for target in targets if target.in_features % self.m]
        if bad:
            widths = ", ".join(f"{target.module!r} has {target.in_features}" for target in bad)
            raise ValueError(f"{self} needs in_features divisible by {self.m}; {widths}. Add to exclude_modules.")

    def mask(self, cut: Cut) -> MaskSet:
        """Keeps the best weights of each group of the pattern that is nearest to the sparsity."""
        pattern, scorer = self.at(cut.sparsity), cut.scorer
        return mask_one_by_one(
            cut, lambda seen, kept: pattern.keep(scorer.of_weights(seen), kept, seen), alone=scorer.is_elementwise
        )

    def quotas(self, cut: Cut) -> Mapping[str, Quota]:
        """The pattern that is nearest to the sparsity, everywhere."""
        pattern = self.at(cut.sparsity)
        for name, mask in cut.masks.items():
            pattern.require_room(mask, cut.targets[name])
        return dict.fromkeys(cut.targets, pattern)

    def nearest(self, sparsities: list[float]) -> list[float]:
        """Those of the nearest patterns."""
        return sorted({round(sparsity * self.m) / self.m for sparsity in sparsities})

    def keep(self, scores: torch.Tensor, kept: torch.Tensor | None, target: Target) -> torch.Tensor:
        """The mask that keeps the `n` best of each group; ties keep the last by position.

        Args:
            scores: Of the weight's shape.
            kept: Mask of the weight's shape that must not grow, or None.
            target: The weight's target.

        Returns:
            Bool mask of the weight's shape.

        Raises:
            ValueError: if a score is NaN, or `kept` holds more than `m − n` zeros of a group already.
        """
        if kept is not None:
            self.require_room(kept, target)
        alive = None if kept is None else target.to_matrix(kept).reshape(-1, self.m)
        groups = target.to_matrix(scores).reshape(-1, self.m)
        mask = drop_lowest_of_each(target.name, groups, self.m - self.n, alive)
        return target.from_matrix(mask).contiguous()

    def at(self, sparsity: float) -> "Pattern":
        """The pattern of as large groups that is nearest to a sparsity."""
        return Pattern(self.m - round(sparsity * self.m), self.m)

    def require_room(self, kept: torch.Tensor, target: Target) -> None:
        """Requires that each group of a mask keeps at least `n`."""
        if (target.to_matrix(kept).reshape(-1, self.m).sum(1) < self.n).any():
            raise ValueError(
                f"{target.module!r} has groups of {self.m} with more than {self.m - self.n} zeros already; "
                f"they cannot become {self}. Start without hold_zeros."
            )
