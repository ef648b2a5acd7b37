"""Moments: in which trainings masks hold."""

from pathlib import Path

import pytest
import torch.distributed
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import TrainerCallback

from hf_prune import PruningConfig, PruningTrainerCallback
from tests.processes import on_two_processes
from tests.tiny import batch, build
from tests.trainers import trainer_factory

HALF = PruningConfig(sparsity=0.5)


def evaluate_and_train(rank: int, folder: Path) -> str:
    """What is said to a model that was evaluated and is then trained on."""
    make_trainer = trainer_factory(folder)
    model = build("llama")
    trainer = make_trainer(model, PruningTrainerCallback(HALF), train_dataset=batch(model, 8), max_steps=1)
    assert trainer.args.world_size == 2
    assert torch.distributed.get_backend() == "gloo"
    trainer.evaluate(batch(model, 8))
    with pytest.raises(ValueError, match=r"evaluate\(\) or predict\(\) came before train\(\)") as caught:
        trainer.train()
    return str(caught.value)


@pytest.mark.multiprocess
def test_a_model_that_was_evaluated_is_refused_where_it_would_be_trained_apart(tmp_path):
    first, second = on_two_processes(evaluate_and_train, tmp_path, tmp_path)
    assert first == second
    assert "on each of the 2 processes apart" in first


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP", "MEGATRON_LM"])
def test_parameters_that_are_divided_in_another_way_are_refused(kind, make_trainer, monkeypatch):
    class Sharded(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType[kind])

    model = build("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = make_trainer(model, Sharded(), PruningTrainerCallback(HALF))
    with pytest.raises(ValueError, match=rf"\({kind}\) in a way .* Take FSDP with fsdp_version 2"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_one_process_may_evaluate_first(make_trainer):
    pruning = PruningTrainerCallback(HALF)
    trainer = make_trainer(build("llama"), pruning)
    trainer.evaluate()
    trainer.train()
    assert pruning.history[-1].reached == 0.5
