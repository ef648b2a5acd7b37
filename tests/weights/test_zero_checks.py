"""What other callbacks write into pruned weights is taken out again, before anybody saves or uses the model."""

import copy
import io

import pytest
import torch
import transformers
from safetensors.torch import load_file

from hf_prune import MaskSet, PruningConfig, PruningTrainerCallback, sparsity_report
from hf_prune.weights.zero_checks import ZeroCheck
from tests.tiny import build

FILLED = "pruned weights back to zero: something wrote into them after PruningTrainerCallback."
CONFIG = PruningConfig(sparsity=0.8, schedule="geometric", rounds=2, end=0.9)


class Average(transformers.TrainerCallback):
    """Writes an average of the weights into the model, when an event comes."""

    def __init__(self, event, *, copies):
        self.copies, self.event = copies, event
        setattr(self, event, self.write)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.average = {name: parameter.detach() + 0.1 for name, parameter in model.named_parameters()}

    def write(self, args, state, control, model=None, **kwargs):
        model.state_dict()  # As those do that keep the weights of before.
        if not self.copies:
            model.load_state_dict(self.average, strict=False)
            return
        for name, parameter in model.named_parameters():
            parameter.data.copy_(self.average[name])


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("behind", [False, True])
def test_an_average_that_is_written_at_the_end(family, copies, behind, make_trainer, tmp_path, caplog):
    model, average = build(family), Average("on_train_end", copies=copies)
    pruning = PruningTrainerCallback(CONFIG)
    trainer = make_trainer(model, *((pruning, average) if behind else (average, pruning)))
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert (FILLED in caplog.text) == behind
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert all((saved[name][~mask] == 0).all() for name, mask in pruning.masks.items())
    assert pruning.masks.sparsity == sparsity_report(model).sparsity == pytest.approx(0.8, abs=1e-3)
    assert pruning.history[-1].reached == pruning.masks.sparsity
    kept = {name: average.average[name][mask] for name, mask in pruning.masks.items()}
    if behind:  # What is not pruned is the average's.
        assert all(torch.equal(model.get_parameter(name)[mask], kept[name]) for name, mask in pruning.masks.items())


@pytest.mark.parametrize("event", ["on_step_end", "on_evaluate"])
def test_checkpoints_hold_what_their_masks_say(event, make_trainer, tmp_path, caplog):
    model, pruning = build("llama"), PruningTrainerCallback(PruningConfig(sparsity=0.8))
    average = Average(event, copies=True)
    options = dict(save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, max_steps=4)
    make_trainer(model, pruning, average, **options).train()
    assert FILLED in caplog.text
    for step in (2, 4):
        saved = load_file(tmp_path / "out" / f"checkpoint-{step}" / "model.safetensors")
        assert all((saved[name][~mask] == 0).all() for name, mask in pruning.masks.items())


def test_what_is_written_after_the_state_dict_was_taken_is_seen_at_on_save(make_trainer, caplog):
    class Late(transformers.TrainerCallback):
        def on_save(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                model.get_parameter("model.layers.0.mlp.up_proj.weight").fill_(1)

    model, pruning = build("llama"), PruningTrainerCallback(PruningConfig(sparsity=0.8))
    make_trainer(model, Late(), pruning, save_strategy="steps", save_steps=6).train()
    assert FILLED in caplog.text
    assert sparsity_report(model).sparsity == pruning.masks.sparsity


def test_the_first_use_looks_once_more_and_then_the_model_is_an_ordinary_one(make_trainer, caplog):
    model = build("llama")
    make_trainer(model, PruningTrainerCallback(CONFIG)).train()
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    weight.data.fill_(1)
    ids = torch.arange(4, 12)[None]
    model(ids)
    assert FILLED in caplog.text
    assert (weight == 0).any()
    caplog.clear()
    weight.data.fill_(1)
    model(ids)
    assert (model.state_dict()["model.layers.0.mlp.up_proj.weight"] == 1).all()
    assert caplog.text == ""
    for hooks in ("_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_forward_pre_hooks"):
        assert not getattr(model, hooks)


@pytest.mark.parametrize("next_one", [None, PruningConfig(sparsity=0.3)])
def test_what_its_owner_loads_after_training_is_his(next_one, make_trainer, caplog):
    """A sweep begins each run from the same weights."""
    model = build("llama")
    dense = copy.deepcopy(model.state_dict())
    make_trainer(model, PruningTrainerCallback(CONFIG)).train()
    model.load_state_dict(dense)
    assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items())
    pruning = [] if next_one is None else [PruningTrainerCallback(next_one)]
    make_trainer(model, *pruning, max_steps=1).train()
    assert sparsity_report(model).sparsity == pytest.approx(0.0 if next_one is None else 0.3, abs=1e-3)
    assert FILLED not in caplog.text


def test_another_run_ends_the_check_of_the_one_before(make_trainer, caplog):
    model = build("llama")
    make_trainer(model, PruningTrainerCallback(CONFIG)).train()
    for parameter in model.parameters():
        parameter.data.fill_(0.1)
    make_trainer(model, PruningTrainerCallback(PruningConfig(sparsity=0.3, begin=3)), max_steps=4).train()
    assert sparsity_report(model).sparsity == pytest.approx(0.3, abs=1e-3)
    assert FILLED not in caplog.text


def test_a_shrunk_model_is_not_looked_at(make_trainer):
    model = build("llama")
    make_trainer(model, PruningTrainerCallback(PruningConfig(sparsity=0.5, granularity="neuron"))).train()
    assert not model._state_dict_pre_hooks
    assert not model._forward_pre_hooks


def test_copies_and_files_of_a_model_are_left_alone(caplog):
    model = torch.nn.Linear(4, 4)
    check = ZeroCheck()
    check.watch_until_used_(model, MaskSet({"weight": torch.zeros(4, 4, dtype=torch.bool)}))
    file = io.BytesIO()
    torch.save(model, file)
    assert b"hf_prune" not in file.getvalue()
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        other(torch.ones(4))
        assert other.state_dict()["weight"].all()
    assert caplog.text == ""
    assert not model.state_dict()["weight"].any()
    assert "Set 16 " + FILLED in caplog.text


def test_a_model_that_has_changed_since_is_left_alone(make_trainer, caplog):
    """Another has shrunk it, or given it another head or other embeddings."""
    model = build("bert")
    make_trainer(model, PruningTrainerCallback(PruningConfig(sparsity=0.5, target_modules=".*"))).train()
    model.classifier = torch.nn.Sequential(torch.nn.Linear(16, 5))
    layer = model.bert.encoder.layer[0]
    layer.intermediate.dense.weight = torch.nn.Parameter(torch.ones(8, 16))
    assert (model.state_dict()["bert.encoder.layer.0.intermediate.dense.weight"] == 1).all()
    layer.output.dense.weight.data.fill_(1)
    assert (model.state_dict()["bert.encoder.layer.0.output.dense.weight"] == 0).any()
    assert FILLED in caplog.text


def test_a_diverged_weight_is_not_counted():
    model = torch.nn.Linear(2, 1)
    model.weight.data[:] = torch.tensor([[torch.nan, 1.0]])
    masks = MaskSet({"weight": torch.tensor([[False, False]])})
    assert masks.rezero_(model) == 1
    assert masks.rezero_(model) == 0
