"""`layer_sparsity`: own sparsities by regular expressions of module names, as a config gives them.

They are written down, or divided by a rule from what `hf_prune.sensitivity` has measured.
"""

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_LARGEST = 1e300

Curve = Sequence[tuple[float, float]]
"""`(sparsity, harm)` points of a place, rising in both, from `(0, 0)`."""


def read(text: str, sparsity: float | None) -> dict[str, float]:
    """Reads own sparsities from the text of a flag: JSON, or `@FILE` with `:RULE` behind, a key of `RULES`.

    Args:
        text: The text.
        sparsity: What all places of a file together come to.

    Raises:
        ValueError: if it is neither, or no such division reaches the sparsity.
        OSError: if there is no such file.
    """
    if text.startswith("@"):
        return _divided(text[1:], sparsity)
    try:
        values = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"layer_sparsity is not JSON ({error}), got {text!r:.200}.") from error
    if not isinstance(values, dict):
        raise ValueError(f'layer_sparsity must be an object such as {{".*mlp.*": 0.9}}, got {text!r}.')
    return values


def require_sensitivity(values: object) -> None:
    """Requires what `SensitivityReport.to_dict` gives, as far as it is read here.

    Raises:
        ValueError: if it is something else.
    """
    if not isinstance(values, Mapping) or not {"dense", "levels", "rows", "greater_is_better"} <= values.keys():
        raise ValueError("this is not a sensitivity report.")
    levels, rows = values["levels"], values["rows"]
    are_levels = isinstance(levels, (list, tuple)) and all(_is_number(level) and 0 < level < 1 for level in levels)
    if not are_levels or not levels or list(levels) != sorted(set(levels)) or not _is_number(values["dense"]):
        raise ValueError(f"levels of a sensitivity report must rise between 0 and 1, got {levels!r}.")
    if not isinstance(rows, (list, tuple)) or not isinstance(values["greater_is_better"], bool):
        raise ValueError("rows of a sensitivity report must be a list, and greater_is_better true or false.")
    for row in rows:
        is_row = isinstance(row, Mapping) and {"name", "total", "values"} <= row.keys()
        if not is_row or not isinstance(row["name"], str) or not _is_number(row["total"]) or row["total"] <= 0:
            raise ValueError(f"a sensitivity report has a row {row!r}.")
        numbers = row["values"]
        if not isinstance(numbers, (list, tuple)) or len(numbers) != len(levels) or not all(map(_is_value, numbers)):
            raise ValueError(f"a sensitivity report has {numbers!r} of {row['name']!r} for {len(levels)} levels.")


def _divided(source: str, sparsity: float | None) -> dict[str, float]:
    path, _, rule = source.rpartition(":") if source.rpartition(":")[2] in RULES else (source, "", "equal")
    if not Path(path).is_file():
        raise FileNotFoundError(f"layer_sparsity: there is no file {path!r}.")
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        require_sensitivity(report)
    except (RecursionError, ValueError) as error:
        raise ValueError(f"layer_sparsity: {path} is not a sensitivity report ({error}).") from error
    if sparsity is None:
        raise ValueError("layer_sparsity from a file divides a sparsity among layers: give one.")
    places = [row for row in report["rows"] if not row.get("is_kind")]
    if not places:
        raise ValueError(f"layer_sparsity: {path} measures kinds as a whole, and no single places.")
    curves = [_curve_of(report, row["values"]) for row in places]
    sizes = [float(row["total"]) for row in places]
    if len({row["name"] for row in places}) < len(places):
        raise ValueError(f"layer_sparsity: {path} has several rows of one name.")
    most = sum(curve[-1][0] * size for curve, size in zip(curves, sizes, strict=True)) / sum(sizes)
    if sparsity > most + 1e-9:
        raise ValueError(
            f"layer_sparsity: {path} measures up to {most:.4g}, and a sparsity of {sparsity:g} needs more. Measure "
            "higher levels."
        )
    shares = RULES[rule](curves, sizes, sparsity)
    return {re.escape(row["name"]): share for row, share in zip(places, shares, strict=True)}


def _curve_of(report: Mapping[str, Any], values: Sequence[float | None]) -> Curve:
    """What a place costs, which never falls as more of it goes, up to where it was measured."""
    sign, curve, worst = (-1 if report["greater_is_better"] else 1), [(0.0, 0.0)], 0.0
    for level, value in zip(report["levels"], values, strict=True):
        if value is None:
            break
        worst = max(worst, sign * (value - report["dense"]))
        curve.append((float(level), worst))
    return curve


def equal_harm(curves: Sequence[Curve], sizes: Sequence[float], sparsity: float) -> list[float]:
    """Each place costs as much by itself, between levels in proportion; none goes beyond its last one.

    Args:
        curves: What each place costs.
        sizes: How large each is.
        sparsity: What all of them come to.

    Returns:
        The sparsity of each.
    """

    def shares(harm: float) -> list[float]:
        return [_most_within(curve, harm) for curve in curves]

    return _level_at(shares, sizes, sparsity, max(curve[-1][1] for curve in curves))


def least_harm(curves: Sequence[Curve], sizes: Sequence[float], sparsity: float) -> list[float]:
    """What all places cost together is the least: the next piece goes where it costs the least for its size.

    Of a place whose pieces get cheaper, those up to a level count as one. Arguments and result are those of
    `equal_harm`.
    """
    pieces = []
    for i, curve in enumerate(curves):
        hull = _convex(curve)
        for (a, low), (b, high) in itertools.pairwise(hull):
            pieces.append(((high - low) / ((b - a) * sizes[i]), i, b - a))
    shares, left = [0.0] * len(curves), sparsity * sum(sizes)
    for _, i, width in sorted(pieces):  # Those of one place come in their order: their slopes rise.
        taken = min(width, left / sizes[i])
        shares[i] += taken
        left -= taken * sizes[i]
    return shares


RULES: dict[str, Callable[[Sequence[Curve], Sequence[float], float], list[float]]] = {
    "equal": equal_harm,
    "least": least_harm,
}
"""How a sparsity is divided among places by what each costs."""


def _most_within(curve: Curve, harm: float) -> float:
    """The highest sparsity that costs at most as much."""
    for (a, low), (b, high) in itertools.pairwise(curve):
        if high > harm:
            return a + (b - a) * (harm - low) / (high - low)
    return curve[-1][0]


def _level_at(
    shares: Callable[[float], list[float]], sizes: Sequence[float], sparsity: float, highest: float
) -> list[float]:
    """The shares at the level at which they come to a sparsity."""
    low, high = 0.0, highest
    for _ in range(100):
        middle = (low + high) / 2
        total = sum(share * size for share, size in zip(shares(middle), sizes, strict=True))
        low, high = (middle, high) if total < sparsity * sum(sizes) else (low, middle)
    found = shares(high)
    # Where many are free of harm, they are more than asked for at any level.
    total = sum(share * size for share, size in zip(found, sizes, strict=True))
    scale = min(1.0, sparsity * sum(sizes) / total) if total else 1.0
    return [share * scale for share in found]


def _convex(curve: Curve) -> list[tuple[float, float]]:
    """The lower convex hull of a curve."""
    hull: list[tuple[float, float]] = []
    for x, y in curve:
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (y - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((x, y))
    return hull


def _is_number(value: object) -> bool:
    # Compared, since whole numbers may be too large to be any other.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -_LARGEST <= value <= _LARGEST


def _is_value(value: object) -> bool:
    return value is None or _is_number(value)
