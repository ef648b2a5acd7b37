"""The command line: what it prints, and with which code it ends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_prune import PruningConfig, PruningHistory, prune, save_pretrained
from hf_prune.cli import app, main
from tests.hub import environment_of, running_hub, use
from tests.test_inspection import saved
from tests.tiny import build


def run(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """The exit code of a command that fails."""
    monkeypatch.setattr(sys, "argv", ["hf-prune", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code


def test_report(tmp_path):
    folder = saved(tmp_path)
    table = run("report", folder).splitlines()
    assert table[0].split() == ["tensor", "shape", "dtype", "zeros", "sparsity", "N:M", "zero", "rows", "MB"]
    found = json.loads(run("report", folder, "--json"))
    assert found["zeros"] == round(0.8 * 4608)
    assert f"{found['sparsity']:.4f}" in table[-1]
    assert {row["name"] for row in found["tensors"]} > {"lm_head.weight", "model.norm.weight"}


def test_diff_exits_with_1_if_something_differs(tmp_path, monkeypatch):
    first, second = saved(tmp_path / "a"), saved(tmp_path / "b", compress=True)
    assert json.loads(run("diff", first, second, "--json"))["equal"]
    third = saved(tmp_path / "c", config=PruningConfig(sparsity=0.5))
    assert fails(monkeypatch, "diff", first, third) == 1


def test_plot_writes_over_nothing_unless_it_is_forced(tmp_path, monkeypatch, capsys):
    PruningHistory(dense=1.0, evaluations=[(1, 0.5)]).save(tmp_path / "pruning_history.json")
    output = tmp_path / "plot.png"
    assert run("plot", tmp_path, "--output", output).strip() == str(output)
    assert output.read_bytes().startswith(b"\x89PNG")
    output.write_text("mine")
    assert fails(monkeypatch, "plot", tmp_path, "--output", output) == 2
    assert f"hf-prune: {output} is there already. Give --force" in capsys.readouterr().err
    assert output.read_text() == "mine"
    run("plot", tmp_path / "pruning_history.json", "--output", output, "--force")
    assert output.read_bytes().startswith(b"\x89PNG")


def test_push_and_a_report_of_what_is_on_the_hub(tmp_path, monkeypatch):
    with running_hub() as hub:
        use(hub, monkeypatch, str(tmp_path / "cache"))
        folder = saved(tmp_path / "model")
        assert json.loads(run("push", folder, "mine", "--json"))["commit"] == hub.sha("tester/mine")
        (tmp_path / "home").mkdir()
        printed = subprocess.run(
            [sys.executable, "-m", "hf_prune.cli", "report", "tester/mine", "--json"], check=True, text=True,
            stdout=subprocess.PIPE, env={**os.environ, **environment_of(hub, str(tmp_path / "home"))},
            cwd=Path(__file__).parents[1],
        ).stdout  # fmt: skip
        assert json.loads(printed)["zeros"] == round(0.8 * 4608)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["report", "no/such/folder"], "neither a folder nor a name on the Hub"),
        (["report", "."], "is not a saved model"),
        (["push", ".", "mine"], "holds no model"),
        (["plot", "no-such-history.json"], "No such file"),
    ],
)
def test_what_a_user_can_mend_is_said_in_a_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert fails(monkeypatch, *words) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("hf-prune: ")
    assert message in errors
    assert "Traceback" not in errors


def test_a_compressed_and_a_plain_model_are_told_apart(tmp_path):
    model = build("llama")
    prune(model, PruningConfig(sparsity=0.8))
    save_pretrained(model, tmp_path, compress=True)
    rows = json.loads(run("report", tmp_path, "--json"))["tensors"]
    assert {row["compressed"] for row in rows} == {True, False}
