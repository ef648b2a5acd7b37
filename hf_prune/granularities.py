"""Granularities: what is removed together.

Each is a class that does its own work: see `hf_prune.selection.granularity`. One more is one more class, and its name
in `GRANULARITIES`.
"""

from .selection.granularity import Granularity
from .selection.patterns import Pattern
from .selection.structural_granularity import MULTIPLE_OF, Structural
from .selection.weight_groups import Block, Unstructured

__all__ = ["GRANULARITIES", "Block", "Granularity", "Pattern", "Structural", "Unstructured", "parse"]

GRANULARITIES: tuple[type[Granularity], ...] = (Unstructured, Pattern, Block, Structural)


def parse(text: str, *, multiple_of: int = MULTIPLE_OF, uniform: bool = False) -> Granularity:
    """Reads a granularity as a config spells it.

    Args:
        text: `unstructured`, `N:M` such as `2:4`, `block:RxC` such as `block:4x4`, or one of `STRUCTURES`.
        multiple_of: Of structures, as in `Structural`.
        uniform: Of structures, as in `Structural`.

    Returns:
        The record.

    Raises:
        ValueError: if it is none of these, or `N:M` without `0 < N < M`, or a block without positive sides.

    Example:
        >>> parse("2:4"), parse("block:4x8")
        (Pattern(n=2, m=4), Block(rows=4, columns=8))
    """
    for kind in GRANULARITIES:
        if (granularity := kind.read(text, multiple_of, uniform)) is not None:
            return granularity
    *spellings, last = (kind.spelling for kind in GRANULARITIES)
    raise ValueError(f"granularity must be {', '.join(spellings)} or {last}; got {text!r}.")
