"""Movement against a sum kept by hand, in training, resumed and in several rounds."""

import pytest
import torch
from transformers import TrainerCallback

from hf_prune import PruningConfig, PruningTrainerCallback
from hf_prune.weights.masks import MaskSet
from hf_prune.weights.movement import Movement
from hf_prune.weights.targets import find_targets
from tests.tiny import build
from tests.trainers import trainer_factory
from tests.training.test_resume import forget_after, start

ROUNDS = PruningConfig(sparsity=0.8, schedule="geometric", rounds=3, begin=2, end=9, criterion="movement")


class ByHand(TrainerCallback):
    """Weights times gradients right before each step, as doubles."""

    def __init__(self, weights: dict[str, torch.nn.Parameter]) -> None:
        self.weights = weights
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.steps.append({n: -(w.detach().double() * w.grad.double()) for n, w in self.weights.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_that_moved_towards_zero_go(dtype, tmp_path):
    model = build("llama", dtype)
    hand = ByHand({name: target.weight for name, target in find_targets(model).items()})
    config = PruningConfig(sparsity=0.6, schedule="one_shot", criterion="movement", begin=4)
    pruning = PruningTrainerCallback(config)
    trainer = trainer_factory(tmp_path)(
        model, hand, pruning, gradient_accumulation_steps=2, max_grad_norm=0.1, max_steps=4 + 2
    )
    trainer.train()
    totals = {name: sum(step[name] for step in hand.steps[:4]) for name in hand.weights}
    scores = torch.cat([total.flatten() for total in totals.values()])
    kept = torch.cat([pruning.masks[name].flatten() for name in totals])
    assert int((~kept).sum()) == round(0.6 * kept.numel())
    tolerance = 1e-5 * scores.abs().max()
    assert scores[~kept].max() <= scores[kept].min() + tolerance


def test_before_the_first_step_is_an_error(tmp_path):
    pruning = PruningTrainerCallback(PruningConfig(sparsity=0.6, criterion="movement"))
    with pytest.raises(ValueError, match=r"first cut comes before the first step\. Set begin to a number of steps"):
        trainer_factory(tmp_path)(build("llama"), pruning).train()


def test_a_second_run_of_a_callback_begins_from_nothing(tmp_path):
    trainer, pruning = start(trainer_factory(tmp_path), ROUNDS)
    trainer.train()
    expected = pruning.masks.digest()
    again, other = start(trainer_factory(tmp_path / "again"), ROUNDS)
    again.remove_callback(other)
    again.add_callback(pruning)
    again.train()
    assert pruning.masks.digest() == expected


def test_movement_that_cannot_be_found_is_an_error(tmp_path):
    trainer, _ = start(trainer_factory(tmp_path), ROUNDS)
    trainer.train()
    forget_after(tmp_path / "out", 4)
    (tmp_path / "out" / "checkpoint-4" / "pruning_movement.safetensors").unlink()
    resumed, _ = start(trainer_factory(tmp_path), ROUNDS)
    message = (
        r"the movement of the weights is missing or damaged: .* newest complete checkpoint here: .*checkpoint-3\."
    )
    with pytest.raises(ValueError, match=message):
        resumed.train(resume_from_checkpoint=True)


def test_runs_that_need_none_keep_none(tmp_path):
    config = PruningConfig(sparsity=0.8, schedule="one_shot")
    trainer, pruning = start(trainer_factory(tmp_path), config)
    trainer.train()
    assert pruning.masks != MaskSet()
    assert not list((tmp_path / "out").rglob("pruning_movement*"))


def test_a_weight_without_a_gradient_does_not_move():
    targets = find_targets(build("llama"))
    movement = Movement.zeros(targets.values(), "run")
    first = next(iter(targets.values()))
    first.weight.grad = torch.full_like(first.weight, 2.0)
    movement.add_step_(targets.values())
    movement.add_step_(targets.values())
    torch.testing.assert_close(movement.tensors[first.name], -4 * first.weight.detach())
    assert not any(total.any() for name, total in movement.tensors.items() if name != first.name)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_step_that_float16_skips_is_not_counted(bad):
    targets = find_targets(build("llama"))
    movement = Movement.zeros(targets.values(), "run")
    for target in targets.values():
        target.weight.grad = torch.ones_like(target.weight)
    next(iter(targets.values())).weight.grad[0, 0] = bad
    movement.add_step_(targets.values())
    assert not any(total.any() for total in movement.tensors.values())


def test_after_the_last_cut_nothing_is_counted_or_kept(tmp_path):
    trainer, pruning = start(trainer_factory(tmp_path), ROUNDS)
    trainer.train()
    last = pruning.history[-1].step
    found = {int(path.parent.name.rpartition("-")[2]) for path in (tmp_path / "out").rglob("pruning_movement*")}
    assert found == set(range(1, last + 1))


def test_it_is_known_by_its_run_and_its_steps(tmp_path):
    targets = find_targets(build("llama"))
    movement = Movement.zeros(targets.values(), "run")
    begun = movement.digest()
    movement.add_step_(targets.values())
    movement.save(tmp_path / "file")
    found = Movement.load(tmp_path / "file").beside(targets)
    assert found.digest() == movement.digest() != begun
    assert found.digest() != Movement.zeros(targets.values(), "another").digest()
    assert all(torch.equal(found.tensors[name], total) for name, total in movement.tensors.items())
