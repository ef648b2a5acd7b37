import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from hf_prune.training.optimizers import cut_state_, require_not_retired, restart_lr_, retire, undo_restart_lr_


def scheduler_of(kind: str, steps: int, warmup: int, rates=(1e-2, 1e-3)) -> torch.optim.lr_scheduler.LambdaLR:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
    optimizer = torch.optim.SGD(groups)
    return transformers.get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=steps)


def take(scheduler, steps: int) -> list[list[float]]:
    """The learning rates of both groups with which each step is taken."""
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in scheduler.optimizer.param_groups])
        scheduler.optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("kind", ["linear", "cosine", "polynomial", "constant_with_warmup", "cosine_with_restarts"])
@pytest.mark.parametrize("start", [0, 7])
def test_a_round_has_the_schedule_of_a_run_of_its_length(kind, start):
    scheduler = scheduler_of(kind, 100, 20)
    take(scheduler, start)
    for length in (10, 50):  # twice in a row: the second is of the run, not of the round before
        restart_lr_(scheduler, scheduler.last_epoch, length, 100)
        taken, expected = take(scheduler, length), take(scheduler_of(kind, length, length // 5), length)
        assert torch.tensor(taken).allclose(torch.tensor(expected), rtol=1e-6)


def test_undone_the_schedule_is_the_runs():
    scheduler = scheduler_of("linear", 100, 20)
    before = list(scheduler.lr_lambdas)
    restart_lr_(scheduler, 0, 10, 100)
    assert scheduler.lr_lambdas != before
    undo_restart_lr_(scheduler)
    assert scheduler.lr_lambdas == before


def test_a_scheduler_that_was_loaded_goes_on_where_it_was():
    one, other = scheduler_of("cosine", 100, 20), scheduler_of("cosine", 100, 20)
    take(one, 30)
    restart_lr_(one, 30, 40, 100)
    take(one, 13)
    other.load_state_dict(one.state_dict())
    restart_lr_(other, 30, 40, 100)
    assert take(one, 20) == take(other, 20)


def test_a_learning_rate_that_is_no_function_of_the_step_is_an_error():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    for scheduler in (
        torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
    ):
        with pytest.raises(
            ValueError, match=rf"restart_lr needs .* and {type(scheduler).__name__} is not\. Take a lr_"
        ):
            restart_lr_(scheduler, 0, 10, 100)
        undo_restart_lr_(scheduler)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adafactor])
@pytest.mark.parametrize("how", ["mask", "reset", "keep"])
def test_what_becomes_of_the_state(kind, how):
    torch.manual_seed(0)
    pruned, other = (torch.nn.Parameter(torch.randn(4, 4)) for _ in range(2))
    optimizer = kind([pruned, other])
    (pruned.square().sum() + other.square().sum()).backward()
    optimizer.step()
    before = {
        p: {k: v.clone() for k, v in state.items() if torch.is_tensor(v)} for p, state in optimizer.state.items()
    }
    mask = torch.rand(4, 4) > 0.5
    cut_state_(optimizer, how, {pruned: mask})
    if how == "reset":
        assert not optimizer.state
        return
    for name, value in before[pruned].items():
        masked = value * mask if how == "mask" and value.shape == mask.shape else value
        assert torch.equal(optimizer.state[pruned][name], masked)
    assert all(torch.equal(optimizer.state[other][name], value) for name, value in before[other].items())


def test_an_optimizer_is_retired_in_whichever_wrapper():
    old, new = (torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]) for _ in range(2))
    Accelerator(cpu=True)  # Its wrappers ask what kind of machine they are on.
    retire(AcceleratedOptimizer(old))
    for optimizer in (old, AcceleratedOptimizer(old)):
        with pytest.raises(ValueError, match=r"weights from before the model was shrunk .* Make a new Trainer"):
            require_not_retired(optimizer)
    require_not_retired(AcceleratedOptimizer(new))
