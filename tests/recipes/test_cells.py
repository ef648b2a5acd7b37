import os
import signal
from pathlib import Path

import pytest

from common.cells import _run_and_keep, keep_settings, run_cells
from common.grid import DENSE, Cell, Result
from tests.processes import forkserver


def cell(seed: int = 0, schedule: str = "geometric") -> Cell:
    return Cell(schedule, 0.9, "magnitude", "2:4", "equal", 1e-3, 10, seed)


def scored(cell: Cell) -> Result:
    """Runs in another process; fails for one of the cells."""
    if cell.schedule == "cubic":
        raise RuntimeError("it does not fit")
    if cell.schedule == "constant":
        os.kill(os.getpid(), signal.SIGKILL)
    return {
        "metric": "loss", "validation": 1.0 + cell.seed, "test": 2.0, "dense_validation": 1.0, "dense_test": 1.0,
        "reached": 0.9, "seconds": float(os.getpid()), "history": None,
    }  # fmt: skip


@pytest.fixture(autouse=True)
def _workers_that_begin_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a study begin from nothing, which takes seconds each time; one that is run whole has them so."""
    monkeypatch.setattr("common.cells.get_context", lambda _: forkserver())


def run(folder: Path, *cells: Cell) -> dict[Cell, Result]:
    return run_cells(cells, scored, folder, 2)


def test_finished_cells_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run(tmp_path, cell(0), cell(1), cell(0))
    assert [result["validation"] for result in first.values()] == [1.0, 2.0]
    assert os.getpid() not in [result["seconds"] for result in first.values()]
    assert "2 cells, 0 of them finished before." in capsys.readouterr().out
    second = run(tmp_path, cell(2), cell(1), cell(0))
    assert list(second) == [cell(2), cell(1), cell(0)]
    assert all(second[c]["seconds"] == first[c]["seconds"] for c in first)
    assert "3 cells, 2 of them finished before." in capsys.readouterr().out
    run(tmp_path, cell(0))
    assert capsys.readouterr().out == ""


def test_a_cell_that_fails_is_reported_and_the_rest_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = run(tmp_path, cell(schedule="cubic"), cell(0), cell(1))
    assert list(results) == [cell(0), cell(1)]
    assert (
        "cubic-0.9-magnitude-2_4-equal-0.001-10-0: FAILED with RuntimeError('it does not fit')"
        in capsys.readouterr().out
    )
    (error,) = tmp_path.glob("*.error")
    assert "it does not fit" in error.read_text()
    run(tmp_path, cell(schedule="cubic"))
    assert "FAILED" in capsys.readouterr().out  # It is tried again.


def test_a_cell_whose_process_is_killed_is_reported_and_the_rest_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    healthy = [cell(seed) for seed in range(6)]
    killers = [cell(0, "constant"), cell(1, "constant"), cell(2, "constant")]
    results = run(tmp_path, *healthy[:2], killers[0], *healthy[2:4], *killers[1:], *healthy[4:])
    said = capsys.readouterr().out
    for killer in killers:
        assert f"{killer.name}: FAILED: its process was killed, or one beside it" in said
    # Of those beside them one may have been given up, and is tried again the next time.
    assert len(run(tmp_path, *healthy)) == 6
    assert set(results) <= set(healthy)
    assert len(results) >= 3


def test_half_a_cell_is_no_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "replace", lambda *_: 1 / 0)  # as if it were killed between writing and renaming
    with pytest.raises(ZeroDivisionError):
        _run_and_keep(scored, tmp_path, cell(0))
    monkeypatch.undo()
    (half,) = tmp_path.iterdir()
    half.write_text(half.read_text()[:20])
    assert list(run(tmp_path, cell(0))) == [cell(0)]
    assert (tmp_path / f"{cell(0).name}.json").exists()


def test_names_tell_cells_apart() -> None:
    cells = [cell(0), cell(1), cell(0, "hybrid"), Cell(DENSE, 0.0, "", "", "", 1e-3, 10, 0)]
    assert len({c.name for c in cells}) == 4
    assert all(set(c.name).isdisjoint('/\\:*?"<>|') for c in cells)


def test_a_study_goes_on_with_the_arguments_with_which_it_was_begun(tmp_path: Path) -> None:
    path = tmp_path / "study" / "settings.json"
    settings = {"block_size": 64, "dataset": "stories", "output_dir": "a", "logging_steps": 1}
    keep_settings(path, settings)
    keep_settings(path, {**settings, "output_dir": "b", "logging_steps": 5, "report_to": "none"})
    with pytest.raises(
        ValueError, match=r"holds a study with other arguments: block_size=64 \(now 32\)\. Give another"
    ):
        keep_settings(path, {**settings, "block_size": 32})
