import math

import numpy as np
import pytest
import torch
from transformers import TrainerState, TrainingArguments

from hf_prune import PruningConfig
from hf_prune.pacing.patience import Patience
from hf_prune.plan import resolve
from hf_prune.training.monitor import (
    FALLING,
    Monitor,
    as_number,
    improves_as_it_rises,
    metric_name,
    require_evaluations,
    warn_of_few_evaluations,
)


def arguments(**values) -> TrainingArguments:
    return TrainingArguments("out", use_cpu=True, report_to="none", **values)


@pytest.mark.parametrize(
    ("metric", "best", "expected"),
    [
        (None, None, "eval_loss"),
        (None, "accuracy", "eval_accuracy"),
        (None, "eval_accuracy", "eval_accuracy"),
        ("f1", "accuracy", "eval_f1"),
        ("eval_f1", None, "eval_f1"),
        ("eval_b_loss", None, "eval_b_loss"),
    ],
)
def test_the_config_goes_before_the_training_arguments(metric, best, expected):
    config = PruningConfig(sparsity=0.5, metric=metric)
    assert metric_name(resolve(config), arguments(metric_for_best_model=best)) == expected


@pytest.mark.parametrize(
    "name", [*sorted(FALLING), "word_error_rate", "val_loss", "Bits_per_byte", "mlmloss", "val/error"]
)
def test_some_names_fall(name):
    assert not improves_as_it_rises(f"eval_{name}", arguments())
    assert not improves_as_it_rises(f"eval_{name}", arguments(metric_for_best_model="f1", greater_is_better=True))


@pytest.mark.parametrize("name", ["accuracy", "f1", "power", "answer", "filter_score", "bleu", "steerability"])
def test_other_names_rise(name):
    assert improves_as_it_rises(f"eval_{name}", arguments())


def test_the_training_arguments_speak_of_their_own_metric():
    assert improves_as_it_rises("eval_accuracy", arguments())
    assert improves_as_it_rises("eval_accuracy", arguments(metric_for_best_model="loss", greater_is_better=False))


@pytest.mark.parametrize("best", [None, "score", "eval_score"])
@pytest.mark.parametrize("greater", [True, False])
def test_the_training_arguments_go_before_the_name(best, greater):
    given = arguments(metric_for_best_model=best, greater_is_better=greater)
    assert improves_as_it_rises("eval_score", given) is greater


def check(config: PruningConfig, **values) -> None:
    given = arguments(**values)
    require_evaluations(
        resolve(config), given, TrainerState(max_steps=100, num_train_epochs=2, eval_steps=given.eval_steps or 500)
    )


def test_evaluations_that_patience_can_live_with():
    patient = PruningConfig(sparsity=0.5, patience=1)
    check(patient, eval_strategy="steps", eval_steps=99)
    check(patient, eval_strategy="epoch")
    check(patient, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True)
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_f1"}
    check(PruningConfig(sparsity=0.5, patience=1, metric="f1"), eval_strategy="epoch", save_strategy="epoch", **best)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"there are none\. Set eval_strategy"),
        ({"eval_strategy": "steps", "eval_steps": 100}, "there is none before the run's end"),
        ({"eval_strategy": "steps", "eval_steps": 1, "eval_delay": 100}, "there is none before the run's end"),
        ({"eval_strategy": "epoch", "eval_delay": 2}, "there is none before the run's end"),
        (
            {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True},
            'the best eval_f1 back, and load_best_model_at_end the best eval_loss.* restore="last"',
        ),
    ],
)
def test_evaluations_that_patience_cannot_live_with(values, message):
    with pytest.raises(ValueError, match=message):
        check(PruningConfig(sparsity=0.5, patience=1, metric="f1"), **values)


@pytest.mark.parametrize(
    ("every", "end", "options", "said"),
    [
        (6, None, {}, "it takes 2 evaluations, and a round of 10 steps has room for 1. Evaluate more often, or"),
        (5, None, {}, None),
        (5, 0.25, {}, "a round of 5 steps has room for 1."),
        (5, 0.5, {"max_round_steps": 9}, "a round of 9 steps has room for 1."),
        (5, 0.25, {"min_round_steps": 2}, None),  # the first may have 17 of the 25 steps
        (20, 0.5, {}, "a round of 10 steps has room for 0."),
    ],
)
def test_rounds_too_short_for_patience_are_told(every, end, options, said, caplog):
    pacing = Patience.plan(5, 0, end, 100, [1], **options)
    state = TrainerState(max_steps=100, num_train_epochs=2, eval_steps=every)
    warn_of_few_evaluations(pacing, arguments(eval_strategy="steps", eval_steps=every), state)
    assert caplog.text == "" if said is None else said in caplog.text


def test_rounds_shorter_than_an_epoch_are_told_where_epochs_evaluate(caplog):
    state = TrainerState(max_steps=100, num_train_epochs=5)
    warn_of_few_evaluations(Patience.plan(5, 0, None, 100, [1]), arguments(eval_strategy="epoch"), state)
    assert "a round of 10 steps has room for 0." in caplog.text
    caplog.clear()
    warn_of_few_evaluations(Patience.plan(1, 0, None, 100, [1]), arguments(eval_strategy="epoch"), state)
    assert not caplog.text  # The last round goes on to the end of the run.


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.float64(2), torch.tensor(2.0)])
def test_numbers_of_all_kinds(value):
    assert as_number("eval_loss", value) == 2.0


def test_none_is_nan_and_the_rest_is_an_error():
    assert math.isnan(as_number("eval_loss", None))
    for value in ("high", [1.0, 2.0], {}):
        with pytest.raises(ValueError, match="the metric 'eval_loss' must be a number, got"):
            as_number("eval_loss", value)


def test_a_metric_lacks_when_evaluations_gave_others():
    monitor = Monitor()
    assert not monitor.lacks("eval_accuracy")  # There were none yet.
    monitor.note_(["eval_loss", "epoch"])
    assert monitor.seen == {"eval_loss"}
    assert monitor.lacks("eval_accuracy")
    with pytest.raises(ValueError, match=r"follows 'eval_accuracy', but the evaluation gives eval_loss\. Set metric"):
        monitor.require("eval_accuracy")
    monitor.note_(["eval_accuracy"])
    monitor.require("eval_accuracy")


def test_a_measurement_has_a_prefix_of_its_own():
    monitor, asked = Monitor(), []

    def evaluate(metric_key_prefix):
        asked.append(metric_key_prefix)
        return {f"{metric_key_prefix}_loss": 2.5, "epoch": 1.0}

    assert monitor.measure_("eval_loss", evaluate, "after_cut") == 2.5
    assert monitor.measure_("eval_accuracy", evaluate, "dense") is None
    assert (asked, monitor.seen) == (["after_cut", "dense"], {"eval_loss"})
