"""Passes: how a model is called; and of one that FSDP2 has sharded, what is gathered is what one process sees."""

from collections.abc import Iterator

import pytest
import torch
import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader

from hf_prune import PruningConfig, PruningTrainerCallback, prune
from hf_prune.calibration.batches import IGNORED_LABEL
from hf_prune.calibration.costs import measure_costs
from hf_prune.calibration.statistics import STATISTICS, calibrate
from hf_prune.distributed.processes import rank_and_size
from hf_prune.distributed.shards import is_sharded, own, whole
from hf_prune.weights.targets import find_targets
from tests.processes import on_processes
from tests.tiny import FAMILIES, batch, build
from tests.trainers import trainer_factory

# How many batches of two samples each process has, and whether theirs have labels: of all processes one has any.
DEALS = {"as many": ([2, 2], True), "fewer": ([3, 1], True), "none": ([2, 0], True), "no labels": ([2, 1], False)}


def sharded(model: nn.Module) -> nn.Module:
    """The model as accelerate shards it: each block by itself, and what is left at the root."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                if not any(isinstance(inner, nn.ModuleList) for inner in block.modules()):
                    fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def dealt(model: nn.Module, deal: str) -> list[list[dict[str, torch.Tensor]]]:
    """The batches of each process; samples have different numbers of labels, where they have several."""
    (counts, labelled), samples = DEALS[deal], batch(model, 2 * sum(DEALS[deal][0]))
    for i, sample in enumerate(samples):
        if sample["labels"].ndim:
            sample["labels"][: 2 * (i % 4)] = IGNORED_LABEL
        if not labelled and i >= 2 * counts[0]:
            sample["labels"] = torch.full_like(sample["labels"], IGNORED_LABEL)
    batches = list(DataLoader(samples, 2))
    return [batches[: counts[0]], batches[counts[0] :]]


def of_family(family: str, deal: str, shards: bool) -> dict[str, dict[str, torch.Tensor]]:
    """Every statistic: of all batches on one process, of its own on one of several."""
    model = build(family)
    batches = dealt(model, deal)
    given = batches[rank_and_size()[0]] if shards else [each for of_one in batches for each in of_one]
    if shards:
        model = sharded(model)
    targets = find_targets(model)
    before = {name: parameter.grad for name, parameter in model.named_parameters()}
    found = calibrate(model, targets, given, STATISTICS, 100)
    assert all(parameter.grad is before[name] for name, parameter in model.named_parameters())
    assert not shards or all(is_sharded(target.weight) for target in targets.values())
    weighed = {"gradient", "squared_gradient"}
    assert all(is_sharded(v) == shards for name in weighed for v in found[name].values())
    return {name: {key: whole(value) for key, value in values.items()} for name, values in found.items()}


def of_all(rank: int) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
    found = {f"{family}, as many": of_family(family, "as many", True) for family in FAMILIES}
    return found | {f"llama, {deal}": of_family("llama", deal, True) for deal in DEALS}


@pytest.mark.multiprocess
def test_statistics_of_shards_are_those_of_one_process(tmp_path):
    for found in on_processes(2, of_all, tmp_path):
        for cell, statistics in found.items():
            expected = of_family(*cell.split(", "), False)
            assert statistics.keys() == expected.keys() == STATISTICS.keys()
            for name, values in statistics.items():
                assert values.keys() == expected[name].keys()
                assert any(value.any() for value in expected[name].values())
                for key, value in values.items():
                    difference = (value - expected[name][key]).norm() / expected[name][key].norm().clamp_min(1e-12)
                    assert difference < 1e-4, (cell, name, key, difference)


def a_calibration_leaves(rank: int) -> str:
    """What is said if the samples of one process cannot be read; the model is afterwards as it was."""
    model = build("llama")
    frozen = model.model.layers[0].mlp.up_proj.weight
    frozen.requires_grad_(False)
    dense, batches = find_targets(model), dealt(model, "fewer")
    model = sharded(model)
    frozen = model.model.layers[0].mlp.up_proj.weight
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: parameter.grad for name, parameter in model.named_parameters()}
    targets = find_targets(model)
    assert targets.keys() == dense.keys()

    def broken() -> Iterator[dict[str, torch.Tensor]]:
        yield batches[rank][0]
        if rank == 1:
            raise RuntimeError("a sample that cannot be read")
        yield from batches[rank][1:]

    found = calibrate(model, targets, batches[rank], STATISTICS, 100)
    assert all(own(value).any() for value in found["squared_gradient"].values())  # That of the frozen one too.
    with pytest.raises(RuntimeError, match="cannot be read") as caught:
        calibrate(model, targets, broken(), STATISTICS, 100)
    assert not frozen.requires_grad
    for name, parameter in model.named_parameters():
        assert parameter.grad is before[name]
        assert (own(parameter.grad) == 1).all()
        assert is_sharded(parameter)
    return str(caught.value)


@pytest.mark.multiprocess
def test_a_calibration_leaves_the_model_as_it_was_and_fails_on_all_processes(tmp_path):
    assert on_processes(2, a_calibration_leaves, tmp_path) == ["a sample that cannot be read"] * 2


def float16_is_refused(rank: int) -> str:
    policy = MixedPrecisionPolicy(param_dtype=torch.float16)
    mesh = init_device_mesh("cpu", (2,))
    model = fully_shard(build("llama"), mesh=mesh, mp_policy=policy)
    with pytest.raises(ValueError, match="too small for float16") as caught:
        prune(model, PruningConfig(sparsity=0.5, criterion="fisher"), batch(build("llama")))
    return str(caught.value)


@pytest.mark.multiprocess
def test_squares_in_float16_are_an_error(tmp_path):
    first, second = on_processes(2, float16_is_refused, tmp_path)
    assert first == second


CUTS = {
    **{f"{name}, unstructured": {"criterion": name} for name in ("taylor", "fisher", "snip", "wanda")},
    **{f"{name}, 2:4": {"criterion": name, "granularity": "2:4"} for name in ("fisher", "wanda")},
    "fisher, block": {"criterion": "fisher", "granularity": "block:4x4"},
    "fisher, three steps": {"criterion": "fisher", "score_steps": 3},
    "wanda, global": {"criterion": "wanda", "scope": "global"},
    "wanda, owl": {"criterion": "wanda", "scope": "owl"},
}


def kept_by(options: dict[str, object], shards: bool) -> dict[str, torch.Tensor]:
    """What a cut keeps of a model."""
    model = build("llama")
    batches = dealt(model, "fewer")
    given = batches[rank_and_size()[0]] if shards else [each for of_one in batches for each in of_one]
    if shards:
        model = sharded(model)
    options = {"sparsity": 0.5, **options}
    config = PruningConfig(**options)
    report = prune(model, config, given)
    assert report.zeros == report.masked == report.total / 2
    return {name: whole(parameter.detach()) != 0 for name, parameter in model.named_parameters()}


def cuts_of_shards(rank: int) -> dict[str, dict[str, torch.Tensor]]:
    return {name: kept_by(options, True) for name, options in CUTS.items()}


@pytest.mark.multiprocess
def test_cuts_of_shards_are_exact_and_those_of_one_process(tmp_path):
    first, second = on_processes(2, cuts_of_shards, tmp_path)
    for name, options in CUTS.items():
        expected = kept_by(options, False)
        different = {key: int((mask != expected[key]).sum()) for key, mask in first[name].items()}
        # Sums of several processes are rounded in another order, and close to the threshold that may decide.
        assert sum(different.values()) <= 4, (name, different)
        assert all(torch.equal(mask, second[name][key]) for key, mask in first[name].items())


# How a model is called


class TakesDict(nn.Module):
    """As sentence encoders do: its forward takes one dict, and writes into it."""

    def __init__(self, gives_loss=False):
        super().__init__()
        self.model = build("llama").model
        self.gives_loss = gives_loss

    def forward(self, features: dict[str, torch.Tensor], **kwargs: object) -> dict[str, torch.Tensor]:
        features["states"] = self.model(input_ids=features["input_ids"]).last_hidden_state
        return {"loss": features["states"].square().mean()} if self.gives_loss else features


def tokens() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(1, 25).view(4, 6), "labels": torch.zeros(4, dtype=torch.long)}


def test_a_forward_that_takes_a_dict_gets_it():
    """What its layers see is what those of the model inside see."""
    model, data = TakesDict(gives_loss=True), [tokens()]
    inner = model.model
    inside = calibrate(inner, find_targets(inner), [{"input_ids": data[0]["input_ids"]}], ["input_norm"], 4)
    found = calibrate(model, find_targets(model), data, STATISTICS, 4)
    assert set(data[0]) == {"input_ids", "labels"}
    for name, norm in inside["input_norm"].items():
        assert torch.equal(found["input_norm"][f"model.{name}"], norm)
    model.eval()
    model(dict(data[0]))["loss"].backward()
    for name, target in find_targets(model).items():
        torch.testing.assert_close(found["gradient"][name], target.weight.grad)
    for name in ("wanda", "snip", "sparsegpt"):
        config = PruningConfig(sparsity=0.5, criterion=name, calibration_samples=4)
        assert prune(TakesDict(gives_loss=True), config, data).sparsity == 0.5
    assert measure_costs({"dict": model}, data[0], turns=1)["dict"].flops > 0


@pytest.mark.parametrize("criterion", ["wanda", "taylor"])
def test_in_training_a_model_whose_loss_is_the_trainers_has_inputs_but_no_gradients(criterion, tmp_path):
    class Loss(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(inputs)["states"].square().mean()

    pruning = PruningTrainerCallback(PruningConfig(sparsity=0.5, criterion=criterion, calibration_samples=4))
    samples = [{"input_ids": torch.arange(1, 9)}] * 8
    options = {"cls": Loss, "train_dataset": samples, "remove_unused_columns": False, "max_steps": 1}
    trainer = trainer_factory(tmp_path)(TakesDict(), pruning, **options)
    if criterion == "wanda":
        trainer.train()
        assert pruning.masks.sparsity == 0.5
    else:
        message = r"TakesDict gives no loss for .* with input_ids\. Its own forward must give it, not a trainer's comp"
        with pytest.raises(ValueError, match=message):
            trainer.train()


def test_labels_are_left_out_where_a_forward_takes_none():
    """As by a trainer that has a loss of its own."""

    class TakesNone(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    x = torch.randn(3, 4)
    data, model = [{"x": x, "labels": torch.ones(3)}], TakesNone()
    norm = calibrate(model, find_targets(model), data, ["input_norm"], 3)["input_norm"]["layer.weight"]
    torch.testing.assert_close(norm, x.norm(dim=0)[None])
    with pytest.raises(ValueError, match=r"TakesNone gives no loss .* x, labels\. Its own forward must give it"):
        calibrate(model, find_targets(model), data, ["gradient"], 3)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, left, right):
        return self.layer(left) + right


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: nn.Sequential(nn.Linear(4, 4)),
            r"^Sequential\.forward has no arguments .* failed: TypeError",
        ),
        (Two, r"^Two\.forward takes left, right, and the batch holds x, y\. Rename"),
        (TakesDict, r"^TakesDict\.forward has no arguments named x, y\. .*failed: KeyError\('input_ids'\)\. Rename"),
    ],
)
def test_what_cannot_be_called_is_said(make, message):
    data = [{"x": torch.randn(2, 4), "y": torch.randn(2, 4)}]
    with pytest.raises(ValueError, match=message + ".*choose a criterion that looks at no data"):
        prune(make(), PruningConfig(sparsity=0.5, criterion="wanda"), data)


def test_wrappers_are_looked_through():
    """Of peft and of `torch.compile`, whose forwards take whatever they are given."""
    peft = pytest.importorskip("peft")
    data, plain = [tokens()], TakesDict()
    expected = calibrate(plain, find_targets(plain), data, ["input_norm"], 4)["input_norm"]
    adapted = peft.get_peft_model(TakesDict(), peft.LoraConfig(target_modules=["q_proj"]))
    for model in (adapted, torch.compile(TakesDict(), backend="eager")):
        found = calibrate(model, find_targets(model), data, ["input_norm"], 4)["input_norm"]
        for values, other in zip(found.values(), expected.values(), strict=True):
            assert torch.equal(values, other)


def test_what_cannot_be_differentiated_in_evaluation_mode_is_said():
    class Trains(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            y = self.layer(x)
            z = y.exp()
            return {"loss": (z if self.training else z.add_(1)).mean()}

    data = [{"x": torch.randn(2, 4)}]
    for name in ("taylor", "fisher", "sparsegpt"):
        model = Trains()
        message = "^the backward pass of Trains failed: .*inplace operation.*only in training mode.*or wanda"
        with pytest.raises(ValueError, match=message):
            prune(model, PruningConfig(sparsity=0.5, criterion=name), data)
        assert model.training
    assert prune(Trains(), PruningConfig(sparsity=0.5, criterion="wanda"), data).sparsity == 0.5
