"""What a card tells, and what it does not."""

import sys

import pytest
from huggingface_hub import ModelCard
from transformers import LlamaForCausalLM

from hf_prune import PruningConfig, prune, shrink
from hf_prune.plan import resolve
from hf_prune.publishing.cards import Facts, command, loaded_as, model_card, pipeline_tag
from hf_prune.reporting.reports import sparsity_report
from tests.structures.models import build as build_of_structures
from tests.tiny import build

SECRET = "hf_abcdefghijklmnop"


@pytest.mark.parametrize(
    "words",
    [
        ["--hub_token", SECRET], [f"--hub_token={SECRET}"], [f"HF_TOKEN={SECRET}"], ["-t", SECRET],
        ["+hub_token", SECRET],
        ["--password", "a", "b-c"], ["--wandb_key", "abc"], ["--auth", "abc"], ["--pwd=abc"], ["--credentials", "abc"],
        ["--AWS_ACCESS_KEY_ID=abc"], ["https://user:abc@host/x"], ['{"hub_token": "abc"}'], ["--args=hub_token=abc"],
        ["hub_token:abc"],
    ],
)  # fmt: skip
def test_what_is_secret_is_not_on_a_card(words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--max_steps", "20", *words])
    shown = command()
    assert "train.py --max_steps 20" in shown
    assert SECRET not in shown
    assert "abc" not in shown
    assert "***" in shown


def test_what_is_not_secret_is_there(monkeypatch):
    words = ["train.py", "--max_new_tokens", "128", "--tokenizer", "gpt2", "--output_dir=out/a b"]
    monkeypatch.setattr(sys, "argv", words)
    assert command().endswith("train.py --max_new_tokens 128 --tokenizer gpt2 '--output_dir=out/a b'")


def test_bytes_that_are_no_text_do_not_keep_a_model_from_being_saved(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "\udcff"])
    assert command().encode()


@pytest.mark.parametrize(
    ("family", "task"),
    [("llama", "text-generation"), ("vit", "image-classification"), ("bert", "text-classification")],
)
def test_what_a_model_is_for(family, task):
    assert pipeline_tag(build(family)) == task


def test_what_was_shrunk_without_a_trainer_is_gone():
    model, config = build_of_structures("llama"), PruningConfig(sparsity=0.4, granularity="neuron", multiple_of=4)
    prune(model, config)
    before = str(model_card("a", Facts(model, sparsity_report(model, config), settings=resolve(config))))
    assert "Pruned structures are still there, as zeros" in before
    shrink(model)
    after = str(model_card("a", Facts(model, sparsity_report(model, config), settings=resolve(config))))
    assert "Pruned structures were removed, which makes the model smaller and faster." in after
    assert "some of its neurons were removed" in after


def test_where_nothing_tells_what_was_removed_the_card_does_not_either():
    model = build_of_structures("llama")
    config = PruningConfig(sparsity=0.5, granularity="neuron", multiple_of=4, uniform=True)
    prune(model, config)
    shrink(model)
    card = str(model_card("a", Facts(model, sparsity_report(model, config), settings=resolve(config))))
    assert "None of its neurons is zero: what was pruned has been removed, or nothing was." in card


def test_metrics_that_are_no_numbers_are_left_out():
    model = build("llama")
    metrics = {"test_loss": 1.5, "test_x": None, "test_list": [1], "test_runtime": 3.0, "test_steps_per_second": 2.0}
    card = model_card("a", Facts(model, sparsity_report(model), metrics=metrics))
    assert [result.metric_type for result in card.data.eval_results] == ["loss"]


@pytest.mark.parametrize("name", ["user/model", 'my "model"', "C:\\\\x", "ä/ö"])
def test_the_way_to_load_it_is_python(name):
    model = build("llama")
    text = str(model_card("x", Facts(model, sparsity_report(model))))
    block = loaded_as(name, text).split("```python\n")[1].split("```")[0]
    compile(block, "card", "exec")
    found: dict = {}
    exec(block.split("from_pretrained")[1].join(["name = (lambda x: x)", ""]), found)
    assert found["name"] == name
    ModelCard(loaded_as(name, text))


def test_a_class_of_ones_own_is_loaded_as_the_one_of_transformers():
    class Mine(LlamaForCausalLM):
        """With something that is not saved."""

    model = build("llama")
    model.__class__ = Mine
    card = str(model_card("a", Facts(model, sparsity_report(model))))
    assert "from transformers import LlamaForCausalLM\n" in card
