import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

import tinystories
from hf_prune import PruningConfig, sparsity_report
from tests.hub import environment_of, running_hub
from tests.recipes.launch import ROUND, launch, oldest_checkpoint, report_in

SHORT = ("--max_steps=20", "--dense_steps=20", "--num_stories=200")


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("tinystories")
    return folder, launch("tinystories.py", folder, *SHORT)


@pytest.mark.slow
def test_prints_rounds_test_and_stories(short_run: tuple[Path, str]) -> None:
    _, printed = short_run
    assert "Dense model: trained for 20 steps" in printed
    assert [(row[0], row[1], row[2]) for row in ROUND.findall(printed)] == [
        ("1", "0", "0.6838"),
        ("2", "1", "0.7629"),
        ("3", "2", "0.8222"),
        ("4", "3", "0.8666"),
        ("5", "4", "0.9000"),
    ]
    assert "Test perplexity: dense " in printed
    assert "pruned to sparsity 0.9000 " in printed
    assert "Story before: " in printed
    assert "Story after: " in printed


@pytest.mark.slow
def test_saves_all_that_is_needed(short_run: tuple[Path, str]) -> None:
    folder, printed = short_run
    output = folder / "output" / "tinystories"
    names = {path.name for path in output.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "pruning.png", "test_results.json"}
    assert PruningConfig.from_pretrained(output) == PruningConfig(sparsity=0.9)
    assert (output / "pruning.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((output / "test_results.json").read_text())
    assert f"dense {results['dense_test_perplexity']:.4f}" in printed
    assert f"0.9000 {results['test_perplexity']:.4f}" in printed


@pytest.mark.slow
def test_loads_where_hf_prune_is_not_installed(short_run: tuple[Path, str]) -> None:
    output = short_run[0] / "output" / "tinystories"
    script = f"""
import sys
sys.modules["hf_prune"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(output)!r})
model = AutoModelForCausalLM.from_pretrained({str(output)!r})
ids = model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=5, min_new_tokens=5)
print(tokenizer.decode(ids[0])[:16], ids.shape[1] > 5)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "Once upon a time True\n", done.stderr
    assert sparsity_report(AutoModelForCausalLM.from_pretrained(output)).sparsity == pytest.approx(0.9, abs=1e-6)


@pytest.mark.slow
def test_what_is_pushed_has_the_card_of_the_run(short_run: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = short_run
    (tmp_path / "home").mkdir()
    with running_hub() as hub, pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in environment_of(hub, str(tmp_path / "home")).items():
            monkeypatch.setenv(name, value)
        launch("tinystories.py", folder, *SHORT, "--output_dir=pushed", "--push_to_hub", "--hub_model_id=stories")
    files = hub.files["tester/stories"]
    assert files["model.safetensors"] == (folder / "pushed" / "model.safetensors").read_bytes()
    card = ModelCard(files["README.md"].decode())
    results = json.loads((folder / "pushed" / "test_results.json").read_text())
    told = {result.metric_type: result.metric_value for result in card.data.eval_results or ()}
    assert told == {"loss": results["test_loss"], "perplexity": results["test_perplexity"]}
    assert f"{results['dense_test_perplexity']:.4f} | {results['test_perplexity']:.4f}" in card.text


@pytest.mark.slow
def test_found_dense_model_gives_the_same(short_run: tuple[Path, str]) -> None:
    folder, printed = short_run
    again = launch("tinystories.py", folder, *SHORT, "--output_dir=again")
    assert "Dense model: found in dense/gpt_neo-" in again
    assert report_in(again, "again") == report_in(printed, "output/tinystories")


@pytest.mark.slow
def test_resumes(short_run: tuple[Path, str]) -> None:
    folder, printed = short_run
    checkpoint = oldest_checkpoint(folder / "output" / "tinystories")
    flags = ("--output_dir=resumed", f"--resume_from_checkpoint={checkpoint}")
    resumed = launch("tinystories.py", folder, *SHORT, *flags)
    assert report_in(resumed, "resumed") == report_in(printed, "output/tinystories")


@pytest.mark.slow
def test_a_model_and_text_of_ones_own(short_run: tuple[Path, str]) -> None:
    folder, _ = short_run
    data = folder / "data"
    data.mkdir()
    for name in ("train", "validation"):
        (data / f"{name}.txt").write_text("\n\n".join(f"Once there were {i} foxes." for i in range(200)))
    printed = launch(
        "tinystories.py", folder, "--model_name_or_path=output/tinystories", "--dataset=data", "--block_size=32",
        "--max_steps=4", "--granularity=2:4", "--output_dir=own",
    )  # fmt: skip
    assert "Dense model" not in printed
    assert [row[2] for row in ROUND.findall(printed)] == ["0.5000"]
    own, small = (AutoTokenizer.from_pretrained(folder / name) for name in ("own", "output/tinystories"))
    assert own.get_vocab() == small.get_vocab()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset=storys"], "dataset must be 'stories', 'topics'"),
        (["--num_stories=5"], "num_stories must be at least 100, got 5"),
        (["--vocab_size=10"], "vocab_size must be above 256"),
        (["--block_size=100000", "--num_stories=200"], "do not fill one block of 100000 tokens"),
        (["--sparsity=80"], r"sparsity must be in \[0, 1\), got 80.0. Did you mean 0.8\?"),
        (["--dense_steps=0", "--num_stories=200"], "dense_steps must be at least 1, got 0"),
    ],
)
def test_bad_input(run_here: Callable[..., None], tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_here("tinystories.py", "--use_cpu", "--dense_dir=dense", *flags)
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_blocks_longer_than_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["Once upon a time, there was a fox."] * 500
    tokenizer = tinystories.train_tokenizer(texts, vocab_size=300)
    tinystories.small_gpt_neo(tokenizer, block_size=16).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flags = ["--use_cpu", f"--model_name_or_path={tmp_path / 'model'}", "--num_stories=100", "--block_size=17"]
    monkeypatch.setattr(sys, "argv", ["tinystories.py", *flags])
    with pytest.raises(ValueError, match="block_size must be at most 16 for this model, got 17"):
        tinystories.main()


def test_the_small_model_has_about_a_million_weights() -> None:
    tokenizer = tinystories.train_tokenizer(["Once upon a time, there was a fox."], vocab_size=1024)
    model = tinystories.small_gpt_neo(tokenizer, block_size=128)
    assert 0.7e6 < model.num_parameters() < 1.1e6
