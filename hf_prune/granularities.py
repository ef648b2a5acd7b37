"""Granularities: what is removed together.

Each is a class that does its own work: see `hf_prune.selection.granularity`. One more is one more class, and its name
in `GRANULARITIES`.
"""

from dataclasses import replace
from typing import Any, cast

from .selection.granularity import Granularity
from .selection.patterns import Pattern
from .selection.weight_groups import Block, Unstructured
from .selection.whole_structures import Structural

__all__ = ["GRANULARITIES", "Block", "Granularity", "Pattern", "Structural", "Unstructured", "parse"]

GRANULARITIES: tuple[type[Granularity], ...] = (Unstructured, Pattern, Block, Structural)


def parse(text: str, **options: object) -> Granularity:
    """Reads a granularity as a config spells it.

    Args:
        text: `unstructured`, `N:M` such as `2:4`, `block:RxC` such as `block:4x4`, or kinds of structures
            (`KINDS`), joined by +.
        options: Other fields of the config; those that the granularity has too are filled in.

    Returns:
        The record.

    Raises:
        ValueError: if it is none of these, or `N:M` without `0 < N < M`, or a block without positive sides, or kinds
            of structures that do not go together.

    Example:
        >>> parse("2:4"), parse("block:4x8")
        (Pattern(n=2, m=4), Block(rows=4, columns=8))
    """
    for kind in GRANULARITIES:
        if (granularity := kind.read(text)) is not None:
            return replace(cast(Any, granularity), **{name: options[name] for name in kind.options if name in options})
    *spellings, last = (kind.spelling for kind in GRANULARITIES)
    raise ValueError(f"granularity must be {', '.join(spellings)} or {last}; got {text!r}.")
