import math

import numpy as np
import pytest
import torch
from transformers import TrainerState, TrainingArguments

from hf_prune import PruningConfig
from hf_prune.monitor import FALLING, as_number, improves_as_it_rises, metric_name, require_evaluations


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
    assert metric_name(config, arguments(metric_for_best_model=best)) == expected


@pytest.mark.parametrize("name", FALLING)
def test_some_names_fall(name):
    assert not improves_as_it_rises(f"eval_{name}", arguments())
    assert not improves_as_it_rises(f"eval_{name}", arguments(metric_for_best_model="f1", greater_is_better=True))


def test_other_names_rise():
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
        config, given, TrainerState(max_steps=100, num_train_epochs=2, eval_steps=given.eval_steps or 500)
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
        (
            {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True},
            'the best eval_f1 back, and load_best_model_at_end the best eval_loss.* restore="last"',
        ),
    ],
)
def test_evaluations_that_patience_cannot_live_with(values, message):
    with pytest.raises(ValueError, match=message):
        check(PruningConfig(sparsity=0.5, patience=1, metric="f1"), **values)


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.float64(2), torch.tensor(2.0)])
def test_numbers_of_all_kinds(value):
    assert as_number("eval_loss", value) == 2.0


def test_none_is_nan_and_the_rest_is_an_error():
    assert math.isnan(as_number("eval_loss", None))
    for value in ("high", [1.0, 2.0], {}):
        with pytest.raises(ValueError, match="the metric 'eval_loss' must be a number, got"):
            as_number("eval_loss", value)
