"""The command line: what it prints, and with which code it ends."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2LMHeadModel
from typer.main import get_command
from typer.testing import CliRunner

from hf_prune import (
    PruningConfig,
    PruningHistory,
    SensitivityReport,
    prune,
    push_to_hub,
    save_pretrained,
    sensitivity,
    shrink,
)
from hf_prune.cli import app, main
from hf_prune.config import CONFIG_NAME
from hf_prune.publishing import opening
from hf_prune.publishing.readers import read_batches
from hf_prune.reporting.history import HISTORY_NAME
from tests.hub import environment_of, running_hub, use
from tests.publishing.test_inspection import saved
from tests.publishing.test_readers import images, processor, text
from tests.tiny import build
from tests.words import word_tokenizer


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


def imported_by(names: set[str], *words: object) -> list[str]:
    """Which of some modules a command has imported when it ends."""
    code = f"""
import atexit, sys
atexit.register(lambda: print(*sorted({names} & set(sys.modules)), file=sys.stderr))
from hf_prune.cli import main
main()
"""
    command = [sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()[-1].split()


NOT_FOR_ALL = {"transformers.trainer", "datasets", "evaluate", "peft", "matplotlib", "torch_pruning"}


@pytest.mark.parametrize("words", [["--help"], ["prune", "--help"]])
def test_help_waits_for_nothing(words):
    assert imported_by({*NOT_FOR_ALL, "torch", "transformers", "huggingface_hub", "numpy"}, *words) == []


def test_a_report_waits_neither_for_the_trainer_nor_for_what_is_optional(tmp_path):
    folder = saved(tmp_path, config=PruningConfig(sparsity=0.5, granularity="neuron"))
    assert imported_by({*NOT_FOR_ALL, "transformers"}, "report", folder) == ["transformers"]


def test_help_names_the_files_as_they_are_named():
    commands = get_command(app).commands
    texts = {name: " ".join(option.help for option in commands[name].params if option.help) for name in commands}
    assert CONFIG_NAME in texts["prune"]
    assert HISTORY_NAME in texts["plot"]


def test_the_device_is_a_gpu_where_there_is_one_unless_it_is_given(tmp_path, monkeypatch):
    words = ["prune", dense(tmp_path / "dense"), "--output", tmp_path / "out", "--sparsity", "0.5", "--force"]
    devices, opened = [], opening.open_model
    monkeypatch.setattr(opening, "open_model", lambda folder, device: devices.append(device) or opened(folder, "cpu"))
    for there_is_one in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there_is_one=there_is_one: there_is_one)
        run(*words)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    run(*words, "--device", "cpu")
    assert devices == ["cuda", "cpu", "cpu"]


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


def dense(folder: Path, family: str = "llama") -> Path:
    """A model with its tokenizer or image processor."""
    build(family).save_pretrained(folder)
    if family == "vit":
        processor().save_pretrained(folder)
    else:
        word_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("granularity", ["unstructured", "2:4", "block:2x2", "head", "neuron", "layer"])
def test_prune_does_what_the_function_does(granularity, tmp_path):
    source, output = dense(tmp_path / "dense", "gpt2"), tmp_path / "out"
    sparsity = [] if granularity == "2:4" else ["--sparsity", "0.5"]
    found = json.loads(run("prune", source, "--output", output, "--granularity", granularity, *sparsity, "--json"))
    model = build("gpt2")
    config = PruningConfig(sparsity=0.5, granularity=granularity)
    expected = prune(model, config)
    assert found == json.loads(json.dumps({"output": str(output), **expected.to_dict()}))
    saved_model = GPT2LMHeadModel.from_pretrained(output)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in saved_model.state_dict().items())
    assert PruningConfig.from_pretrained(output).granularity == granularity
    assert AutoTokenizer.from_pretrained(output)("the fox")["input_ids"] == word_tokenizer()("the fox")["input_ids"]
    assert str(expected).splitlines()[-1] in run("prune", source, "--output", output, "--granularity", granularity,
                                                 *sparsity, "--force")  # fmt: skip


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt", "taylor"])
@pytest.mark.parametrize("family", ["llama", "vit"])
def test_prune_looks_at_data(family, criterion, tmp_path):
    source = dense(tmp_path / "dense", family)
    data = images(tmp_path, ["0", "1", "2"]) if family == "vit" else text(tmp_path)
    words = ["--sparsity", "0.5", "--criterion", criterion, "--samples", "8", "--length", "8", "--seed", "3"]
    run(
        "prune", source, "--output", tmp_path / "out", *words, "--calibration", data, "--batch-size", "4", "--compress"
    )
    model = build(family)
    processing = [processor() if family == "vit" else word_tokenizer()]
    batches = read_batches(data, model, processing, samples=8, batch_size=4, length=8, seed=3)
    prune(model, PruningConfig(sparsity=0.5, criterion=criterion, calibration_samples=8), batches, seed=3)
    again = type(model).from_pretrained(tmp_path / "out")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_prune_takes_what_is_about_structures(tmp_path):
    source, data = dense(tmp_path / "dense"), text(tmp_path)
    words = ["--granularity", "neuron", "--sparsity", "0.5", "--multiple-of", "4", "--uniform", "--reconstruct"]
    sizes = ["--samples", "8", "--length", "8", "--batch-size", "4"]
    run("prune", source, "--output", tmp_path / "out", *words, "--calibration", data, *sizes)
    model = build("llama")
    batches = read_batches(data, model, [word_tokenizer()], samples=8, batch_size=4, length=8, seed=0)
    how = dict(multiple_of=4, uniform=True, reconstruct=True, calibration_samples=8)
    config = PruningConfig(sparsity=0.5, granularity="neuron", **how)
    prune(model, config, batches)
    again = type(model).from_pretrained(tmp_path / "out")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert PruningConfig.from_pretrained(tmp_path / "out") == config


@pytest.mark.parametrize("measure", ["parameters", "flops"])
def test_prune_until_so_much_is_left(measure, tmp_path):
    source, data = dense(tmp_path / "dense"), text(tmp_path)
    words = ["--granularity", "query+neuron", f"--keep-{measure}", "0.8", "--multiple-of", "4", "--json"]
    if measure == "flops":
        words += ["--calibration", data, "--length", "8", "--batch-size", "4"]
    found = json.loads(run("prune", source, "--output", tmp_path / "out", *words))["remaining"]
    assert (found["measure"], found["asked"]) == (measure, 0.8)
    assert found["left"] == pytest.approx(0.8, abs=0.05)
    assert getattr(PruningConfig.from_pretrained(tmp_path / "out"), f"keep_{measure}") == 0.8
    again = type(build("llama")).from_pretrained(tmp_path / "out")
    zeros = sum(int((p == 0).sum()) for p in again.parameters())
    if measure == "parameters":
        assert 1 - zeros / again.num_parameters() == pytest.approx(found["left"])


def test_prune_keeps_what_a_calibration_finds(tmp_path):
    source, data, scores = dense(tmp_path / "dense"), text(tmp_path), tmp_path / "scores.safetensors"
    words = ["--criterion", "taylor", "--scores", scores, "--sparsity"]
    sizes = ["--calibration", data, "--samples", "8", "--length", "8"]
    folders = [tmp_path / name for name in "abc"]
    run("prune", source, "--output", folders[0], *words, "0.5", *sizes)
    written = scores.stat().st_mtime_ns
    run("prune", source, "--output", folders[1], *words, "0.5")
    run("prune", source, "--output", folders[2], *words, "0.7", *sizes)
    assert scores.stat().st_mtime_ns == written
    a, b, c = (type(build("llama")).from_pretrained(folder).state_dict() for folder in folders)
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    assert sum(int((v == 0).sum()) for v in c.values()) > sum(int((v == 0).sum()) for v in b.values())


def test_prune_says_which_scores_it_cannot_take(tmp_path, monkeypatch, capsys):
    source, data, scores = dense(tmp_path / "dense"), text(tmp_path), tmp_path / "scores.safetensors"
    words = ["--output", tmp_path / "out", "--sparsity", "0.5", "--criterion", "wanda", "--scores", scores]
    assert fails(monkeypatch, "prune", source, *words) == 2
    assert "Give --calibration too" in capsys.readouterr().err
    sizes = ["--calibration", data, "--length", "8", "--samples"]
    run("prune", source, *words, *sizes, "8")
    assert fails(monkeypatch, "prune", source, *words, "--force", *sizes, "4") == 2
    assert "was made of 8 samples, not 4" in capsys.readouterr().err


def test_sensitivity_is_measured_and_pruned_by(tmp_path):
    source, data, file = dense(tmp_path / "dense"), text(tmp_path), tmp_path / "sensitivity.json"
    words = [
        "--calibration",
        data,
        "--samples",
        "8",
        "--length",
        "8",
        "--output",
        file,
        "--plot",
        tmp_path / "map.png",
    ]
    words += ["--granularity", "neuron", "--multiple-of", "4", "--levels", "0.25,0.5"]
    text_of_report = run("sensitivity", source, *words)
    assert "all neurons" in text_of_report
    assert f"Saved in {file}." in text_of_report
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    model = build("llama")
    batches = read_batches(data, model, [word_tokenizer()], samples=8, length=8, seed=0)
    config = PruningConfig(sparsity=0.5, granularity="neuron", multiple_of=4, calibration_samples=8)
    report = sensitivity(model, config, batches, levels=(0.25, 0.5))
    assert SensitivityReport.load(file) == report
    asked = [
        "--granularity",
        "neuron",
        "--multiple-of",
        "4",
        "--sparsity",
        "0.3",
        "--layer-sparsity",
        f"@{file}:least",
    ]
    run("prune", source, "--output", tmp_path / "out", *asked)
    config = PruningConfig.from_pretrained(tmp_path / "out")
    assert set(config.own_sparsities) == {re.escape(row.name) for row in report.rows if not row.is_kind}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--levels", "a,b"], "--levels takes numbers with commas between them"),
        (["--levels", "0.5,0.25"], "levels must rise between 0 and 1"),
        (["--granularity", "2:4", "--levels", "0.25"], "contradict|fixes sparsity|has one sparsity"),
    ],
)
def test_sensitivity_says_what_is_wrong(words, message, tmp_path, monkeypatch, capsys):
    source, data, file = dense(tmp_path / "dense"), text(tmp_path), tmp_path / "sensitivity.json"
    asked = ["--calibration", data, "--samples", "4", "--length", "8", "--output", file]
    assert fails(monkeypatch, "sensitivity", source, *asked, *words) == 2
    assert re.search(message, capsys.readouterr().err)
    file.write_text("mine")
    assert fails(monkeypatch, "sensitivity", source, *asked) == 2
    assert "is there already. Give --force" in capsys.readouterr().err
    assert file.read_text() == "mine"


def test_prune_by_a_saved_config(tmp_path):
    source = dense(tmp_path / "dense")
    PruningConfig(sparsity=0.5, exclude_modules=["up_proj"]).save_pretrained(tmp_path / "config")
    words = ["--config", tmp_path / "config", "--sparsity", "0.75", "--output", tmp_path / "out"]
    rows = {row["name"]: row for row in json.loads(run("prune", source, *words, "--json"))["modules"]}
    assert not any("up_proj" in name for name in rows)
    assert PruningConfig.from_pretrained(tmp_path / "out").sparsity == 0.75


@pytest.mark.parametrize("family", ["gpt2", "vit", "resnet"])
def test_shrink_removes_what_prune_has_zeroed(family, tmp_path):
    source, kind = tmp_path / "dense", "channel" if family == "resnet" else "head+neuron"
    build(family).save_pretrained(source)
    config = PruningConfig(sparsity=0.5, granularity=kind, multiple_of=1)
    config.save_pretrained(tmp_path / "config")
    run("prune", source, "--output", tmp_path / "pruned", "--config", tmp_path / "config")
    counts = json.loads(run("shrink", tmp_path / "pruned", "--output", tmp_path / "small", "--json"))
    model = build(family)
    before = model.num_parameters()
    prune(model, config)
    shrink(model)
    assert (counts["masked_parameters"], counts["shrunk_parameters"]) == (before, model.num_parameters())
    again = type(model).from_pretrained(tmp_path / "small")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
    card = (tmp_path / "small" / "README.md").read_text()
    assert (
        f"pruned with hf_prune: some of its {'channels' if kind == 'channel' else 'heads and neurons'} were removed"
        in card
    )
    assert f"{before:,} | {model.num_parameters():,}" in card


def test_a_model_that_is_shrunk_twice_is_compared_with_the_first(tmp_path):
    source = tmp_path / "dense"
    build("gpt2").save_pretrained(source)
    counts = []
    for number, kind in enumerate(("head", "neuron")):
        pruned, source_of = tmp_path / f"pruned-{number}", tmp_path / f"small-{number}"
        run("prune", source, "--output", pruned, "--granularity", kind, "--sparsity", "0.5")
        if (source / "pruning_history.json").is_file():
            shutil.copy(source / "pruning_history.json", pruned)
        counts.append(json.loads(run("shrink", pruned, "--output", source_of, "--json")))
        source = source_of
    assert counts[0]["masked_parameters"] == counts[1]["masked_parameters"] == build("gpt2").num_parameters()
    assert counts[1]["shrunk_parameters"] < counts[0]["shrunk_parameters"]


def test_a_card_names_the_dense_model_that_the_card_before_it_names(tmp_path):
    source = dense(tmp_path / "dense", "gpt2")
    prune_words = ["--granularity", "neuron", "--sparsity", "0.5"]
    save_pretrained(build("gpt2"), source, base_model="somebody/gpt")
    run("prune", source, "--output", tmp_path / "pruned", *prune_words)
    run("shrink", tmp_path / "pruned", "--output", tmp_path / "small")
    assert ModelCard.load(tmp_path / "small" / "README.md").data.base_model == "somebody/gpt"
    (source / "README.md").write_text("---\n: [\n---\n")
    run("prune", source, "--output", tmp_path / "pruned", *prune_words, "--force")
    assert ModelCard.load(tmp_path / "pruned" / "README.md").data.base_model is None
    for name, expected in (("[org/x]", "org/x"), ("[a/b, c/d]", None), ("'[x](javascript:alert(1))'", None)):
        (source / "README.md").write_text(f"---\nbase_model: {name}\n---\n")
        run("prune", source, "--output", tmp_path / "pruned", *prune_words, "--force")
        assert ModelCard.load(tmp_path / "pruned" / "README.md").data.base_model == expected


def test_a_model_of_the_hub_is_pruned(tmp_path, monkeypatch):
    with running_hub() as hub:
        use(hub.url, monkeypatch, str(tmp_path / "cache"))
        push_to_hub(str(dense(tmp_path / "dense")), "mine")
        run("prune", "tester/mine", "--sparsity", "0.5", "--output", tmp_path / "out")
    assert ModelCard.load(tmp_path / "out" / "README.md").data.base_model == "tester/mine"
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize("command", ["prune", "shrink"])
def test_nothing_in_a_folder_is_lost_unless_it_is_forced(command, tmp_path, monkeypatch, capsys):
    source, output = saved(tmp_path / "a", "gpt2", PruningConfig(sparsity=0.5, granularity="head")), tmp_path / "out"
    output.mkdir()
    (output / "model.safetensors").write_text("mine")
    words = [command, source, "--output", output, *(["--sparsity", "0.5"] if command == "prune" else [])]
    assert fails(monkeypatch, *words) == 2
    assert f"hf-prune: {output} is not empty. Give --force to replace the model" in capsys.readouterr().err
    assert (output / "model.safetensors").read_text() == "mine"
    (output / "notes.txt").write_text("mine")
    run(*words, "--force")
    assert (output / "notes.txt").read_text() == "mine"
    GPT2LMHeadModel.from_pretrained(output)
    file = tmp_path / "file"
    file.write_text("mine")
    assert fails(monkeypatch, *words[:3], file, *words[4:], "--force") == 2
    assert "is a file, and a model is saved into a folder" in capsys.readouterr().err


def test_what_is_in_the_way_is_found_before_anything_is_written(tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    (output / "config.json").mkdir(parents=True)
    words = ["prune", dense(tmp_path / "dense"), "--output", output, "--sparsity", "0.5", "--force"]
    assert fails(monkeypatch, *words) == 2
    assert "config.json is a folder, where a file is to be written" in capsys.readouterr().err
    assert [path.name for path in output.iterdir()] == ["config.json"]


def test_a_model_is_pruned_in_its_place_if_that_is_forced(tmp_path):
    source = dense(tmp_path / "dense")
    run("prune", source, "--output", source, "--sparsity", "0.5", "--force")
    assert json.loads(run("report", source, "--json"))["zeros"] > 0


def test_a_compressed_model_is_shrunk_into_a_compressed_one(tmp_path):
    source = tmp_path / "dense"
    build("gpt2").save_pretrained(source)
    run("prune", source, "--output", tmp_path / "a", "--sparsity", "0.9")
    run("prune", tmp_path / "a", "--output", tmp_path / "b", "--sparsity", "0.5", "--granularity", "neuron")
    run("shrink", tmp_path / "b", "--output", tmp_path / "c", "--compress")
    found = json.loads(run("report", tmp_path / "c", "--json"))
    assert any(row["compressed"] for row in found["tensors"])
    assert found["zeros"] > 0
    card = (tmp_path / "c" / "README.md").read_text()
    assert "some of its neurons were removed" in card
    assert "Zeros alone make nothing faster" in card


@pytest.mark.parametrize("damage", ["missing", "truncated", "shapes"])
@pytest.mark.parametrize("command", ["prune", "shrink"])
def test_damaged_weights_are_a_line(command, damage, tmp_path, monkeypatch, capsys):
    folder = saved(tmp_path / "a", "gpt2", PruningConfig(sparsity=0.5, granularity="head"))
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "missing":
        save_file({name: tensor for name, tensor in tensors.items() if "c_fc.weight" not in name}, file)
    else:
        save_file({**tensors, "transformer.h.0.mlp.c_fc.weight": torch.ones(3, 3)}, file)
    words = ["--sparsity", "0.5"] if command == "prune" else []
    assert fails(monkeypatch, command, folder, "--output", tmp_path / "out", *words) == 2
    said = {"missing": "lack weights of a GPT2LMHeadModel, which would be random: transformer.h.0.mlp.c_fc.weight, ",
            "truncated": "is truncated or not a file of weights", "shapes": "cannot be loaded"}  # fmt: skip
    assert said[damage] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_error_of_the_network_is_a_line(tmp_path, monkeypatch, capsys):
    with running_hub() as hub:
        use("http://127.0.0.1:1", monkeypatch, str(tmp_path / "cache"))
        assert fails(monkeypatch, "push", saved(tmp_path / "model"), "mine") == 2
        assert "hf-prune: " in capsys.readouterr().err
        assert hub.requests == []


def test_a_missing_package_is_a_line(tmp_path, monkeypatch, capsys):
    folder, page = saved(tmp_path / "model"), tmp_path / "report.html"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert fails(monkeypatch, "report", folder, "--html", page) == 2
    assert "hf-prune: plots need matplotlib: pip install matplotlib." in capsys.readouterr().err
    assert not page.exists()


def test_a_report_as_a_page(tmp_path, monkeypatch, capsys):
    folder, page = saved(tmp_path / "model"), tmp_path / "report.html"
    run("report", folder, "--html", page)
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert fails(monkeypatch, "report", folder, "--html", tmp_path / "none" / "page.html") == 2
    assert "there is no folder" in capsys.readouterr().err
    page.write_text("mine")
    assert fails(monkeypatch, "report", folder, "--html", page) == 2
    assert f"{page} is there already. Give --force" in capsys.readouterr().err
    assert page.read_text() == "mine"


def test_push_and_a_report_of_what_is_on_the_hub(tmp_path, monkeypatch):
    with running_hub() as hub:
        use(hub.url, monkeypatch, str(tmp_path / "cache"))
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
        (["push", ".", "mine"], "is not a saved model"),
        (["plot", "no-such-history.json"], "No such file"),
        (["prune", ".", "--sparsity", "0.5", "--output", "out"], "is not a saved model"),
        (["prune", ".", "--output", "out"], "sparsity is missing"),
        (["prune", ".", "--sparsity", "80", "--output", "out"], "Did you mean 0.8?"),
        (["prune", ".", "--sparsity", "0.5", "--criterion", "best", "--output", "out"], "criterion must be one of"),
        (["prune", ".", "--config", "none", "--output", "out"], "no pruning_config.json in none"),
        (["prune", ".", "--sparsity", "0.5", "--calibration", ".", "--output", "out"], "looks at no data"),
        (["prune", ".", "--sparsity", "0.5", "--length", "8", "--output", "out"], "need --calibration"),
        (["shrink", ".", "--output", "out"], "is not a saved model"),
    ],
)
def test_what_a_user_can_mend_is_said_in_a_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert fails(monkeypatch, *words) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("hf-prune: ")
    assert message in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prune", "--sparsity", "0.5", "--criterion", "wanda"], "Give a dataloader of calibration samples"),
        (["prune", "--sparsity", "0.5", "--criterion", "wanda", "--calibration", "none"], "no calibration samples in"),
        (["prune", "--sparsity", "0.5", "--granularity", "channel"], "is no convolutional network of images"),
        (["prune", "--sparsity", "0.5", "--device", "abacus"], "there is no device 'abacus' here"),
        (["prune", "--sparsity", "0.5", "--device", "cuda:99"], "there is no device 'cuda:99' here"),
        (["shrink"], "there is nothing to remove"),
    ],
)
def test_what_does_not_fit_the_model_is_said_in_a_line(words, message, tmp_path, monkeypatch, capsys):
    source = dense(tmp_path / "dense")
    assert fails(monkeypatch, words[0], source, "--output", tmp_path / "out", *words[1:]) == 2
    errors = capsys.readouterr().err
    assert "hf-prune: " in errors
    assert message in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()


def test_a_compressed_and_a_plain_model_are_told_apart(tmp_path):
    model = build("llama")
    prune(model, PruningConfig(sparsity=0.8))
    save_pretrained(model, tmp_path, compress=True)
    rows = json.loads(run("report", tmp_path, "--json"))["tensors"]
    assert {row["compressed"] for row in rows} == {True, False}
