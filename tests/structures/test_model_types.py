"""Every model type of Transformers' mappings: what can be removed is exact, and everything else is an error."""

import importlib
import os
import re
import sys
from pathlib import Path

import pytest
import transformers

ROOT = Path(__file__).parents[2]
TABLE = (ROOT / "docs" / "model_types.md").read_text()
CHUNKS = 12
# All of them take ten minutes of one core: set HF_PRUNE_ALL_MODEL_TYPES=1. Two chunks are always walked.
WALKED = range(CHUNKS if os.environ.get("HF_PRUNE_ALL_MODEL_TYPES") else 2)
CLEAR = (
    "does not know where the family .* has its heads, neurons and layers, and could not find them: .*describe_family",
    "cannot be removed from .*, as a small model of its class shows: .*describe_family",
    "layers of '.*' cannot be removed: .* Choose granularity head",
    "each key-value head in '.*' has one query, or the two are not projected apart, .* Choose granularity head",
    "is made of several models, of which hf_prune prunes one at a time. Give model",
    "is a convolutional network and has no .* that are known. Choose granularity channel",
    "is left to prune. It is left alone if one of its projections is no target",
    "no parameter of .* is left to prune. Prunable are the weights of",
    "no layer of .* can go: no place has more than one",
    "is taken for the (number of heads|width of a head), and is",
    "a sparsity of .* would remove .* and at most .* can go",
    "the router of the experts '.*' is not found: .* Choose granularity unstructured",
    "cannot be removed from .*: a small model of this class without some of them fails .* Choose another granularity",
    "are one tensor; structures of layers that share weights cannot be removed",
)


sys.path.insert(0, str(ROOT / "recipes" / "benchmarks"))  # Scripts find what they import beside them.
walk = importlib.import_module("model_types")


def exact_in_the_table():
    """Model type → the granularities that the table says are exact."""
    rows = [
        line.strip("| ").split("|")
        for line in TABLE.splitlines()
        if line.startswith("| ") and "model type" not in line
    ]
    marks = {row[0].strip(): [cell.strip() == "✓" for cell in (*row[1:], *[""] * 4)] for row in rows}
    return {
        name: {g for g, mark in zip(walk.GRANULARITIES, cells, strict=False) if mark} for name, cells in marks.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("chunk", WALKED)
def test_what_is_removed_is_exact_and_everything_else_an_error(chunk):
    names = list(walk.model_types())[chunk::CHUNKS]
    for name, cells in walk.walk_all(names):
        found = {granularity for granularity, cell in cells.items() if cell == "exact"}
        if f"Transformers {transformers.__version__} " in TABLE:
            assert found == exact_in_the_table().get(name, set()), (name, cells)
        for cell in set(cells.values()) - {"exact"}:
            kind, _, why = cell.partition(": ")
            assert kind == "none" or (kind == "error" and any(re.search(clear, why, re.DOTALL) for clear in CLEAR)), (
                name,
                cell,
            )


def test_the_table_has_many():
    exact = exact_in_the_table()
    everything = [name for name, granularities in exact.items() if granularities >= set(walk.ALL_FOUR)]
    assert len(everything) >= 90
    assert f"The first four: {len(everything)} types" in TABLE


def test_what_differs_is_found():
    """The walk would tell a wrong model from a right one."""
    llama = walk.tiny("llama")
    expected = walk.outputs_of(llama)
    assert walk.gap(walk.outputs_of(llama), expected) == 0
    llama.lm_head.weight.data[0, 0] += 1e-6
    assert walk.gap(walk.outputs_of(llama), expected) > walk.TOLERANCE
    assert walk.gap({}, expected) == float("inf")
