"""Nothing that comes after the last step loses a run; and a run that missed its sparsity says so."""

import logging

import pytest
import torch
import transformers

from hf_prune import PruningConfig, PruningHistory, PruningTrainerCallback, prune, sparsity_report
from hf_prune.calibration import costs
from hf_prune.training import run as run_module
from tests.processes import on_two_processes
from tests.structures.models import TOKENS, build
from tests.structures.test_training import samples
from tests.trainers import trainer_factory

HEADS = PruningConfig(sparsity=0.5, granularity="head", calibration_samples=8)


def warnings_in(caplog):
    ours = [record for record in caplog.records if record.name.startswith("hf_prune")]
    return [record.getMessage() for record in ours if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("name", ["bart", "t5", "gpt2", "vit"])
@pytest.mark.parametrize("asks_for", ["checkpointing", "gradients"])
def test_a_pass_that_asks_for_gradients_is_counted_too(name, asks_for, make_trainer, caplog):
    model, pruning = build(name), PruningTrainerCallback(HEADS)
    if asks_for == "gradients":
        model.enable_input_require_grads()
    before = model.num_parameters()
    options = {"gradient_checkpointing": True} if asks_for == "checkpointing" else {}
    make_trainer(model, pruning, train_dataset=samples(model), max_steps=2, **options).train()
    assert model.num_parameters() < before
    assert 0 < pruning.history.costs["shrunk"].flops < pruning.history.costs["masked"].flops
    assert warnings_in(caplog) == []


@pytest.mark.parametrize("error", [AssertionError("no"), KeyError("no"), NotImplementedError("no"), OSError("no")])
def test_costs_that_cannot_be_measured(error, make_trainer, monkeypatch, caplog):
    def fail(*args):
        raise error

    monkeypatch.setattr(costs, "_flops_of", fail)
    model, pruning = build("gpt2"), PruningTrainerCallback(HEADS)
    before = model.num_parameters()
    make_trainer(model, pruning, train_dataset=samples(model), max_steps=2).train()
    assert model.num_parameters() < before
    assert pruning.history.costs["shrunk"].parameters == model.num_parameters()
    assert pruning.history.costs["shrunk"].flops is None
    assert "Only parameters are counted" in caplog.text
    assert "Traceback" in caplog.text


@pytest.mark.parametrize("error", [AssertionError("no"), KeyError("no"), torch.OutOfMemoryError("no")])
def test_a_model_that_cannot_be_shrunk_stays_masked_and_is_saved(error, make_trainer, monkeypatch, caplog, tmp_path):
    def fail(model, *args):
        model.transformer.h = torch.nn.ModuleList()
        raise error

    monkeypatch.setattr(run_module, "shrink_measured", fail)
    model, pruning = build("gpt2"), PruningTrainerCallback(HEADS)
    trainer = make_trainer(model, pruning, train_dataset=samples(model), max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert "The model was not shrunk, and its pruned structures stay in it as zeros." in caplog.text
    assert "Traceback" in caplog.text
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "saved")
    assert sparsity_report(loaded, HEADS).sparsity == 0.5
    assert (tmp_path / "out" / "pruning_history.json").is_file()
    trainer.train()  # It is the same model, and goes on.


def test_reports_that_cannot_be_written(make_trainer, tmp_path, caplog):
    model, pruning = build("gpt2"), PruningTrainerCallback(PruningConfig(sparsity=0.5))
    (tmp_path / "out" / "pruning_history.json").mkdir(parents=True)
    trainer = make_trainer(model, pruning, train_dataset=samples(model), max_steps=2)
    assert trainer.train().global_step == 2
    assert "Config and history of the pruning were not written." in caplog.text
    assert sparsity_report(model).sparsity == pytest.approx(0.5, abs=1e-3)
    trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
    assert "are not among what is uploaded" in caplog.text


def test_best_weights_that_cannot_be_brought_back(make_trainer, monkeypatch, caplog):
    def fail(*args):
        raise FileNotFoundError("the checkpoint is gone")

    monkeypatch.setattr(run_module, "load_renamed_weights_", fail)
    model, pruning = build("gpt2"), PruningTrainerCallback(PruningConfig(sparsity=0.5))
    options = dict(eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, max_steps=4)
    trainer = make_trainer(model, pruning, load_best_model_at_end=True, **options)
    trainer.train()
    assert "The best weights were not brought back, and the model has those of the last step." in caplog.text
    assert sparsity_report(model).sparsity == pruning.masks.sparsity


class Unsendable(Exception):
    """Pickling it fails, as that of an error which holds a lock or a stream."""

    def __reduce__(self):
        raise TypeError("cannot pickle it")


def shrink_on_one_process(rank, folder):
    measured = run_module.shrink_measured

    def fail_on_the_second(*args):
        found = measured(*args)
        if rank == 1:
            raise Unsendable
        return found

    run_module.shrink_measured = fail_on_the_second
    model, pruning = build("gpt2"), PruningTrainerCallback(HEADS)
    before = model.num_parameters()
    trainer_factory(folder)(model, pruning, train_dataset=samples(model), max_steps=2).train()
    return [before == model.num_parameters(), pruning.history.costs == {}, sparsity_report(model, HEADS).sparsity]


@pytest.mark.multiprocess
def test_a_model_is_shrunk_on_all_processes_or_on_none(tmp_path):
    assert on_two_processes(shrink_on_one_process, tmp_path / "processes", tmp_path) == [[True, True, 0.5]] * 2


def grouped():
    """Queries in two groups, as those of a small model are."""
    config = transformers.Qwen2Config(
        **TOKENS, hidden_size=28, num_hidden_layers=3, num_attention_heads=14, num_key_value_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    return transformers.Qwen2ForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "config", "said"),
    [
        (
            grouped,
            PruningConfig(sparsity=0.2, granularity="head", uniform=True),
            "0 of the 2 heads in 'model.layers.0.self_attn' are pruned (0). Nearest possible: 0 and 0.5",
        ),
        (
            lambda: build("bart"),
            PruningConfig(sparsity=0.3, granularity="neuron", multiple_of=16, scope="layer"),
            "16 of the 32 neurons in 'model.decoder.layers.0'",
        ),
        (
            lambda: build("gpt2"),
            PruningConfig(sparsity=0.004, criterion="magnitude", scope="row"),
            "The cut to sparsity 0.004 pruned nothing",
        ),
        (
            lambda: build("gpt2"),
            PruningConfig(sparsity=0.0001, granularity="block:8x8"),
            "The cut to sparsity 0.0001 pruned nothing",
        ),
    ],
)
def test_a_cut_that_misses_its_sparsity_says_so(make, config, said, make_trainer, caplog):
    report = prune(make(), config)
    assert said in caplog.text
    caplog.clear()
    model, pruning = make(), PruningTrainerCallback(config)
    make_trainer(model, pruning, train_dataset=samples(model), max_steps=2).train()
    assert said in caplog.text
    assert said in pruning.history.shortfall()
    assert said in str(pruning.history)
    assert pruning.history[-1].reached == pytest.approx(report.sparsity)
    assert PruningHistory.from_dict(pruning.history.to_dict()) == pruning.history


@pytest.mark.parametrize("granularity", ["unstructured", "head", "neuron", "2:4", "block:4x4"])
def test_a_cut_that_reaches_it_says_nothing(granularity, make_trainer, caplog):
    options = {"multiple_of": 1} if granularity == "neuron" else {}
    model, pruning = (
        build("gpt2"),
        PruningTrainerCallback(PruningConfig(sparsity=0.5, granularity=granularity, calibration_samples=8, **options)),
    )
    make_trainer(model, pruning, train_dataset=samples(model), max_steps=2).train()
    assert pruning.history.shortfall() is None
    assert pruning.history[-1].shortfall is None
    assert warnings_in(caplog) == []
