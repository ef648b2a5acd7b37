"""Experts while training: what is masked is not chosen, and what is left is trained as if it were alone."""

import copy
import logging

import pytest
import torch

from hf_prune import PruningConfig, PruningTrainerCallback, prune, shrink
from hf_prune.criteria import needs
from hf_prune.structures.loading import recorded_in
from hf_prune.structures.routing import SAVED_UNBARRED
from tests.structures.mixtures import build_mixture, logits_of
from tests.structures.test_training import Watch

CONFIG = PruningConfig(sparsity=0.375, schedule="constant", rounds=2, granularity="expert", criterion="reap")
NAMES = ["mixtral", "deepseek_v3", "switch_transformers"]


def samples(size=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(3, 60, (10,), generator=generator) for _ in range(size)]
    return [{"input_ids": ids, "labels": ids} for ids in tokens]


def build(name, dtype=torch.float32):
    model = build_mixture(name, dtype, **({"router_jitter_noise": 0.0} if name == "switch_transformers" else {}))
    model.config.use_cache, model.config.decoder_start_token_id = False, 0
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize(
    "name", [name if name == "mixtral" else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_checkpointing": True}, {"bf16": True}, {"gradient_accumulation_steps": 2}],
    ids=["plain", "checkpointing", "bf16", "accumulation"],
)
def test_experts_are_held_and_removed_at_the_end(name, options, make_trainer, tmp_path):
    model = build(name)
    before = model.num_parameters()
    pruning = PruningTrainerCallback(CONFIG)
    watch = Watch(pruning)
    trainer = make_trainer(model, pruning, watch, train_dataset=samples(), **options)
    trainer.train()
    assert watch.wrong == []
    assert [row.criterion for row in pruning.history] == ["reap", "reap"]
    assert pruning.history[0].masked < pruning.history[1].masked
    assert model.num_parameters() < before
    trainer.save_model()
    loaded = type(model).from_pretrained(tmp_path / "out").eval()
    # Under bf16 the trained model goes on computing in it.
    assert (logits_of(loaded) - logits_of(model.eval())).abs().max() <= (0.3 if "bf16" in options else 0)


@needs(kinds=("expert",))
def the_last_ones(inputs):
    """The same experts of each layer: a loss for balance adds up those of one number, over all layers."""
    return torch.arange(inputs.count)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw_torch"])
@pytest.mark.parametrize("balance", [False, True])
def test_training_under_masks_is_training_what_is_left(optimizer, balance, make_trainer):
    """The oracle: a model that is shrunk before training, by the same masks."""
    model = build("mixtral", torch.float64)
    model.config.output_router_logits, model.config._experts_implementation = balance, "eager"
    model.config.router_aux_loss_coef = model.router_aux_loss_coef = 0.1
    small = copy.deepcopy(model)
    config = PruningConfig(sparsity=0.375, schedule="one_shot", granularity="expert", uniform=True)
    prune(small, config, criterion=the_last_ones)
    shrink(small)
    assert not recorded_in(small.config)
    if balance:  # The loss for balance counts experts, and is smaller by as much as they are fewer.
        small.router_aux_loss_coef *= 8 / 5
    options = {"optim": optimizer, "max_grad_norm": 0.5, "weight_decay": 0.1, "adam_epsilon": 1e-3}
    make_trainer(
        model, PruningTrainerCallback(config, criterion=the_last_ones), train_dataset=samples(), **options
    ).train()
    make_trainer(small, train_dataset=samples(), **options).train()
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in small.named_parameters()}
    for (n, ours), theirs in zip(model.named_parameters(), small.parameters(), strict=True):
        # The loss for balance is computed in float32.
        assert (ours - theirs).abs().max() < (1e-6 if balance else 1e-8), n


@pytest.mark.parametrize("name", ["mixtral", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_a_resumed_run_ends_as_an_undisturbed_one(name, make_trainer, tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1}
    whole = build(name)
    make_trainer(whole, PruningTrainerCallback(CONFIG), train_dataset=samples(), **options).train()
    for step in (1, 2, 4, 6):
        model = build(name)
        trainer = make_trainer(model, PruningTrainerCallback(CONFIG), train_dataset=samples(), **options)
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{step}"))
        for (n, ours), theirs in zip(model.named_parameters(), whole.parameters(), strict=True):
            assert torch.equal(ours, theirs), (step, n)


def test_patience_and_the_best_model_go_with_it(make_trainer):
    model = build("mixtral")
    config = PruningConfig(
        sparsity=0.375, schedule="constant", rounds=2, granularity="expert", criterion="frequency", patience=1,
        min_round_steps=2, end=10,
    )  # fmt: skip
    pruning = PruningTrainerCallback(config)
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 12}
    trainer = make_trainer(
        model, pruning, train_dataset=samples(), eval_dataset=samples(8, 1), load_best_model_at_end=True, **options
    )
    trainer.train()
    assert len(pruning.history) == 2
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-5)


def test_what_stays_unshrunk_is_barred_and_said(make_trainer, caplog):
    model = build("mixtral")
    config = PruningConfig(sparsity=0.375, granularity="expert", schedule="one_shot", shrink_at_end=False)
    with caplog.at_level(logging.WARNING):
        make_trainer(model, PruningTrainerCallback(config), train_dataset=samples()).train()
    assert SAVED_UNBARRED in caplog.text
    masked = logits_of(model.eval())
    shrink(model)
    assert (logits_of(model) - masked).abs().max() < 1e-5


def test_a_loss_for_balance_counts_as_many_experts_in_each_layer(make_trainer, caplog):
    model = build("mixtral")
    model.config.output_router_logits = True
    config = PruningConfig(sparsity=0.3, granularity="expert", schedule="one_shot")
    make_trainer(model, PruningTrainerCallback(config), train_dataset=samples()).train()
    assert recorded_in(model.config)
    assert (
        "the loss that balances experts needs as many in each layer: output_router_logits is False now" in caplog.text
    )
    assert model(input_ids=samples()[0]["input_ids"][None], labels=samples()[0]["labels"][None]).loss.isfinite()


def test_zeros_that_are_held_are_barred(make_trainer):
    model = build("mixtral")
    prune(model, PruningConfig(sparsity=0.375, granularity="expert", schedule="one_shot"))
    fresh = build("mixtral")
    fresh.load_state_dict(model.state_dict())
    config = PruningConfig(sparsity=0.375, granularity="expert", schedule="one_shot", hold_zeros=True)
    options = {"max_steps": 2, "learning_rate": 0.0, "weight_decay": 0.0}
    make_trainer(fresh, PruningTrainerCallback(config), train_dataset=samples(), **options).train()
    assert (logits_of(fresh.eval()) - logits_of(model)).abs().max() < 1e-5
    assert fresh.num_parameters() < model.num_parameters()
