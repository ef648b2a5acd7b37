"""The cells of a study: one training run each, kept when it is finished, so that an interrupted study goes on."""

import dataclasses
import json
import os
import traceback
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import datasets
import torch
import transformers

from common.dense import IRRELEVANT


@dataclass(frozen=True)
class Named:
    """A cell of any kind: JSON primitives, whose values are its name."""

    @property
    def name(self) -> str:
        """A name for a file."""
        return "-".join(map(str, dataclasses.astuple(self))).replace(":", "_")


C = TypeVar("C", bound=Named)
R = TypeVar("R", bound=Mapping[str, Any])


def run_cells(cells: Iterable[C], run: Callable[[C], R], folder: Path, workers: int) -> dict[C, R]:
    """Runs the cells that are not yet in `folder`.

    Args:
        cells: What to run.
        run: Runs one, and gives among others its "metric", "validation" and "seconds". What it raises is reported, and
            the rest goes on.
        folder: Where finished cells are kept, each as JSON.
        workers: Number of processes that run cells side by side, quietly and with one thread each.

    Returns:
        The results of those that did not fail, in the order of `cells`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cells = list(dict.fromkeys(cells))
    results: dict[C, R] = {cell: found for cell in cells if (found := _read(folder, cell)) is not None}
    missing = [cell for cell in cells if cell not in results]
    if missing:
        print(f"{len(cells)} cells, {len(results)} of them finished before.", flush=True)
    todo, done = missing, 0
    while todo:
        ended: dict[C, tuple[R | None, str]] = {}
        # Processes that begin from nothing: a fork of one that has used threads may wait for them forever.
        with ProcessPoolExecutor(workers, get_context("spawn"), _be_quiet) as pool:
            running = {pool.submit(_run_and_keep, run, folder, cell): cell for cell in todo}
            for future in as_completed(running):
                if isinstance(future.exception(), BrokenProcessPool):
                    continue  # A process was killed, and took all others with it: tried again in a new pool.
                ended[running[future]] = future.result()
                done += 1
                print(f"[{done}/{len(missing)}] {running[future].name}: {future.result()[1]}", flush=True)
        if not ended:  # One of those that came first is what kills it.
            ended = dict.fromkeys(todo[:workers], (None, "FAILED: its process was killed, or one beside it"))
            done += len(ended)
            print("\n".join(f"{cell.name}: {said}" for cell, (_, said) in ended.items()), flush=True)
        results |= {cell: result for cell, (result, _) in ended.items() if result is not None}
        todo = [cell for cell in todo if cell not in ended]
    return {cell: results[cell] for cell in cells if cell in results}


def keep_settings(path: Path, settings: Mapping[str, object]) -> None:
    """Writes down with which arguments a study was begun, and requires that it goes on with the same.

    Args:
        path: The file that keeps them.
        settings: Argument → value.

    Raises:
        ValueError: They are others than those of the cells that are there.
    """
    relevant = {name: value for name, value in settings.items() if not name.startswith((*IRRELEVANT, "dense_dir"))}
    now = json.loads(json.dumps(relevant, sort_keys=True, default=str))
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if changed := [name for name in before | now if before.get(name) != now.get(name)]:
            was = ", ".join(f"{name}={before.get(name)!r} (now {now.get(name)!r})" for name in changed)
            raise ValueError(f"{path.parent} holds a study with other arguments: {was}. Give another --output_dir.")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(now, indent=1), encoding="utf-8")


def _be_quiet() -> None:
    """One thread a process, and no progress bars."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _run_and_keep(run: Callable[[C], R], folder: Path, cell: C) -> tuple[R | None, str]:
    failed = folder / f"{cell.name}.error"
    try:
        result = run(cell)
    except Exception as error:  # whatever it is, it is written down and said, and the other cells go on
        failed.write_text(traceback.format_exc(), encoding="utf-8")
        return None, f"FAILED with {error!r}; see {failed}"
    unfinished = folder / f".{cell.name}.{os.getpid()}"
    unfinished.write_text(json.dumps({**dataclasses.asdict(cell), **result}, indent=1), encoding="utf-8")
    unfinished.replace(folder / f"{cell.name}.json")
    failed.unlink(missing_ok=True)
    return result, f"{result['metric']} {result['validation']:.4f} on validation, {result['seconds']:.0f} s"


def _read(folder: Path, cell: Named) -> Any:
    path = folder / f"{cell.name}.json"
    if not path.is_file():
        return None
    asked = dataclasses.asdict(cell)
    return {name: value for name, value in json.loads(path.read_text(encoding="utf-8")).items() if name not in asked}
