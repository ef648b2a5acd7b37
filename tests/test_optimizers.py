import pytest
import torch
import transformers
from accelerate import Accelerator

from hf_prune.optimizers import ELEMENTWISE, cut_state_, leaves_zeros, restart_lr_, undo_restart_lr_


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


NOT_ELEMENTWISE = {
    torch.optim.Adafactor: "moments of rows and columns",
    torch.optim.LBFGS: "one direction for all weights",
    torch.optim.Muon: "whole matrices are made orthogonal",
    torch.optim.SparseAdam: "only sparse gradients",
}
"""What torch has besides, and why."""


def test_each_optimizer_of_torch_is_known():
    found = {kind for kind in vars(torch.optim).values() if isinstance(kind, type)} - {torch.optim.Optimizer}
    assert found == {*ELEMENTWISE, *NOT_ELEMENTWISE}


@pytest.mark.parametrize("options", [{}, {"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_a_zero_without_gradient_and_moments_stays_zero(kind, options):
    torch.manual_seed(0)
    mask = torch.rand(8, 8) > 0.5
    weight = torch.nn.Parameter(torch.randn(8, 8))
    extra = {"weight_decay": 0.1, "momentum": 0.9, "centered": True, "amsgrad": True}
    options = options | {key: value for key, value in extra.items() if key in kind.__init__.__annotations__}
    try:
        optimizer = kind([weight], lr=0.01, **options)
    except TypeError:
        assert "fused" in options, "skipped only where an optimizer has no fused version"
        return
    for step in range(6):
        if step == 2:
            weight.data.mul_(mask)
            cut_state_(optimizer, "mask", {weight: mask})
        weight.grad = torch.randn(8, 8) * (mask if step >= 2 else 1)
        optimizer.step()
    assert not weight[~mask].any()
    assert weight[mask].all()


def test_what_is_known_to_leave_zeros():
    weight = torch.nn.Parameter(torch.zeros(1))
    adamw, accelerator = torch.optim.AdamW([weight]), Accelerator(cpu=True)

    class Own(torch.optim.AdamW):
        pass

    assert leaves_zeros(adamw)
    assert leaves_zeros(accelerator.prepare(adamw))
    assert not leaves_zeros(Own([weight]))
    assert not leaves_zeros(accelerator.prepare(torch.optim.Adafactor([weight])))
