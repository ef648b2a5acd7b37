import copy
import gc
import json
import logging
import math
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset, IterableDataset
from torch import nn
from torch.nn.utils import prune as torch_prune
from transformers import (
    EarlyStoppingCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    TrainingArguments,
)

from hf_prune import MaskSet, PruningConfig, PruningHistory, PruningTrainerCallback, prune, sparsity_report
from hf_prune.weights.targets import find_targets
from tests.tiny import FAMILIES, batch, build, twin
from tests.words import word_tokenizer

FOUR_ROUNDS = PruningConfig(sparsity=0.8, schedule="geometric", rounds=4, end=0.99)  # of any length

# Its name in newer versions of transformers, and in older ones.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__annotations__
)


class Watch(TrainerCallback):
    """Checks the invariant after each optimizer step: exactly the masked weights are zero."""

    def __init__(self, pruning: PruningTrainerCallback) -> None:
        self.pruning, self.seen = pruning, []

    def on_step_end(self, args, state, control, model, **kwargs):
        masks = self.pruning.masks
        for name, mask in masks.items():
            assert torch.equal(model.get_parameter(name) != 0, mask)
        self.seen.append((state.global_step, masks.masked))


# Exactness, for every family.


@pytest.mark.parametrize("family", FAMILIES)
def test_each_round_is_exact(family, make_trainer):
    model = build(family)
    total = sum(target.weight.numel() for target in find_targets(model).values())
    pruning = PruningTrainerCallback(FOUR_ROUNDS)
    watch = Watch(pruning)
    make_trainer(model, pruning, watch, max_steps=8).train()
    counts = [round(sparsity * total) for sparsity in FOUR_ROUNDS.round_sparsities]
    assert watch.seen == [(step, counts[(step - 1) // 2]) for step in range(1, 9)]
    assert [(row.step, row.masked, row.zeros, row.total) for row in pruning.history] == [
        (2 * i, count, count, total) for i, count in enumerate(counts)
    ]
    assert sparsity_report(model).zeros == counts[-1]


@pytest.mark.parametrize("granularity", ["2:4", "block:4x4"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral"])
def test_groups_hold_while_training(family, granularity, make_trainer):
    config = PruningConfig(granularity=granularity, sparsity=0.5, rounds=2, schedule="constant")
    pruning = PruningTrainerCallback(config)
    watch = Watch(pruning)
    make_trainer(build(family), pruning, watch).train()
    assert len(watch.seen) == 6
    assert pruning.masks.sparsity == 0.5


# The oracle: torch.nn.utils.prune under a plain Trainer.


class TorchPrune(TrainerCallback):
    """Prunes with `torch.nn.utils.prune` at the same steps; torch multiplies weight_orig with its mask."""

    def __init__(self, model: nn.Module, masks_at: dict[int, MaskSet]) -> None:
        self.model, self.masks_at = model, masks_at

    def on_step_begin(self, args, state, control, **kwargs):
        for name, mask in self.masks_at.get(state.global_step, {}).items():
            module = self.model.get_submodule(name.removesuffix(".weight"))
            module.weight_mask.copy_(mask)


def reorder(model: nn.Module) -> None:
    """Reparametrizes with all-ones masks, keeping parameters in the dense order.

    torch's prune moves `weight_orig` behind `bias`, which changes the order of summation of the clip norm.
    """
    for target in find_targets(model).values():
        module = model.get_submodule(target.module)
        torch_prune.identity(module, "weight")
        module._parameters = {
            key: module._parameters[key] for key in sorted(module._parameters, key=lambda k: k == "bias")
        }


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "vit"])
def test_equals_torch_prune_bit_for_bit(family, optim, make_trainer):
    options = dict(
        optim=optim,
        gradient_accumulation_steps=2,
        max_grad_norm=0.05,
        weight_decay=0.1,
        max_steps=8,
        optim_args="momentum=0.9" if optim == "sgd" else None,
    )
    ours, theirs = build(family, torch.float64), build(family, torch.float64)
    pruning = PruningTrainerCallback(FOUR_ROUNDS)
    masks_at = {}

    class Record(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            masks_at[state.global_step] = pruning.masks

    def in_float64(model: nn.Module) -> list:
        return [
            {key: value.double() if value.is_floating_point() else value for key, value in row.items()}
            for row in batch(model, 24)
        ]

    make_trainer(ours, pruning, Record(), train_dataset=in_float64(ours), **options).train()

    targets = find_targets(theirs)
    reorder(theirs)
    trainer = make_trainer(theirs, TorchPrune(theirs, masks_at), train_dataset=in_float64(theirs), **options)
    trainer.train()
    assert len({masks.masked for masks in masks_at.values()}) == 4
    others = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if name in targets:
            module = theirs.get_submodule(name.removesuffix(".weight"))
            expected = module.weight_orig * module.weight_mask
        else:
            expected = others[name]
        assert torch.equal(parameter, expected), name
    assert not torch.equal(ours.get_parameter(name), build(family, torch.float64).get_parameter(name))


def test_gradients_are_masked_before_they_are_clipped(make_trainer):
    norms = []

    class Norm(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            norms.append(torch.stack([p.grad.norm() for p in model.parameters()]).norm().item())
            for name, mask in pruning.masks.items():
                assert not model.get_parameter(name).grad[~mask].any()

    pruning = PruningTrainerCallback(PruningConfig(sparsity=0.9))
    make_trainer(build("llama"), pruning, Norm(), max_grad_norm=0.01).train()
    assert norms == pytest.approx([0.01] * 6, rel=1e-3)


class Drift(torch.optim.SGD):
    """Moves every weight, whatever its gradient is."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(1e-3)


class Noise(TrainerCallback):
    """Changes gradients after they were masked, so that moments fill up."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.add_(1e-3)


class Unfreeze(TrainerCallback):
    """Unfreezes after the callback for pruning has looked for what to hold."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        model.model.layers[0].requires_grad_(False)

    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step == 3:
            model.requires_grad_(True)


@pytest.mark.parametrize("disturb", [Drift, Noise, Unfreeze])
def test_no_forward_pass_sees_a_pruned_weight_whatever_others_do(disturb, make_trainer):
    model = build("llama")
    pruning = PruningTrainerCallback(FOUR_ROUNDS)
    seen = []

    def look(*_: object) -> None:
        seen.append(all(not model.get_parameter(name)[~mask].any() for name, mask in pruning.masks.items()))

    model.register_forward_pre_hook(look)
    others = [] if disturb is Drift else [disturb()]
    trainer = make_trainer(model, pruning, *others, max_steps=8, eval_strategy="steps", eval_steps=3)
    trainer.optimizer = (Drift if disturb is Drift else torch.optim.AdamW)(model.parameters(), lr=0.01)
    trainer.train()
    assert len(seen) > 8
    assert all(seen)


# What users put around it.


@pytest.mark.parametrize(
    "options",
    [
        dict(gradient_accumulation_steps=3),
        dict(bf16=True),
        {CHECKPOINTING: True},
        dict(max_steps=-1, num_train_epochs=2),
        dict(optim="adafactor"),
        dict(optim="adamw_torch_fused"),
        dict(optim="rmsprop"),
        dict(optim="adagrad"),
        dict(optim="schedule_free_adamw", lr_scheduler_type="constant"),
        dict(max_grad_norm=0.0),
        dict(auto_find_batch_size=True),
        dict(eval_strategy="steps", eval_steps=1, eval_on_start=True),
        pytest.param(dict(torch_compile=True), marks=pytest.mark.slow),
    ],
    ids=lambda options: "-".join(options),
)
def test_training_arguments(options, make_trainer):
    model = build("llama")
    pruning = PruningTrainerCallback(FOUR_ROUNDS)
    watch = Watch(pruning)
    trainer = make_trainer(model, pruning, watch, **options)
    trainer.train()
    trainer.evaluate()  # Optimizers that average weights put the averages in for evaluation.
    assert watch.seen[-1] == (trainer.state.max_steps, round(0.8 * pruning.masks.total))
    assert sparsity_report(model).zeros == pruning.masks.masked
    assert [row.round for row in pruning.history] == [1, 2, 3, 4]


def test_frozen_weights_and_pure_bfloat16(make_trainer):
    model = build("llama", torch.bfloat16)
    for parameter in model.model.layers[0].parameters():
        parameter.requires_grad_(False)
    pruning = PruningTrainerCallback(FOUR_ROUNDS)
    make_trainer(model, pruning, Watch(pruning)).train()
    assert sparsity_report(model).zeros == round(0.8 * pruning.masks.total)


def test_seq2seq_trainer(make_trainer):
    model = build("t5")
    model.generation_config.max_length = 8
    pruning = PruningTrainerCallback(FOUR_ROUNDS)
    trainer = make_trainer(
        model,
        pruning,
        Watch(pruning),
        cls=Seq2SeqTrainer,
        arguments_class=Seq2SeqTrainingArguments,
        predict_with_generate=True,
        eval_strategy="steps",
        eval_steps=2,
    )
    trainer.train()
    assert sparsity_report(model).zeros == round(0.8 * pruning.masks.total)
    assert len(pruning.history.evaluations) == 3


@pytest.mark.slow
def test_sft_trainer(make_trainer, tmp_path):
    trl = pytest.importorskip("trl")
    model = build("llama")
    pruning = PruningTrainerCallback(FOUR_ROUNDS)
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to="none",
        bf16=False,
    )
    data = Dataset.from_dict({"text": ["a b c d e", "f g h i j"] * 20})
    trainer = trl.SFTTrainer(
        model, arguments, train_dataset=data, processing_class=word_tokenizer(), callbacks=[pruning, Watch(pruning)]
    )
    pruning.log = trainer.log
    trainer.train()
    assert sparsity_report(model).zeros == round(0.8 * pruning.masks.total)


def test_streaming_dataset(make_trainer):
    model = build("llama")
    rows = batch(model, 24)

    def stream():
        for row in rows:
            yield {key: value.tolist() for key, value in row.items()}

    pruning = PruningTrainerCallback(FOUR_ROUNDS)
    make_trainer(model, pruning, train_dataset=IterableDataset.from_generator(stream)).train()
    assert sparsity_report(model).zeros == round(0.8 * pruning.masks.total)


def test_a_run_that_is_stopped_early_is_said_loudly(make_trainer, caplog):
    model = build("llama")

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    pruning = PruningTrainerCallback(FOUR_ROUNDS)
    make_trainer(model, pruning, Stop()).train()
    assert "Training ended after round 2 of 4: the sparsity is 0.5527, not the 0.8000" in caplog.text


def test_twice_in_a_row_starts_clean(make_trainer):
    pruning = PruningTrainerCallback(FOUR_ROUNDS)
    model = build("llama")
    make_trainer(model, pruning).train()
    first = pruning.history
    other = build("gpt2")
    make_trainer(other, pruning).train()
    assert [row.total for row in pruning.history] == [6144] * 4 != [row.total for row in first]
    assert sparsity_report(other).zeros == round(0.8 * 6144)
    assert not [p for p in model.parameters() if p._post_accumulate_grad_hooks]


def test_hooks_do_not_stack_and_are_gone_at_the_end(make_trainer):
    model, counts = build("llama"), set()

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            weight = model.model.layers[0].mlp.up_proj.weight
            counts.add(len(weight._post_accumulate_grad_hooks))

    make_trainer(model, PruningTrainerCallback(FOUR_ROUNDS), Count()).train()
    assert counts == {1}
    assert all(not parameter._post_accumulate_grad_hooks for parameter in model.parameters())


@pytest.mark.slow
def test_hyperparameter_search(make_trainer):
    pytest.importorskip("optuna")
    pruning = PruningTrainerCallback(FOUR_ROUNDS)
    ends = []

    class End(TrainerCallback):
        def on_train_end(self, args, state, control, model, **kwargs):
            ends.append((sparsity_report(model).zeros, [row.round for row in pruning.history]))
            assert Path(args.output_dir, f"run-{len(ends) - 1}", "checkpoint-6", "pruning_masks.safetensors").is_file()

    trainer = make_trainer(
        None,
        pruning,
        End(),
        model_init=lambda: build("llama"),
        train_dataset=batch(build("llama"), 24),
        eval_dataset=batch(build("llama"), 8),
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=6,
    )
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2)}, n_trials=2
    )
    assert ends == [(round(0.8 * 4608), [1, 2, 3, 4])] * 2


# Starting from a model that is sparse already.


def test_zeros_are_held_from_the_start_and_pruned_further(make_trainer):
    model = build("llama")
    prune(model, PruningConfig(sparsity=0.5, criterion="random"))
    held = MaskSet.from_zeros(model)
    config = PruningConfig(sparsity=0.8, hold_zeros=True, begin=2, end=6, schedule="constant", rounds=2)
    # The rounds begin at 0.4, less than what is held.
    with pytest.raises(ValueError, match=r"0\.5000 of the targets is zero already"):
        make_trainer(twin(model), PruningTrainerCallback(config)).train()
    pruning = PruningTrainerCallback(
        PruningConfig(sparsity=0.8, hold_zeros=True, begin=2, end=6, sparsities=[0.6, 0.8])
    )
    watch = Watch(pruning)
    make_trainer(model, pruning, watch).train()
    assert [count for _, count in watch.seen] == [round(s * 4608) for s in (0.5, 0.5, 0.6, 0.6, 0.8, 0.8)]
    assert [(row.round, row.step, row.asked) for row in pruning.history] == [(0, 0, None), (1, 2, 0.6), (2, 4, 0.8)]
    assert all(not pruning.masks[name][~mask].any() for name, mask in held.items())


def test_holding_alone_prunes_nothing_further(make_trainer):
    model = build("llama")
    prune(model, PruningConfig(granularity="2:4"))
    held = MaskSet.from_zeros(model).digest()
    pruning = PruningTrainerCallback(PruningConfig(hold_zeros=True))
    make_trainer(model, pruning, Watch(pruning)).train()
    assert MaskSet.from_zeros(model).digest() == pruning.masks.digest() == held


# What is measured and logged.


def test_metrics_of_each_round(make_trainer):
    model = build("llama")
    dense = twin(model)
    pruning = PruningTrainerCallback(PruningConfig(sparsity=0.8, schedule="constant", rounds=2, end=6))
    trainer = make_trainer(model, pruning, eval_strategy="steps", eval_steps=1)
    pruning.evaluate = trainer.evaluate
    trainer.train()
    history = pruning.history
    expected = make_trainer(dense).evaluate()["eval_loss"]
    assert history.dense == expected
    prune(dense, PruningConfig(sparsity=0.4))
    assert history[0].after_cut == make_trainer(dense).evaluate()["eval_loss"]
    values = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert history.evaluations == list(enumerate(values, start=1))
    assert [row.best for row in history] == [min(values[:3]), min(values[3:])]
    assert [row.last for row in history] == [values[2], values[5]]
    assert [(row.steps, row.samples) for row in history] == [(3, 12), (3, 12)]


def test_nothing_is_filled_in_that_was_not_measured(make_trainer):
    pruning = PruningTrainerCallback(FOUR_ROUNDS)
    make_trainer(build("llama"), pruning, eval_strategy="steps", eval_steps=6).train()
    assert pruning.history.dense is None
    assert [row.after_cut for row in pruning.history] == [None] * 4
    assert [row.last is None for row in pruning.history] == [True, True, True, False]


def test_an_evaluation_before_the_first_cut_is_the_dense_one(make_trainer):
    pruning = PruningTrainerCallback(PruningConfig(sparsity=0.8, schedule="one_shot", begin=3))
    trainer = make_trainer(build("llama"), pruning, eval_strategy="steps", eval_steps=3)
    trainer.train()
    before, after = (log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log)
    assert (pruning.history.dense, pruning.history[0].last) == (before, after)


def test_measuring_changes_nothing_else(make_trainer):
    """The same weights to the last bit, dropout included, with and without the evaluations of the callback."""

    def train(measure: bool) -> tuple[dict, int | None, float | None]:
        model = build("gpt2")  # has dropout
        pruning = PruningTrainerCallback(PruningConfig(sparsity=0.8, schedule="constant", rounds=2, end=6))
        trainer = make_trainer(
            model, pruning, EarlyStoppingCallback(2), eval_strategy="steps", eval_steps=2, save_strategy="steps",
            save_steps=2, load_best_model_at_end=True,
        )  # fmt: skip
        if measure:
            pruning.evaluate = trainer.evaluate
        trainer.train()
        return model.state_dict(), trainer.state.best_global_step, trainer.state.best_metric

    plain, measured = train(False), train(True)
    assert plain[1:] == measured[1:]
    assert all(torch.equal(value, measured[0][name]) for name, value in plain[0].items())


def train_to_the_best(make_trainer, family: str) -> list[float]:
    """Trains with `load_best_model_at_end`, two rounds of three evaluations each, and checks what came back."""
    model = build(family)
    pruning = PruningTrainerCallback(PruningConfig(sparsity=0.95, schedule="constant", rounds=2, end=6))
    trainer = make_trainer(
        model, pruning, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, learning_rate=1e-4,
    )  # fmt: skip
    trainer.train()
    values = [value for _, value in pruning.history.evaluations]
    assert trainer.state.best_metric == min(values[3:])
    assert trainer.state.best_global_step == 4 + values[3:].index(min(values[3:]))
    assert sparsity_report(model).zeros == round(0.95 * pruning.masks.total)
    best = type(model).from_pretrained(trainer.state.best_model_checkpoint)
    assert all(torch.equal(value, best.state_dict()[name]) for name, value in model.state_dict().items())
    return values


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llama"])
def test_the_best_model_comes_back(family, make_trainer):
    train_to_the_best(make_trainer, family)


def test_a_better_but_less_sparse_checkpoint_does_not_come_back(make_trainer):
    values = train_to_the_best(make_trainer, "llama")
    assert min(values[:3]) < min(values[3:])


def test_a_checkpoint_holds_the_model_that_was_evaluated(make_trainer, tmp_path):
    """save_steps == eval_steps == the step of a cut: the cut must wait until the checkpoint is written."""
    pruning = PruningTrainerCallback(PruningConfig(sparsity=0.8, schedule="constant", rounds=2, end=6))
    options = dict(eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=3)
    trainer = make_trainer(build("llama"), pruning, **options)
    trainer.train()
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-3")
    assert sparsity_report(saved).zeros == round(0.4 * 4608)
    assert make_trainer(saved).evaluate()["eval_loss"] == pruning.history.evaluations[0][1]
    state = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    progress = state["stateful_callbacks"]["PruningTrainerCallback"]["progress"]
    assert progress["masks"] == MaskSet.from_zeros(saved).digest()


def test_rounds_are_in_the_log_history(make_trainer):
    pruning = PruningTrainerCallback(FOUR_ROUNDS)
    trainer = make_trainer(build("llama"), pruning)
    trainer.train()
    logged = [log for log in trainer.state.log_history if "pruning_round" in log]
    assert [(log["pruning_round"], log["step"]) for log in logged] == [(1, 0), (2, 1), (3, 3), (4, 4)]
    assert [log["sparsity"] for log in logged] == [row.reached for row in pruning.history]
    assert all("epoch" in log for log in logged)
    trainer.create_model_card()  # reads the log history


def test_tensorboard_shows_sparsity_and_round(make_trainer, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    pruning = PruningTrainerCallback(FOUR_ROUNDS)
    trainer = make_trainer(build("llama"), pruning, report_to="tensorboard")
    pruning.log = trainer.log
    trainer.train()
    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    assert [scalar.value for scalar in events.Scalars("train/pruning_round")] == [1, 2, 3, 4]
    assert [scalar.step for scalar in events.Scalars("train/sparsity")] == [0, 1, 3, 4]
    assert len([log for log in trainer.state.log_history if "pruning_round" in log]) == 4


def test_one_readable_line_a_round(make_trainer, caplog):
    with caplog.at_level(logging.INFO, logger="hf_prune"):
        make_trainer(build("llama"), PruningTrainerCallback(FOUR_ROUNDS)).train()
    lines = [record.getMessage() for record in caplog.records if record.name == "hf_prune.training.events"]
    assert lines[1] == "Round 2 of 4 at step 1: sparsity 0.5527, 2,547 of 4,608 weights pruned."
    assert len(lines) == 4


def test_files_beside_the_model(make_trainer, tmp_path):
    pruning = PruningTrainerCallback(FOUR_ROUNDS)
    trainer = make_trainer(build("llama"), pruning, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-6"):
        assert PruningConfig.from_pretrained(folder) == FOUR_ROUNDS
        assert [row.round for row in PruningHistory.load(folder / "pruning_history.json")] == [1, 2, 3, 4]
    assert PruningHistory.load(tmp_path / "out" / "pruning_history.json") == pruning.history
    assert len(PruningHistory.load(tmp_path / "out" / "checkpoint-2" / "pruning_history.json")) == 2
    saved = MaskSet.load(tmp_path / "out" / "checkpoint-6" / "pruning_masks.safetensors")
    assert saved.digest() == pruning.masks.digest()
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_the_saved_model_is_an_ordinary_one(make_trainer, tmp_path):
    keys = {}
    for name, callbacks in {"pruned": [PruningTrainerCallback(FOUR_ROUNDS)], "dense": []}.items():
        trainer = make_trainer(build("llama"), *callbacks)
        trainer.train()
        trainer.save_model(str(tmp_path / name))
        keys[name] = list(trainer.model.state_dict())
    assert (tmp_path / "pruned" / "config.json").read_text() == (tmp_path / "dense" / "config.json").read_text()
    assert keys["pruned"] == keys["dense"]


def test_perplexity_as_metric(make_trainer):
    from hf_prune.metrics import perplexity_metrics

    compute_metrics, preprocess = perplexity_metrics()
    pruning = PruningTrainerCallback(PruningConfig(sparsity=0.5, metric="perplexity"))
    trainer = make_trainer(build("llama"), pruning, eval_strategy="steps", eval_steps=3)
    trainer.compute_metrics, trainer.preprocess_logits_for_metrics = compute_metrics, preprocess
    pruning.evaluate = trainer.evaluate
    trainer.train()
    assert pruning.history.metric == "eval_perplexity"
    assert not pruning.history.greater_is_better
    # All rows are equally long here, so that both ways of averaging agree.
    loss = next(log["dense_loss"] for log in trainer.state.log_history if "dense_loss" in log)
    assert pruning.history.dense == pytest.approx(math.exp(loss), rel=1e-5)


def test_a_metric_that_no_evaluation_gives_is_said(make_trainer, caplog):
    pruning = PruningTrainerCallback(PruningConfig(sparsity=0.5, metric="accurracy"))
    make_trainer(build("llama"), pruning, eval_strategy="steps", eval_steps=3).train()
    assert "No evaluation gave the metric 'eval_accurracy'" in caplog.text


def test_a_metric_that_would_keep_the_worst_model_is_said(make_trainer, caplog):
    pruning = PruningTrainerCallback(FOUR_ROUNDS)
    make_trainer(build("llama"), pruning, metric_for_best_model="perplexity", greater_is_better=True).train()
    assert "greater_is_better is True for eval_perplexity, which improves as it falls" in caplog.text


def test_tokens_are_counted_where_trainer_counts_them(make_trainer):
    pruning = PruningTrainerCallback(PruningConfig(sparsity=0.8, schedule="constant", rounds=2, end=6))
    make_trainer(build("llama"), pruning, include_num_input_tokens_seen="all").train()
    assert [row.tokens for row in pruning.history] == [3 * 4 * 12] * 2
    make_trainer(build("llama"), pruning).train()
    assert [row.tokens for row in pruning.history] == [None] * 2


def test_samples_are_those_of_the_batch_size_that_fits(make_trainer):
    class OutOfMemory(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.train_batch_size > 2:
                raise RuntimeError("CUDA out of memory.")

    pruning = PruningTrainerCallback(PruningConfig(sparsity=0.8, schedule="constant", rounds=2, end=6))
    make_trainer(build("llama"), pruning, OutOfMemory(), auto_find_batch_size=True).train()
    assert [(row.steps, row.samples) for row in pruning.history] == [(3, 6)] * 2


# Bad input, before training starts.


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(schedule="constant", rounds=7), "7 rounds do not fit into 6 steps"),
        (dict(schedule="constant", rounds=3, begin=4), "3 rounds do not fit into 2 steps"),
        (dict(begin=0.5, end=2), "begin must be before end, got begin=0.5 .step 3. and end=2 .step 2."),
        (dict(end=20), "end=20 is after the end of the run. Take an end of at most 6 steps"),
        (dict(target_modules=["attention"]), "target_modules='attention' matches no prunable module"),
        (
            dict(granularity="3:5", sparsity=None),
            "3:5 needs in_features divisible by 5; 'model.layers.0.self_attn.q_p",
        ),
        (dict(layer_sparsity={"x": 0.5}), "layer_sparsity: 'x' matches none of the targeted modules"),
    ],
)
def test_bad_input_is_an_error_before_training(config, message, make_trainer):
    model = build("llama")
    before = twin(model).state_dict()
    trainer = make_trainer(model, PruningTrainerCallback(PruningConfig(**{"sparsity": 0.8, **config})))
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_config_must_be_one():
    with pytest.raises(TypeError, match="config must be a PruningConfig, got float"):
        PruningTrainerCallback(0.8)


def test_diverged_training_is_an_error_that_names_the_weight(make_trainer):
    class Diverge(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan

    pruning = PruningTrainerCallback(FOUR_ROUNDS)
    with pytest.raises(ValueError, match=r"weights of 'model\.layers\.1\.mlp\.up_proj\.weight' are NaN or infinite"):
        make_trainer(build("llama"), pruning, Diverge()).train()


@pytest.mark.slow
def test_the_saved_model_loads_where_hf_prune_cannot_be_imported(make_trainer, tmp_path):
    trainer = make_trainer(build("gpt_neo"), PruningTrainerCallback(FOUR_ROUNDS))
    trainer.train()
    trainer.save_model()
    code = f"""
import sys
sys.modules["hf_prune"] = None  # makes every import of it fail
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r})
print(sum(float(p.double().sum()) for p in model.state_dict().values()))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert float(run.stdout) == sum(float(p.double().sum()) for p in trainer.model.state_dict().values())


def test_held_zeros_are_measured_too(make_trainer):
    model = build("llama")
    prune(model, PruningConfig(sparsity=0.5))
    expected = make_trainer(twin(model)).evaluate()["eval_loss"]
    pruning = PruningTrainerCallback(PruningConfig(hold_zeros=True))
    trainer = make_trainer(model, pruning)
    pruning.evaluate = trainer.evaluate
    trainer.train()
    assert (pruning.history.dense, pruning.history[0].after_cut) == (None, expected)


# What strangers broke once.


def test_an_interrupted_run_leaves_no_hooks_to_the_next(make_trainer):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    model = build("llama")
    interrupted = PruningTrainerCallback(PruningConfig(sparsity=0.8, schedule="one_shot"))
    with pytest.raises(KeyboardInterrupt):
        make_trainer(model, interrupted, Interrupt()).train()
    assert sparsity_report(model).zeros == round(0.8 * 4608)
    again = PruningTrainerCallback(PruningConfig(sparsity=0.3))
    make_trainer(model, again).train()
    assert round(0.3 * 4608) == again.masks.masked <= sparsity_report(model).zeros < 0.35 * 4608


def test_hooks_end_with_the_callback(make_trainer):
    model = build("llama")
    pruning = PruningTrainerCallback(PruningConfig(sparsity=0.5))
    trainer = make_trainer(model, pruning)
    trainer.state.max_steps = 6
    trainer.create_optimizer_and_scheduler(6)
    given = {"model": model, "optimizer": trainer.optimizer, "lr_scheduler": trainer.lr_scheduler}
    pruning.on_train_begin(trainer.args, trainer.state, trainer.control, **given)
    weight = model.model.layers[0].mlp.up_proj.weight
    rows = {key: value[None] for key, value in batch(model)[0].items()}
    model(**rows).loss.backward()
    assert not weight.grad[weight == 0].any()
    trainer.pop_callback(pruning)
    del trainer, pruning, given
    gc.collect()
    model(**rows).loss.backward()
    assert weight.grad[weight == 0].any()


def test_weights_that_are_unfrozen_in_mid_round_are_held(make_trainer):
    model, checked = build("llama"), []
    late = model.model.layers[0].mlp.up_proj.weight

    class Unfreeze(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            late.requires_grad_(state.global_step >= 2)

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if late.requires_grad:
                mask = pruning.masks["model.layers.0.mlp.up_proj.weight"]
                checked.append(bool(late.grad[mask].any()) and not late.grad[~mask].any())

    late.requires_grad_(False)
    pruning = PruningTrainerCallback(PruningConfig(sparsity=0.8, schedule="one_shot"))
    make_trainer(model, Unfreeze(), pruning).train()
    assert checked == [True] * 4
    assert sparsity_report(model).zeros == round(0.8 * 4608)


def test_measuring_leaves_every_random_state_alone(make_trainer):
    def train(measure: bool) -> dict:
        model = build("llama")
        pruning = PruningTrainerCallback(FOUR_ROUNDS)
        trainer = make_trainer(model, pruning)

        def collate(rows: list) -> dict:
            columns = transformers.default_data_collator(rows)
            columns["labels"][:, int(random.random() * 6)] = -100
            columns["labels"][:, 6 + int(np.random.rand() * 6)] = -100
            return columns

        trainer.data_collator = collate
        if measure:
            pruning.evaluate = trainer.evaluate
        random.seed(0)
        np.random.seed(0)
        trainer.train()
        return model.state_dict()

    plain, measured = train(False), train(True)
    assert all(torch.equal(value, measured[name]) for name, value in plain.items())


def test_a_checkpoint_that_was_rotated_away_is_said(make_trainer, tmp_path, caplog):
    newer = tmp_path / "out" / "checkpoint-100"
    newer.mkdir(parents=True)
    os.utime(newer, (2**32, 2**32))  # Trainer looks at times if they are more than a second apart.
    pruning = PruningTrainerCallback(FOUR_ROUNDS)
    make_trainer(build("llama"), pruning, save_strategy="steps", save_steps=3, save_total_limit=1).train()
    assert "checkpoint-3 is gone: was it rotated away by save_total_limit" in caplog.text


def test_zeros_that_leave_a_later_cut_no_room_are_an_error_before_training(make_trainer):
    model = build("llama")
    prune(model, PruningConfig(sparsity=0.7))
    pruning = PruningTrainerCallback(PruningConfig(sparsity=0.85, rounds=3, begin=3, hold_zeros=True))
    trainer = make_trainer(model, pruning)
    with pytest.raises(ValueError, match=r"0\.\d+ of the targets is zero already, .* take fewer rounds"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_holding_nothing_is_said(make_trainer, caplog):
    make_trainer(build("llama"), PruningTrainerCallback(PruningConfig(hold_zeros=True))).train()
    assert "hold_zeros found no zeros to hold" in caplog.text


def test_several_evaluation_datasets(make_trainer, caplog):
    model = build("llama")
    data = {"a": batch(model, 8, 1), "b": batch(model, 8, 2)}
    options = dict(eval_strategy="steps", eval_steps=2, train_dataset=batch(model, 24), eval_dataset=data)
    make_trainer(model, PruningTrainerCallback(FOUR_ROUNDS), **options).train()
    assert "No evaluation gave the metric 'eval_loss'" in caplog.text
    assert "eval_a_loss" in caplog.text
    pruning = PruningTrainerCallback(PruningConfig(sparsity=0.9, metric="b_loss"))
    trainer = make_trainer(model, pruning, **options)
    pruning.evaluate = trainer.evaluate
    trainer.train()
    assert None not in (pruning.history.dense, pruning.history[-1].after_cut, pruning.history[-1].last)


def test_two_pruning_callbacks_are_an_error(make_trainer):
    callbacks = [PruningTrainerCallback(FOUR_ROUNDS), PruningTrainerCallback(FOUR_ROUNDS)]
    with pytest.raises(ValueError, match="there is more than one PruningTrainerCallback; a run can have one"):
        make_trainer(build("llama"), *callbacks).train()


def test_a_criterion_must_be_a_function():
    with pytest.raises(TypeError, match=r"must be a function of ScoreInputs, got 'random'\. Names go into"):
        PruningTrainerCallback(FOUR_ROUNDS, criterion="random")


def test_a_callback_is_copied_and_pickled_with_the_run_that_it_had(make_trainer):
    pruning = PruningTrainerCallback(FOUR_ROUNDS)
    make_trainer(build("gpt2"), pruning).train()
    for other in (copy.deepcopy(pruning), pickle.loads(pickle.dumps(pruning))):
        assert other.masks == pruning.masks
        assert other.history.to_dict() == pruning.history.to_dict()
        assert other.state() == pruning.state()


def test_a_criterion_that_is_set_later_is_the_one_that_is_written_down():
    pruning = PruningTrainerCallback(PruningConfig(sparsity=0.5))
    pruning.criterion = mean_distance
    assert pruning.state()["progress"]["criterion"] == "mean_distance"


def mean_distance(inputs):
    return (inputs.weight - inputs.weight.mean()).abs()
