"""Checks: what a field of a config may hold."""

import re
from types import NoneType
from typing import get_args, get_origin


def require_kind(name: str, value: object, hint: object) -> None:
    """Requires the type that an annotation names. What a list or dict holds is not looked at.

    Raises:
        ValueError: if it is not.
    """
    kinds = [get_origin(kind) or kind for kind in get_args(hint) or (hint,)]
    # Whole numbers pass for fractions, but True and False do not pass for numbers.
    allowed = [*kinds, int] if float in kinds else kinds
    if not isinstance(value, tuple(allowed)) or isinstance(value, bool) != (bool in kinds):
        words = " or ".join("None" if kind is NoneType else kind.__name__ for kind in kinds)
        raise ValueError(f"{name} must be {words}, got {value!r}.")


def require_fraction(name: str, value: object) -> None:
    """Requires a number in `[0, 1)`.

    Raises:
        ValueError: if it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number in [0, 1), got {value!r}.")
    if not 0 <= value < 1:
        hint = f" Did you mean {value / 100:g}?" if 1 < value < 100 else ""
        raise ValueError(f"{name} must be in [0, 1), got {value}.{hint}")


def require_regex(name: str, pattern: str) -> None:
    """Requires a regular expression.

    Raises:
        ValueError: if it is none.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name}: {pattern!r} is not a regular expression ({error}).") from error
