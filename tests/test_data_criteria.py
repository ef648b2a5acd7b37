"""Criteria that look at data, in `prune` and in the callback: what they change, and what they must not."""

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, default_data_collator

from hf_prune import MaskSet, PruningConfig, PruningTrainerCallback, ScoreInputs, prune
from hf_prune.calibration.statistics import STATISTICS
from hf_prune.criteria import CRITERIA, RECONSTRUCTIONS, needs, needs_of
from hf_prune.plan import Plan
from hf_prune.pruning import cut_
from hf_prune.weights.targets import find_targets
from tests.tiny import batch, build
from tests.trainers import trainer_factory
from tests.training.test_resume import STEPS, forget_after, outcome, start

DATA = [name for name, criterion in CRITERIA.items() if set(needs_of(criterion)) & set(STATISTICS)]
DATA += RECONSTRUCTIONS


def data(model: nn.Module) -> DataLoader:
    return DataLoader(batch(model, 8), batch_size=4, collate_fn=default_data_collator)


# One cut


@pytest.mark.parametrize("name", DATA)
def test_without_data_is_an_error(name):
    model = build("llama")
    message = rf"the criterion '{name}' with scope 'auto' looks at data \(.*\)\. Give a dataloader of calibration"
    with pytest.raises(ValueError, match=message):
        prune(model, PruningConfig(sparsity=0.5, criterion=name))


def test_owl_without_data_is_an_error_whatever_the_criterion():
    message = r"the criterion 'magnitude' with scope 'owl' looks at data \(input_norm\)\. Give a dataloader"
    with pytest.raises(ValueError, match=message):
        prune(build("llama"), PruningConfig(sparsity=0.5, scope="owl"))


@pytest.mark.parametrize("name", DATA)
def test_the_data_decide(name):
    config = PruningConfig(sparsity=0.5, criterion=name)
    masks = []
    for seed in (0, 0, 1):
        model = build("llama")
        samples = DataLoader(batch(model, 8, seed), batch_size=4, collate_fn=default_data_collator)
        prune(model, config, samples)
        masks.append(MaskSet.from_zeros(model).digest())
    assert masks[0] == masks[1] != masks[2]


def test_a_criterion_of_ones_own_declares_what_it_needs():
    @needs("gradient", "input_norm")
    def mine(inputs: ScoreInputs) -> torch.Tensor:
        return inputs["gradient"].abs() * inputs["input_norm"]

    model = build("llama")
    assert prune(model, PruningConfig(sparsity=0.5), data(model), criterion=mine).sparsity == 0.5


class Levels:
    """A criterion that notes how sparse the model is whenever it is asked about a certain weight."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.seen = model, []

    def __call__(self, inputs: ScoreInputs) -> torch.Tensor:
        zeros = sum(int((p == 0).sum()) for p in self.model.parameters())
        self.seen += [zeros] if zeros not in self.seen else []
        return inputs.weight.abs()


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_each_score_step_leaves_the_same_share(steps):
    model = build("llama")
    levels, config = Levels(model), PruningConfig(sparsity=0.9, score_steps=steps)
    report = prune(model, config, criterion=levels)
    assert report.zeros == round(0.9 * report.total)
    assert levels.seen == [round((1 - 0.1 ** (k / steps)) * report.total) for k in range(steps)]


def test_score_steps_go_on_from_what_is_pruned():
    model = build("llama")
    config = PruningConfig(sparsity=0.9, score_steps=2)
    half = cut_(model, Plan.of(model, config), MaskSet(), 0.5)
    levels = Levels(model)
    masks = cut_(model, Plan.of(model, config, levels), half, 0.9)
    total = masks.total
    assert levels.seen[-1] == round((1 - math.sqrt(0.5 * 0.1)) * total)
    assert masks.masked == round(0.9 * total)
    assert all(not (masks[name] & ~mask).any() for name, mask in half.items())


@pytest.mark.parametrize("steps", [1, 2, 3, 9])
def test_score_steps_of_a_pattern_go_through_the_patterns_on_the_way(steps):
    model = build("llama")
    levels, config = Levels(model), PruningConfig(granularity="1:4", score_steps=steps)
    report = prune(model, config, criterion=levels)
    assert report.sparsity == 0.75
    quarter = report.total // 4
    assert levels.seen == {1: [0], 2: [0, 2 * quarter]}.get(steps, [0, quarter, 2 * quarter])


def test_score_steps_go_on_where_layers_are_as_sparse_as_they_want():
    """The average of all weights says nothing of where those are that compete by themselves."""
    model = build("llama")
    own = {".*mlp.*": 0.1}
    config = PruningConfig(sparsities=[0.5, 0.8], layer_sparsity=own, score_steps=4)
    plan, masks = Plan.of(model, config), MaskSet()
    for sparsity in config.round_sparsities:
        masks = cut_(model, plan, masks, sparsity)
    rest = [mask for name, mask in masks.items() if "mlp" not in name]
    assert sum(int((~mask).sum()) for mask in rest) == round(0.8 * sum(mask.numel() for mask in rest))

    model = build("llama")
    prune(model, PruningConfig(sparsity=0.5))
    config = PruningConfig(sparsity=0.95, hold_zeros=True, criterion="wanda", score_steps=4, calibration_samples=8)
    report = prune(model, config, data(model))
    assert report.sparsity == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_score_steps_of_a_pattern_leave_room_for_zeros_that_lie_together(steps):
    """A row that has lost half of each group already goes straight to the last pattern."""
    model = build("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.0.self_attn.q_proj.weight")[0].view(-1, 8)[:, :4] = 0
    config = PruningConfig(
        granularity="4:8", criterion="wanda", score_steps=steps, hold_zeros=True, calibration_samples=8
    )
    assert prune(model, config, data(model)).sparsity == 0.5


def test_samples_that_can_be_read_once_are_an_error():
    model = build("llama")
    with pytest.raises(ValueError, match=r"dataloader is a generator, which can be read once"):
        prune(model, PruningConfig(sparsity=0.5, criterion="wanda"), (values for values in data(model)))


def test_scoring_anew_changes_what_the_data_say():
    digests = set()
    for steps in (1, 4):
        model, config = build("llama"), PruningConfig(sparsity=0.8, criterion="fisher", score_steps=steps)
        prune(model, config, data(model))
        digests.add(MaskSet.from_zeros(model).digest())
    assert len(digests) == 2


def test_an_error_in_a_later_score_step_leaves_the_weights_as_they_were():
    model = build("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}

    def fails(inputs: ScoreInputs) -> torch.Tensor:
        if (inputs.weight == 0).any():
            raise RuntimeError("no more")
        return inputs.weight.abs()

    with pytest.raises(RuntimeError, match="no more"):
        prune(model, PruningConfig(sparsity=0.9, score_steps=3), criterion=fails)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("name", DATA)
def test_under_peft_the_data_say_the_same_of_the_base_weights(name, caplog):
    """Adapters as they begin add nothing; then what is left of the base model is what is left without them."""
    peft = pytest.importorskip("peft")
    plain, base = build("llama"), build("llama")
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj", "down_proj"], lora_dropout=0.5))
    config = PruningConfig(sparsity=0.5, criterion=name, calibration_samples=8)
    expected, report = prune(plain, config, data(plain)), prune(model, config, data(base))
    assert report.zeros == expected.zeros
    for (_, left), (_, right) in zip(
        sorted(find_targets(plain).items()),
        sorted((n.removeprefix("base_model.model."), t) for n, t in find_targets(model).items()),
        strict=True,
    ):
        torch.testing.assert_close(right.weight, left.weight, rtol=1e-4, atol=1e-5)
    assert [p.requires_grad for n, p in model.named_parameters()] == [
        "lora_" in n for n, _ in model.named_parameters()
    ]
    assert "Adapters fill the zeros again, unless keep_sparsity masks them." in caplog.text


# While training


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("family", ["gpt2", "resnet"])
def test_a_cut_that_prunes_nothing_changes_nothing(family, name, tmp_path):
    """With dropout and shuffled data: the random numbers of the run are those of the run without."""
    weights = []
    for callbacks in ([], [PruningTrainerCallback(PruningConfig(sparsity=0.0, criterion=name, begin=2))]):
        torch.manual_seed(0)
        model = build(family)
        make = trainer_factory(tmp_path)
        make(model, *callbacks, gradient_accumulation_steps=2, per_device_train_batch_size=2).train()
        weights.append(model.state_dict())
    assert len(weights[0]) == len(weights[1])
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


@pytest.mark.parametrize("name", [*DATA, "movement"])
def test_rounds_are_exact_and_resumed_to_the_last_bit(name, tmp_path):
    config = PruningConfig(
        sparsity=0.8, schedule="geometric", rounds=3, begin=2, end=9, criterion=name, calibration_samples=10
    )
    trainer, pruning = start(trainer_factory(tmp_path), config)
    trainer.train()
    for row in pruning.history:
        # In rows each is rounded: those of GPT-2 here have 16 inputs.
        slack = {"row": row.total / 32, "layer": 0.5 * len(pruning.masks)}.get(
            Plan.of(trainer.model, config).scope.name, 0.5
        )
        assert abs(row.masked - row.asked * row.total) <= slack
    expected = outcome(trainer, pruning)
    for step in (STEPS - 2, 4, 1):
        forget_after(tmp_path / "out", step)
        resumed, resumed_pruning = start(trainer_factory(tmp_path), config)
        resumed.train(resume_from_checkpoint=True)
        assert outcome(resumed, resumed_pruning) == expected


def test_calibration_samples_count(tmp_path):
    digests = set()
    for samples in (2, 12):
        config = PruningConfig(sparsity=0.8, criterion="taylor", schedule="one_shot", calibration_samples=samples)
        _, pruning = run = start(trainer_factory(tmp_path), config, max_steps=1, load_best_model_at_end=False)
        run[0].train()
        digests.add(pruning.masks.digest())
    assert len(digests) == 2


def test_held_zeros_need_no_calibration_before_the_first_cut(tmp_path):
    model = build("llama")
    prune(model, PruningConfig(sparsity=0.3))
    pruning = PruningTrainerCallback(PruningConfig(sparsity=0.6, criterion="fisher", hold_zeros=True, begin=2))
    trainer_factory(tmp_path)(model, pruning).train()
    assert pruning.masks.sparsity == pytest.approx(0.6, abs=1e-4)
    assert [row.round for row in pruning.history] == [0, 1]


def test_data_without_labels_are_an_error_in_training(tmp_path):
    config = PruningConfig(sparsity=0.5, criterion="taylor")
    model = build("llama")
    samples = [{"input_ids": sample["input_ids"]} for sample in batch(model, 8)]
    trainer = trainer_factory(tmp_path)(model, PruningTrainerCallback(config), train_dataset=samples)
    with pytest.raises(ValueError, match="They need 'labels'"):
        trainer.train()


class Masks:
    """A collator with random numbers of its own, as the one for masked language models has."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, samples):
        together = default_data_collator(samples)
        together["labels"][torch.rand(together["labels"].shape, generator=self.generator) < 0.5] = -100
        return together


@dataclasses.dataclass(frozen=True)
class FrozenMasks:
    generator: torch.Generator

    __call__ = Masks.__call__


@pytest.mark.parametrize(
    "make", [Masks, lambda: Masks().__call__, lambda: FrozenMasks(torch.Generator().manual_seed(0))]
)
def test_a_collator_draws_what_it_would_have_drawn(make, tmp_path):
    weights = []
    for callbacks in ([], [PruningTrainerCallback(PruningConfig(sparsity=0.0, criterion="taylor", begin=2))]):
        model = build("llama")
        trainer = trainer_factory(tmp_path)(model, *callbacks)
        trainer.data_collator = make()
        trainer.train()
        weights.append(model.state_dict())
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


class OwnIterator(IterableDataset):
    def __init__(self, samples):
        self.left = iter(samples)

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.left)


class Loads(Trainer):
    """Batches that the dataset makes itself, or a loader that is none of torch."""

    def get_train_dataloader(self):
        batches = [default_data_collator(self.train_dataset[i : i + 4]) for i in range(0, 24, 4)]
        return DataLoader(batches, batch_size=None) if self.whole else list(batches)


def test_samples_that_training_would_lose_are_an_error(tmp_path):
    model, pruning = build("llama"), PruningTrainerCallback(PruningConfig(sparsity=0.5, criterion="wanda"))
    trainer = trainer_factory(tmp_path)(model, pruning, train_dataset=OwnIterator(batch(model, 64)))
    with pytest.raises(ValueError, match=r"\(OwnIterator\) is its own iterator, and a calibration would take"):
        trainer.train()


def test_batches_may_come_from_the_dataset(tmp_path):
    model = build("llama")
    pruning = PruningTrainerCallback(PruningConfig(sparsity=0.5, criterion="wanda", calibration_samples=10))
    trainer = trainer_factory(tmp_path)(model, pruning, cls=Loads)
    trainer.whole = True
    trainer.train()
    assert pruning.masks.sparsity == pytest.approx(0.5, abs=0.02)


def test_a_loader_without_a_dataset_is_an_error(tmp_path):
    model, pruning = build("llama"), PruningTrainerCallback(PruningConfig(sparsity=0.5, criterion="wanda"))
    trainer = trainer_factory(tmp_path)(model, pruning, cls=Loads)
    trainer.whole = False
    with pytest.raises(ValueError, match="the training data come from a list, which has no dataset to read"):
        trainer.train()
