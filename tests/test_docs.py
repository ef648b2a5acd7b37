"""The pages tell the truth: their Python and commands run, and their links lead somewhere."""

import re
import shlex
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
from typer.main import get_command
from typer.testing import CliRunner

import hf_prune
from hf_prune import PruningConfig, prune
from hf_prune.cli import app
from tests.hub import running_hub, use
from tests.recipes.conftest import RECIPES
from tests.reporting.test_history import history
from tests.structures.models import GROUPED
from tests.structures.models import build as build_of_structures
from tests.structures.test_configs import llava
from tests.tiny import batch, build
from tests.words import word_tokenizer

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", RECIPES / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}


def in_blocks(language: str, name: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXTS[name], flags=re.DOTALL)


def commands_of(name: str, start: str) -> list[list[str]]:
    """The words of each command in a page's blocks that starts so."""
    lines = "\n".join(in_blocks("bash", name)).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith(start)]


def test_the_front_page_is_short_and_begins_with_the_callback():
    assert len(TEXTS["README.md"].splitlines()) <= 200
    assert "PruningTrainerCallback" in in_blocks("python", "README.md")[0]


# Python

BLOCKS = [
    pytest.param(block, id=f"{name}-{number}")
    for name in TEXTS
    for number, block in enumerate(in_blocks("python", name), 1)
]


def save_model_of_2_4(folder):
    """One whose shapes the kernels of GPUs take."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    prune(model, PruningConfig(granularity="2:4"))
    model.save_pretrained(folder)


@pytest.mark.parametrize("block", BLOCKS)
def test_python_runs(block, tmp_path, capsys, monkeypatch):
    if ".cuda()" in block:
        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")
        save_model_of_2_4(tmp_path / "half")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = llava(GROUPED) if "language_model" in block else build("gpt_neo")
    arguments = TrainingArguments(
        "out", max_steps=10, use_cpu=True, report_to="none", disable_tqdm=True, eval_strategy="steps", eval_steps=5,
        dataloader_pin_memory=False,
    )  # fmt: skip
    names = {"model": model, "args": arguments, "train_dataset": batch(model, 24), "eval_dataset": batch(model, 8)}
    with running_hub() as hub:
        use(hub.url, monkeypatch, "cache")
        exec(compile(block, "a page", "exec"), names)
    if "print(" in block:
        assert capsys.readouterr().out.strip()


# Links


def prose_of(page: Path) -> str:
    """A page without its blocks of code, in which `#` begins a comment."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", prose_of(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = prose_of(page)
    for path in re.findall(r'src="([^"]+)"', text):
        assert (page.parent / path).is_file(), path
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), anchor


def test_links_of_the_site_stay_in_it():
    for name in TEXTS:
        if name.startswith("docs/"):
            for path in re.findall(r"\]\((?!https?:)([^)#]+)", prose_of(ROOT / name)):
                assert (ROOT / name).parent.joinpath(path).resolve().is_relative_to(ROOT / "docs"), (name, path)


def test_the_reference_has_all_that_is_public():
    named = re.findall(r"^::: hf_prune\.(.+)$", "\n".join(TEXTS.values()), flags=re.MULTILINE)
    rooms = {"criteria", "schedules", "granularities", "scopes", "metrics", "recovery.distillation"}
    assert set(named) >= {*hf_prune.__all__, *rooms}
    assert len(named) == len(set(named))


# Commands


def test_each_command_of_hf_prune_is_shown():
    shown = {words[1] for name in TEXTS for words in commands_of(name, "hf-prune ")}
    assert shown == set(get_command(app).commands)


@pytest.mark.parametrize("name", [name for name in TEXTS if commands_of(name, "hf-prune ")])
def test_commands_run_one_after_the_other(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = build_of_structures("gpt_neox")
    for folder in ("dense", "before", "after"):
        model.save_pretrained(folder)
        word_tokenizer().save_pretrained(folder)
        prune(model, PruningConfig(sparsity=0.3 if folder == "dense" else 0.6))
    Path("text.txt").write_text("the fox " * 2000)
    Path("output/tinystories").mkdir(parents=True)
    history().save("output/tinystories/pruning_history.json")
    with running_hub() as hub:
        use(hub.url, monkeypatch, "cache")
        hub.files["EleutherAI/pythia-70m"] = {path.name: path.read_bytes() for path in Path("dense").iterdir()}
        commands = [words for _, *words in commands_of(name, "hf-prune ")]
        for words in commands:
            done = CliRunner().invoke(app, words)
            assert done.exit_code == (words[0] == "diff"), (words, done.output, done.exception)
        for _, _, repository in (words for words in commands if words[0] == "push"):
            assert "model.safetensors" in hub.files[f"tester/{repository}"]
    for words in commands:
        made = [words[i + 1] for i, word in enumerate(words) if word in ("--output", "--html")]
        assert all(Path(path).exists() for path in made or ["pruning.png"] * (words[0] == "plot"))


OWN_FLAGS = {
    "study": "StudyArguments",
    "criteria": "CriteriaArguments",
    "recovery": "RecoveryArguments",
    "sensitivity": "SensitivityArguments",
}


def recipes_in(name):
    """Recipe, and what stands before and behind it, of each command of a page that runs one."""
    for words in [*commands_of(name, "accelerate launch "), *commands_of(name, "python recipes/")]:
        at = next(i for i, word in enumerate(words) if word.startswith("recipes/") and word.endswith(".py"))
        yield words[:at], words[at], words[at + 1 :]


@pytest.mark.parametrize("name", [name for name in TEXTS if any(recipes_in(name))])
def test_recipes_take_the_flags_they_are_given(name, tmp_path, monkeypatch):
    common = import_module("common.arguments")
    monkeypatch.chdir(tmp_path)
    for launcher, script, flags in recipes_in(name):
        assert (ROOT / script).is_file(), script
        assert all((ROOT / word).is_file() for word in launcher if word.endswith(".yaml"))
        if script.startswith("recipes/benchmarks/"):
            known = "".join(
                (ROOT / "recipes/benchmarks" / f).read_text() for f in (Path(script).name, "isolated.py", "prose.py")
            )
            assert all(f'"{flag}"' in known for flag in flags if flag.startswith("--")), flags
            continue
        # Parsed on any machine, whatever a flag such as --bf16 needs in the run.
        monkeypatch.setattr(sys, "argv", [script, *flags, "--use_cpu"])
        recipe = import_module(Path(script).stem)
        if own := OWN_FLAGS.get(recipe.__name__):
            common.parse_task(getattr(recipe, own), recipe.RECIPES, "output")
        else:
            common.parse(recipe.ScriptArguments, recipe.DEFAULTS, recipe.SMALL_MODEL, recipe.PRUNING)
