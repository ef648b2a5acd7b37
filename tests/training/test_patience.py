"""Rounds that end on patience, with a Trainer: what ends them, what comes back, what the optimizer is left with."""

import dataclasses
import json
import logging
import math

import pytest
import torch
import transformers
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from hf_prune import PruningConfig, PruningHistory, PruningTrainerCallback, sparsity_report
from tests.tiny import build
from tests.trainers import Rates

TWO_ROUNDS = PruningConfig(
    sparsity=0.8, schedule="geometric", rounds=2, patience=2, min_round_steps=1, metric="score", begin=1, end=20
)
EVERY_STEP = dict(eval_strategy="steps", eval_steps=1, max_steps=20)


class Weights(TrainerCallback):
    """Keeps a copy of all parameters and buffers at the end of each step, and right after each cut."""

    def __init__(self) -> None:
        self.after_step: dict[int, dict[str, torch.Tensor]] = {}
        self.before_step: dict[int, dict[str, torch.Tensor]] = {}

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.before_step[state.global_step] = copied(model)

    def on_step_end(self, args, state, control, model, **kwargs):
        self.after_step[state.global_step] = copied(model)


def copied(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def scripted(trainer: Trainer, pruning: PruningTrainerCallback, score) -> None:
    """The trainer's evaluations give `score(round, steps in the round)`, lower is better."""

    def compute_metrics(_):
        history = pruning.history
        number, start = (history[-1].round, history[-1].step) if history else (0, 0)
        return {"score": score(number, trainer.state.global_step - start)}

    trainer.compute_metrics = compute_metrics


def v_shaped(_, step: int) -> float:
    """Best three steps after the cut, and worse from there."""
    return 1.0 + abs(step - 3)


def run(make_trainer, config: PruningConfig = TWO_ROUNDS, score=v_shaped, *callbacks, family: str = "gpt2", **options):
    """A run with scripted metrics.

    Returns:
        Trainer, pruning callback, and the weights at each step.
    """
    pruning, weights = PruningTrainerCallback(config), Weights()
    trainer = make_trainer(
        build(family),
        pruning,
        weights,
        *callbacks,
        **{**EVERY_STEP, "metric_for_best_model": "score", "greater_is_better": False, **options},
    )
    scripted(trainer, pruning, score)
    trainer.train()
    return trainer, pruning, weights


# What ends a round


def test_rounds_end_on_patience_and_then_the_training_stops(make_trainer, caplog):
    with caplog.at_level(logging.INFO, logger="hf_prune"):
        trainer, pruning, _ = run(make_trainer)
    rows = [(row.step, row.steps, row.evaluations, row.ended) for row in pruning.history]
    assert rows == [(1, 5, 5, "patience"), (6, 5, 5, "patience")]
    assert [(row.best, row.best_step, row.last) for row in pruning.history] == [(1.0, 4, 3.0), (1.0, 9, 3.0)]
    assert (pruning.history.ended, trainer.state.global_step) == ("patience", 11)
    assert "Round 1 ended (patience) with eval_score 3.0000; its best, 1.0000 at step 4, comes back." in caplog.text
    assert "Training ended" not in caplog.text
    assert sparsity_report(trainer.model).zeros == round(0.8 * pruning.masks.total)


def test_greater_is_better_is_asked_of_the_training_arguments(make_trainer):
    _, pruning, _ = run(make_trainer, score=lambda *at: -v_shaped(*at), greater_is_better=True)
    assert [row.best_step for row in pruning.history] == [4, 9]


def test_without_training_arguments_the_name_says_which_way(make_trainer):
    """Nothing is said about `score`: it is taken for something that rises, as Trainer would."""
    options = {"metric_for_best_model": None, "greater_is_better": None}
    _, pruning, _ = run(make_trainer, score=lambda *at: -v_shaped(*at), **options)
    assert [row.best_step for row in pruning.history] == [4, 9]
    assert pruning.history.greater_is_better


def test_evaluations_once_an_epoch(make_trainer):
    config = PruningConfig(sparsity=0.5, schedule="one_shot", patience=1)
    options = {"eval_strategy": "epoch", "max_steps": -1, "num_train_epochs": 5}  # of six steps
    trainer, pruning, _ = run(make_trainer, config, lambda _, step: abs(step - 6), **options)
    assert trainer.state.global_step == 12
    assert pruning.history[0].ended == "patience"


def test_rounds_that_never_converge_end_inside_the_budget(make_trainer):
    config = PruningConfig(sparsity=0.8, schedule="constant", rounds=4, patience=9, min_round_steps=3, end=20)
    trainer, pruning, _ = run(make_trainer, config, lambda _, step: -step)
    assert [(row.step, row.ended) for row in pruning.history] == [
        (0, "reserve"), (11, "reserve"), (14, "reserve"), (17, "max_steps")
    ]  # fmt: skip
    assert trainer.state.global_step == 20
    assert pruning.history[-1].reached == pytest.approx(0.8, abs=1e-3)


def test_max_round_steps(make_trainer):
    config = PruningConfig(sparsity=0.8, schedule="constant", rounds=3, patience=9, max_round_steps=4, end=20)
    trainer, pruning, _ = run(make_trainer, config, lambda _, step: -step)
    assert [(row.step, row.steps, row.ended) for row in pruning.history] == [
        (step, 4, "max_round_steps") for step in (0, 4, 8)
    ]
    assert trainer.state.global_step == 12
    assert pruning.history[-1].best_step == 12  # The evaluation at the last step counts.


def test_nan_is_no_improvement_and_is_said_once(make_trainer, caplog):
    _, pruning, _ = run(make_trainer, score=lambda _, step: math.nan)
    assert [(row.steps, row.best, row.ended) for row in pruning.history] == [(2, None, "patience")] * 2
    assert caplog.text.count("eval_score is NaN at step 2: no improvement.") == 1
    assert caplog.text.count("is NaN") == 1


def test_early_stopping_before_the_target_is_said_everywhere(make_trainer, caplog):
    early = EarlyStoppingCallback(early_stopping_patience=1)
    options = {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}
    trainer, pruning, weights = run(make_trainer, TWO_ROUNDS, v_shaped, early, **options)
    assert "Training ended after round 1 of 2" in caplog.text
    assert (pruning.history[-1].ended, pruning.history.ended) == ("stopped", "stopped")
    said = "Training ended after round 1 of 2: the sparsity is 0.5527, not the 0.8000 asked for."
    assert said in str(pruning.history)
    assert equal(copied(trainer.model), weights.after_step[4])


def test_another_callback_that_stops_the_last_round(make_trainer, caplog):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 8

    _, pruning, _ = run(make_trainer, TWO_ROUNDS, v_shaped, Stop())
    assert [row.ended for row in pruning.history] == ["patience", "stopped"]
    assert "Training" not in str(pruning.history)


# What comes back


@pytest.mark.parametrize("family", ["gpt2", "resnet", "vit"])
def test_the_best_weights_of_a_round_come_back_before_the_next_cut_and_at_the_end(family, make_trainer, tmp_path):
    trainer, pruning, weights = run(make_trainer, family=family)
    # Cut at 1, best at 4, worse at 5 and 6; cut at 6, best at 9, worse until 11.
    at_cut, best = weights.before_step[6], weights.after_step[4]
    second = pruning.masks
    assert not equal(weights.after_step[4], weights.after_step[6])
    for name, tensor in at_cut.items():
        assert torch.equal(tensor, best[name] * second[name] if name in second else best[name]), name
    assert equal(copied(trainer.model), weights.after_step[9])
    assert not equal(copied(trainer.model), weights.after_step[11])
    trainer.save_model()
    saved = type(trainer.model).from_pretrained(tmp_path / "out")
    assert equal(copied(saved), weights.after_step[9])


def test_batch_statistics_come_back_too(make_trainer):
    trainer, _, weights = run(make_trainer, family="resnet")
    statistics = [name for name in trainer.model.state_dict() if name.endswith("running_mean")]
    assert statistics
    for name in statistics:
        assert torch.equal(trainer.model.state_dict()[name], weights.after_step[9][name])
        assert not torch.equal(trainer.model.state_dict()[name], weights.after_step[11][name])


def test_the_last_weights_on_demand(make_trainer):
    config = dataclasses.replace(TWO_ROUNDS, restore="last")
    trainer, pruning, weights = run(make_trainer, config)
    assert equal(copied(trainer.model), weights.after_step[11])
    for name, tensor in weights.before_step[6].items():
        mask = pruning.masks.get(name)
        assert torch.equal(tensor, weights.after_step[6][name] * (1 if mask is None else mask))


def test_parameters_stay_the_objects_that_the_optimizer_holds(make_trainer):
    trainer, *_ = run(make_trainer)
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in trainer.model.parameters()} == held


def test_the_best_checkpoint_and_the_best_of_the_last_round_are_the_same(make_trainer):
    options = {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}
    trainer, _, weights = run(make_trainer, **options)
    assert trainer.state.best_global_step == 9
    assert equal(copied(trainer.model), weights.after_step[9])


def test_a_checkpoint_holds_the_weights_that_were_evaluated(make_trainer, tmp_path):
    """The cut and what comes back before it wait for the next step, so that they are in no checkpoint of this one."""
    _, _, weights = run(make_trainer, save_strategy="steps", save_steps=1)
    saved = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out" / "checkpoint-6")
    assert equal(copied(saved), weights.after_step[6])


def test_what_was_measured_right_after_a_cut_is_not_the_best(make_trainer):
    pruning = PruningTrainerCallback(TWO_ROUNDS)
    options = {**EVERY_STEP, "metric_for_best_model": "score", "greater_is_better": False, "eval_on_start": True}
    trainer = make_trainer(build("gpt2"), pruning, **options)
    scripted(trainer, pruning, lambda number, step: step + number)  # Best right after each cut.
    pruning.evaluate = trainer.evaluate
    trainer.train()
    assert [(row.after_cut, row.best, row.best_step) for row in pruning.history] == [(1.0, 2.0, 2), (2.0, 3.0, 5)]


def test_the_history_is_saved_with_all_that_patience_knows(make_trainer, tmp_path):
    _, pruning, _ = run(make_trainer)
    assert PruningHistory.load(tmp_path / "out" / "pruning_history.json") == pruning.history
    assert json.loads((tmp_path / "out" / "pruning_config.json").read_text())["patience"] == [2]


# Learning rate and optimizer at a cut


def fresh_schedule(kind: str, steps: int, warmup: int, taken: int) -> list[float]:
    """The learning rates of a new scheduler, one that Transformers makes."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    scheduler = transformers.get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    rates = []
    for _ in range(taken):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("kind", ["linear", "cosine", "polynomial", "constant_with_warmup"])
def test_the_learning_rate_starts_anew_at_each_cut(kind, make_trainer):
    config = PruningConfig(sparsity=0.8, schedule="geometric", rounds=3, begin=2, end=14, restart_lr=True)
    rates = Rates()
    options = {"max_steps": 20, "lr_scheduler_type": kind, "warmup_steps": 0.25}
    make_trainer(build("llama"), PruningTrainerCallback(config), rates, **options).train()
    # Cuts at 2, 6 and 10: rounds of 4, 4 and 10 steps. Warm-up is a quarter of each, whole steps where it divides.
    expected = fresh_schedule(kind, 20, 5, 2) + 2 * fresh_schedule(kind, 4, 1, 4)
    assert rates.rates[:10] == pytest.approx(expected, rel=1e-6)
    assert rates.rates[10] == pytest.approx(fresh_schedule(kind, 10, 2, 1)[0])
    assert rates.rates[19] == pytest.approx(fresh_schedule(kind, 20, 5, 19)[-1], rel=1e-6)


def test_the_learning_rate_goes_on_otherwise(make_trainer):
    config = PruningConfig(sparsity=0.8, schedule="geometric", rounds=3, end=9)
    rates = Rates()
    make_trainer(build("llama"), PruningTrainerCallback(config), rates, max_steps=9).train()
    assert rates.rates == pytest.approx(fresh_schedule("linear", 9, 0, 9))


def test_with_patience_the_schedule_has_the_steps_that_a_round_may_take_at_most(make_trainer):
    config = dataclasses.replace(TWO_ROUNDS, restart_lr=True, min_round_steps=9)
    rates = Rates()
    run(make_trainer, config, v_shaped, rates)
    # The first round may take the steps 1 to 11, the second, begun at 6, those up to 20.
    first, second = fresh_schedule("linear", 10, 0, 5), fresh_schedule("linear", 14, 0, 5)
    assert rates.rates == pytest.approx([*fresh_schedule("linear", 20, 0, 1), *first, *second])


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_scheduler_of_the_users_own_is_as_it_was_afterwards(interrupted, make_trainer):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if interrupted:
                raise KeyboardInterrupt

    pruning = PruningTrainerCallback(
        PruningConfig(sparsity=0.8, schedule="geometric", rounds=2, end=6, restart_lr=True)
    )
    interrupt = Interrupt()
    trainer = make_trainer(build("llama"), pruning, interrupt)
    trainer.create_optimizer()
    ramp = lambda step: 1 / (1 + step)  # noqa: E731
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, ramp)
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        trainer.remove_callback(interrupt)
    trainer.train()
    assert trainer.lr_scheduler.lr_lambdas == [ramp] * len(trainer.lr_scheduler.lr_lambdas)


def test_a_learning_rate_that_cannot_be_restarted_is_an_error(make_trainer):
    pruning = PruningTrainerCallback(PruningConfig(sparsity=0.8, restart_lr=True))
    trainer = make_trainer(
        build("llama"), pruning, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps", eval_steps=1
    )
    with pytest.raises(ValueError, match="restart_lr needs a learning rate that is a function of the step"):
        trainer.train()


class Moments(TrainerCallback):
    """The optimizer's state at a step, right after the cut, and just before it."""

    def __init__(self, at: int) -> None:
        self.at, self.before, self.after = at, {}, {}

    def on_step_end(self, args, state, control, optimizer, **kwargs):
        if state.global_step == self.at:
            self.before = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}

    def on_step_begin(self, args, state, control, optimizer, **kwargs):
        if state.global_step == self.at:
            self.after = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("how", ["mask", "reset", "keep"])
def test_what_a_cut_does_to_the_moments(how, optim, make_trainer):
    config = PruningConfig(sparsity=0.8, schedule="one_shot", begin=3, optimizer_state=how)
    model, moments = build("llama"), Moments(3)
    pruning = PruningTrainerCallback(config)
    make_trainer(model, pruning, moments, optim=optim).train()
    assert len(moments.before) == len(list(model.parameters()))
    if how == "reset":
        assert moments.after == {}
        return
    masks = {model.get_parameter(name): mask for name, mask in pruning.masks.items()}
    for parameter, state in moments.before.items():
        mask = masks.get(parameter, torch.tensor(True)) if how == "mask" else torch.tensor(True)
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(moments.after[parameter][name], state[name] * mask)
            assert state[name].any()
        assert torch.equal(moments.after[parameter]["step"], state["step"])


class Diverges(Trainer):
    """Its second step leaves nothing but NaN."""

    def training_step(self, model, inputs, *args, **kwargs):
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.state.global_step == 1:
            for parameter in model.parameters():
                parameter.grad.fill_(math.nan)
        return loss


@pytest.mark.parametrize("how", ["mask", "reset"])
def test_a_round_that_diverges_leaves_the_next_one_able_to_train(how, make_trainer):
    config = PruningConfig(sparsity=0.8, schedule="geometric", rounds=3, patience=2, end=0.9, optimizer_state=how)
    model, pruning = build("gpt2"), PruningTrainerCallback(config)
    options = {**EVERY_STEP, "max_steps": 30, "max_grad_norm": 0.0}
    make_trainer(model, pruning, cls=Diverges, **options).train()
    assert [row.round for row in pruning.history] == [1, 2, 3]
    assert pruning.history[1].best < pruning.history[0].best
    assert all(parameter.isfinite().all() for parameter in model.parameters())


# Bad input


def test_patience_without_evaluation_is_an_error(make_trainer):
    trainer = make_trainer(build("llama"), PruningTrainerCallback(PruningConfig(sparsity=0.8, patience=2)))
    with pytest.raises(ValueError, match=r"patience needs evaluations, and there are none\. Set eval_strategy"):
        trainer.train()


@pytest.mark.parametrize("measured", [False, True])
def test_a_metric_that_the_evaluation_does_not_return_is_an_error(measured, make_trainer):
    pruning = PruningTrainerCallback(PruningConfig(sparsity=0.8, patience=2, metric="accuracy"))
    trainer = make_trainer(build("llama"), pruning, eval_strategy="steps", eval_steps=2)
    if measured:
        pruning.evaluate = trainer.evaluate
    message = r"patience follows 'eval_accuracy', but the evaluation gives eval_loss, .*\. Set metric in the config"
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == (0 if measured else 2)


def test_two_metrics_that_both_bring_their_best_back_are_an_error(make_trainer):
    options = {"metric_for_best_model": "loss", "load_best_model_at_end": True, "save_strategy": "steps"}
    message = "patience brings the best eval_score back, and load_best_model_at_end the best eval_loss"
    with pytest.raises(ValueError, match=message):
        run(make_trainer, save_steps=1, **options)
    config = dataclasses.replace(TWO_ROUNDS, restore="last")
    trainer, _, weights = run(make_trainer, config, save_steps=1, **options)
    assert equal(copied(trainer.model), weights.after_step[trainer.state.best_global_step])


def test_a_metric_that_is_none_is_no_improvement(make_trainer, caplog):
    _, pruning, _ = run(make_trainer, score=lambda *_: None, metric_for_best_model=None)
    assert [(row.steps, row.ended) for row in pruning.history] == [(2, "patience")] * 2
    assert "eval_score is NaN at step 2: no improvement." in caplog.text


def test_a_metric_that_is_no_number_is_an_error(make_trainer):
    with pytest.raises(ValueError, match=r"the metric 'eval_score' must be a number, got 'high'\."):
        run(make_trainer, score=lambda *_: "high", metric_for_best_model=None)


def test_several_evaluation_datasets_of_which_one_has_the_metric(make_trainer):
    config = PruningConfig(sparsity=0.5, schedule="one_shot", patience=1, metric="eval_b_loss")
    pruning = PruningTrainerCallback(config)
    trainer = make_trainer(build("llama"), pruning, **EVERY_STEP)
    trainer.eval_dataset = {"a": trainer.eval_dataset, "b": trainer.eval_dataset}
    trainer.train()
    assert pruning.history[0].evaluations == pruning.history[0].steps


def test_a_budget_too_small_is_an_error(make_trainer):
    config = PruningConfig(sparsity=0.8, schedule="constant", rounds=7, patience=1)
    trainer = make_trainer(build("llama"), PruningTrainerCallback(config), eval_strategy="steps", eval_steps=1)
    with pytest.raises(ValueError, match=r"7 rounds of at least 1 steps do not fit into 6 steps"):
        trainer.train()
