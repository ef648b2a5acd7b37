"""Which model types of Transformers lose heads, neurons and layers exactly, from tiny models of their default configs.

python recipes/benchmarks/model_types.py
python recipes/benchmarks/model_types.py llama bert --markdown docs/model_types.md

Each type of the mappings for causal and masked language models, sequence-to-sequence models and image classification
gives one model: few layers, narrow, random weights in float64. A part of it is pruned, it is shrunk, saved, and loaded
in a new process. All three have to give the same outputs, up to 1e-10 of their norm.

exact   masked, shrunk and loaded give the same
error   it cannot be pruned so, and pruning says why before anything is changed
none    no tiny model can be built from the default config, or called
"""

import argparse
import contextlib
import copy
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import gap, model_types, outputs_of, tiny

from hf_prune import PruningConfig, prune, shrink

ALL_FOUR = {"head": 0.34, "neuron": 0.3, "head+neuron": 0.34, "layer": 0.4}
GRANULARITIES = {**ALL_FOUR, "query": 0.34}
"""Granularity → sparsity."""
TOLERANCE = 1e-10


def walk(model_type: str, folder: Path) -> dict[str, str]:
    """Prunes and shrinks a tiny model of a type by each granularity.

    Args:
        model_type: Its type.
        folder: What is exact is saved in it, one folder for each granularity, with the outputs that it has to give.

    Returns:
        Granularity → "exact", "none: …", "error: …" or "wrong: …".
    """
    try:
        model = tiny(model_type)
    except ValueError as error:
        return dict.fromkeys(GRANULARITIES, f"none: {error}")
    found = {}
    for granularity, sparsity in GRANULARITIES.items():
        pruned = copy.deepcopy(model)
        multiple: Any = {"multiple_of": 1} if "neuron" in granularity else {}
        config = PruningConfig(sparsity=sparsity, granularity=granularity, schedule="one_shot", **multiple)
        try:
            prune(pruned, config)
        except ValueError as error:
            found[granularity] = f"error: {error}"
            continue
        masked = outputs_of(pruned)
        before = pruned.num_parameters()
        shrink(pruned)
        is_same = gap(outputs_of(pruned), masked) <= TOLERANCE and pruned.num_parameters() < before
        found[granularity] = "exact" if is_same else f"wrong: {gap(outputs_of(pruned), masked):.2g}"
        if is_same:
            target = folder / f"{model_type}={granularity}"
            pruned.save_pretrained(target)
            torch.save(masked, target / "expected.pt")
    return found


def load_all(folder: Path) -> dict[str, float]:
    """In a new process: folder of a model → how far what it gives is from what it has to give."""
    gaps = {}
    for path in sorted(folder.iterdir()):
        kind = getattr(transformers, model_types()[path.name.partition("=")[0]])
        try:
            model = kind.from_pretrained(path, dtype=torch.float64, attn_implementation="eager").eval()
            model.double()  # XLNet leaves parts in float32, dense ones too, and cannot be called then.
            gaps[path.name] = gap(outputs_of(model), torch.load(path / "expected.pt"))
        except Exception as error:  # Whatever it is, it was said to be exact.
            print(path.name, f"{type(error).__name__}: {error}", file=sys.stderr)
            gaps[path.name] = float("inf")
    return gaps


def walk_all(names: Iterable[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """`walk` for some model types, with all that is exact loaded again in a new process."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        found = {}
        for name in names:
            try:
                found[name] = walk(name, folder)
            except Exception as error:  # Neither a model nor an error that says why.
                found[name] = dict.fromkeys(GRANULARITIES, f"wrong: {type(error).__name__}: {error}")
        new = subprocess.run([sys.executable, __file__, "--load", root], capture_output=True, text=True, check=False)
        if new.returncode:
            raise RuntimeError(f"what was saved cannot be loaded: {new.stderr[-2000:]}")
        for saved, difference in json.loads(new.stdout.splitlines()[-1]).items():
            if not difference <= TOLERANCE:
                name, _, granularity = saved.partition("=")
                found[name][granularity] = f"wrong: {difference:.2g} in a new process"
    yield from found.items()


def markdown(found: dict[str, dict[str, str]]) -> str:
    """A table of what is exact, and a line for each type of which nothing is."""
    exact = {name: cells for name, cells in found.items() if "exact" in cells.values()}
    counts = Counter(granularity for cells in exact.values() for granularity, cell in cells.items() if cell == "exact")
    everything = sum(all(cells[name] == "exact" for name in ALL_FOUR) for cells in exact.values())
    lines = [
        "# Supported model types",
        "",
        f"Of {len(found)} model types of Transformers {transformers.__version__} (causal and masked language models,",
        "sequence-to-sequence models, image classification), tiny models of default configs were pruned, shrunk,",
        "saved and loaded in a new process. A ✓ means that all gave the same outputs, to 1e-10 in float64. Everything",
        "else ends in an error before anything is changed. `python recipes/benchmarks/model_types.py` prints why.",
        "Where each key-value head has one query, no `query` can go by itself.",
        "",
        f"The first four: {everything} types. "
        + ", ".join(f"`{name}`: {counts[name]}" for name in GRANULARITIES)
        + ".",
        "",
        "| model type | " + " | ".join(f"`{name}`" for name in GRANULARITIES) + " |",
        "|---|" + "---|" * len(GRANULARITIES),
    ]
    for name in sorted(exact):
        cells = ("✓" if exact[name][granularity] == "exact" else "" for granularity in GRANULARITIES)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    rest = {name: cells for name, cells in found.items() if name not in exact}
    nothing = sorted(name for name, cells in rest.items() if not cells["head"].startswith("none"))
    unbuilt = sorted(name for name, cells in rest.items() if cells["head"].startswith("none"))
    lines += ["", f"Nothing of these can go: {', '.join(nothing)}.", ""]
    lines += [f"No tiny model could be built from the default config of: {', '.join(unbuilt)}.", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", help="Model types; all, if none is named.")
    parser.add_argument("--markdown", type=Path, help="Write the table there.")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if args.load:
        print(json.dumps(load_all(args.load)))
        return
    names, found = args.types or list(model_types()), {}
    for start in range(0, len(names), 24):
        for name, cells in walk_all(names[start : start + 24]):
            found[name] = cells
            print(name, json.dumps(cells), flush=True)
    print(Counter(cell.partition(":")[0] for cells in found.values() for cell in cells.values()))
    if args.markdown:
        args.markdown.write_text(markdown(found))


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
