"""Statistics against plain loops over single samples, and that nothing else is touched."""

import copy
import itertools
import logging
import random

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import default_data_collator

from hf_prune.calibration import STATISTICS, calibrate, label_counts
from hf_prune.samples import batches_of
from hf_prune.targets import find_targets
from tests.tiny import FAMILIES, TEXT, batch, build, sixteen_experts

SAMPLES = 7


def samples_of(model: nn.Module, uneven: bool = True) -> list[dict[str, torch.Tensor]]:
    """Samples of which each has another number of labels, where samples have several."""
    samples = batch(model, SAMPLES)
    for i, sample in enumerate(samples):
        if uneven and sample["labels"].ndim:
            sample["labels"][:i] = -100
        if "pixel_values" in sample:
            sample["pixel_values"] = sample["pixel_values"].to(next(model.parameters()).dtype)
    return samples


def loader(samples: list[dict[str, torch.Tensor]], size: int = 4) -> DataLoader:
    return DataLoader(samples, batch_size=size, collate_fn=default_data_collator)


def alone(model: nn.Module, samples: list[dict[str, torch.Tensor]]):
    """Each sample's labels and gradients, by autograd, one after the other."""
    model = copy.deepcopy(model).eval()
    targets = find_targets(model)
    for sample in samples:
        single = default_data_collator([sample])
        model.zero_grad()
        model(**single).loss.backward()
        gradients = {
            n: torch.zeros_like(t.weight) if t.weight.grad is None else t.weight.grad.clone()
            for n, t in targets.items()
        }
        yield float(label_counts(model, single)), gradients


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        assert ours[name].dtype == torch.float32
        assert (ours[name] - expected).norm() <= tolerance * expected.norm(), name
        assert expected.any(), name


def double(family: str) -> nn.Module:
    # torch has no grouped product in float64, with which Mixtral's experts work.
    return build(family, torch.float32 if family == "mixtral" else torch.float64)


@pytest.mark.parametrize("size", [1, 4, 7])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_is_that_of_the_mean_loss_over_labels(family, size):
    model = double(family)
    samples = samples_of(model)
    found = list(alone(model, samples))
    total = sum(labels for labels, _ in found)
    expected = {n: sum(labels * g[n] for labels, g in found) / total for n in find_targets(model)}
    statistics = calibrate(model, find_targets(model), loader(samples, size), ["gradient"], SAMPLES)
    assert_close(statistics["gradient"], expected, 1e-4 if family == "mixtral" else 1e-6)


@pytest.mark.parametrize("size", [1, 4, 7])
@pytest.mark.parametrize("family", FAMILIES)
def test_squared_gradients_are_those_of_single_samples(family, size, caplog):
    model = double(family)
    samples = samples_of(model)
    expected = {n: sum(g[n].square() for _, g in alone(model, samples)) / SAMPLES for n in find_targets(model)}
    with caplog.at_level(logging.INFO):
        statistics = calibrate(model, find_targets(model), loader(samples, size), ["squared_gradient"], SAMPLES)
    assert_close(statistics["squared_gradient"], expected)
    # Only experts, which see positions of several samples at once, cannot do it in batches.
    assert ("in passes of their own" in caplog.text) == (family == "mixtral" and size > 1)


def test_a_sample_without_labels_has_no_gradient():
    model = build("gpt_neo", torch.float64)
    samples = samples_of(model)
    samples[2]["labels"][:] = -100
    expected = {
        n: sum(g[n].square() for i, (_, g) in enumerate(alone(model, samples)) if i != 2) / SAMPLES
        for n in find_targets(model)
    }
    statistics = calibrate(model, find_targets(model), loader(samples), ["squared_gradient"], SAMPLES)
    assert_close(statistics["squared_gradient"], expected)


class Shared(nn.Module):
    """A layer that is used twice, and one that sees several windows of a sample; perhaps outputs change in place."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.linear, self.windows, self.act = nn.Linear(6, 6), nn.Linear(3, 4), nn.ReLU(inplace)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.act(self.linear(self.act(self.linear(x))))
        seen = self.windows(hidden.reshape(2 * len(x), -1, 3)).reshape(len(x), -1)
        return {"loss": (seen.mean(1) - labels).square().mean()}


@pytest.mark.parametrize("inplace", [False, True])
def test_layers_that_are_used_twice_and_outputs_that_are_changed_in_place(inplace, caplog):
    torch.manual_seed(0)
    model = Shared(inplace).double()
    samples = [{"x": torch.randn(5, 6).double(), "labels": torch.randn(()).double()} for _ in range(SAMPLES)]
    targets = find_targets(model, ["linear", "windows"])
    expected = {name: torch.zeros_like(target.weight) for name, target in targets.items()}
    for sample in samples:
        model.zero_grad()
        model(**default_data_collator([sample]))["loss"].backward()
        for name, target in targets.items():
            expected[name] += target.weight.grad.square() / SAMPLES
    with caplog.at_level(logging.INFO):
        statistics = calibrate(model, targets, loader(samples), ["squared_gradient"], SAMPLES)
    assert_close(statistics["squared_gradient"], expected)
    # An output that is a view, and then changed, is not in the graph any more: that is noticed.
    assert ("in passes of their own" in caplog.text) == inplace


class Mixes(nn.Module):
    """Samples do not lie along the first dimension inside."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.linear(x.transpose(0, 1)).mean((0, 2)) - labels).square().mean()}


class Recomputes(nn.Module):
    """Has a backward pass of its own, as reversible layers have: the forward pass is not in the graph."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return nn.functional.linear(x, weight)

        @staticmethod
        def backward(ctx, grad):
            x, weight = ctx.saved_tensors
            return grad @ weight, grad.flatten(0, -2).T @ x.flatten(0, -2)

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.Product.apply(x, self.linear.weight).mean((1, 2)) - labels).square().mean()}


@pytest.mark.parametrize("model_class", [Mixes, Recomputes])
def test_samples_that_cannot_be_told_apart_have_passes_of_their_own(model_class, caplog):
    torch.manual_seed(0)
    model = model_class().double()
    samples = [{"x": torch.randn(4, 6).double(), "labels": torch.randn(()).double()} for _ in range(8)]
    targets = find_targets(model, ["linear"])
    expected = torch.zeros_like(model.linear.weight)
    for sample in samples:
        model.zero_grad()
        model(**default_data_collator([sample]))["loss"].backward()
        expected += model.linear.weight.grad.square() / 8
    with caplog.at_level(logging.INFO):
        statistics = calibrate(model, targets, loader(samples), ["squared_gradient"], 8)
    assert_close(statistics["squared_gradient"], {"linear.weight": expected})
    assert "Gradients of single samples are computed in passes of their own." in caplog.text


@pytest.mark.parametrize("family", FAMILIES)
def test_input_norms_are_those_that_modules_see(family):
    model = double(family).eval()
    if family == "mixtral":
        model.set_experts_implementation("eager")
    samples, targets = samples_of(model), find_targets(model)
    squares: dict[str, torch.Tensor] = {}

    def see(name: str):
        def hook(module, inputs):
            x = inputs[0].detach()
            if isinstance(module, nn.Conv2d):
                group = x.shape[1] // module.groups
                ones = torch.ones(1, 1, *module.weight.shape[2:], dtype=x.dtype)
                # What each kernel position sees of each channel: the squares, shifted and cut as the convolution does.
                x = (
                    torch.nn.functional.unfold(
                        x.square(), module.kernel_size, module.dilation, module.padding, module.stride
                    )
                    .sum((0, 2))
                    .reshape(module.groups, 1, group, *ones.shape[2:])
                )
                rows = len(module.weight) // module.groups
                value = x.expand(-1, rows, -1, -1, -1).reshape(module.weight.shape)
            else:
                value = x.reshape(-1, x.shape[-1]).square().sum(0)
                value = value[:, None] if isinstance(module, transformers.pytorch_utils.Conv1D) else value[None]
                value = value.expand(module.weight.shape)
            squares[name] = squares.get(name, 0) + value

        return hook

    for name in targets:
        if not name.endswith(("_proj",)):
            model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(see(name))
    statistics = calibrate(model, targets, loader(samples), ["input_norm"], SAMPLES)["input_norm"]
    expected = {name: value.sqrt() for name, value in squares.items()}
    assert_close({n: statistics[n].expand(targets[n].weight.shape) for n in expected}, expected)
    experts = {name for name, target in targets.items() if target.weight.ndim == 3}
    assert set(targets) - set(expected) == experts


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_input_norms_of_experts(implementation):
    """Against the states that the router sends to each of them."""
    model = build("mixtral").eval()
    model.set_experts_implementation(implementation)
    targets, samples = find_targets(model), samples_of(model)
    statistics = calibrate(model, targets, loader(samples, 7), ["input_norm"], SAMPLES)["input_norm"]
    assert model.config._experts_implementation == implementation
    found = {}

    def see(module, inputs, name):
        states, chosen, _ = inputs
        found[name] = torch.stack([states[(chosen == e).any(1)].square().sum(0).sqrt() for e in range(3)])

    for i, layer in enumerate(model.model.layers):
        name = f"model.layers.{i}.mlp.experts.gate_up_proj"
        layer.mlp.experts.register_forward_pre_hook(lambda module, inputs, name=name: see(module, inputs, name))
    with torch.no_grad():
        model(**default_data_collator(samples))
    assert len(found) == 2
    for name, expected in found.items():
        torch.testing.assert_close(statistics[name].squeeze(1), expected)


@pytest.mark.parametrize("family", ["gpt_neo", "resnet", "mixtral"])
def test_nothing_else_is_touched(family):
    model = build(family).train()
    model.requires_grad_(False)
    first = next(iter(model.parameters()))
    first.requires_grad_(True)
    first.grad = torch.full_like(first, 3.0)
    next(model.children()).eval()
    modes = [module.training for module in model.modules()]
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    weights = {name: value.clone() for name, value in model.named_parameters()}
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()

    def noisy():
        for values in loader(samples_of(model)):
            torch.rand(3), np.random.rand(3), random.random()
            yield values

    calibrate(model, find_targets(model), noisy(), list(STATISTICS), SAMPLES)
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == [p is first for p in model.parameters()]
    assert [p.grad is None for p in model.parameters()] == [p is not first for p in model.parameters()]
    assert (first.grad == 3).all()
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]


def test_dropout_does_not_matter():
    config = transformers.LlamaConfig(**TEXT, num_key_value_heads=1, attention_dropout=0.9)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).train()
    runs = [calibrate(model, find_targets(model), loader(samples_of(model)), ["gradient"], SAMPLES) for _ in range(2)]
    for name, value in runs[0]["gradient"].items():
        assert torch.equal(value, runs[1]["gradient"][name])


def test_bfloat16_has_statistics_in_float32():
    model, reference = build("llama", torch.bfloat16), build("llama", torch.bfloat16).float()
    for name in STATISTICS:
        ours = calibrate(model, find_targets(model), loader(samples_of(model)), [name], SAMPLES)[name]
        theirs = calibrate(reference, find_targets(reference), loader(samples_of(model)), [name], SAMPLES)[name]
        for parameter, value in ours.items():
            assert value.dtype == torch.float32
            assert (value - theirs[parameter]).norm() < 0.1 * theirs[parameter].norm()


def test_samples_beyond_those_asked_for_are_not_read():
    model = build("llama")
    samples = samples_of(model)
    targets = find_targets(model)
    few = calibrate(model, targets, loader(samples, 4), ["gradient"], 5)["gradient"]
    same = calibrate(model, targets, loader(samples[:5], 5), ["gradient"], 5)["gradient"]
    for name, value in few.items():
        torch.testing.assert_close(value, same[name])


def test_fewer_samples_than_asked_for_are_told(caplog):
    model = build("llama")
    calibrate(model, find_targets(model), loader(samples_of(model)), ["gradient"], 100)
    assert caplog.text.count("Calibration has 7 samples, fewer than the 100 asked for.") == 1


def test_progress_is_shown_where_it_takes_long(capsys, monkeypatch):
    model = build("llama")
    arguments = model, find_targets(model), loader(samples_of(model), 1), ["gradient"], SAMPLES
    calibrate(*arguments, show_progress=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("hf_prune.samples.DELAY", 0)
    calibrate(*arguments, show_progress=True)
    assert "Calibrating: 100%" in capsys.readouterr().err
    calibrate(*arguments)
    assert capsys.readouterr().err == ""


class Stream(IterableDataset):
    def __iter__(self):
        yield from range(10)


def test_batches_are_drawn_anew_and_leave_the_loader_alone():
    data = DataLoader(list(range(100)), batch_size=7, shuffle=True, collate_fn=list)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    drawn = [list(batches_of(data, 10, 4, seed)) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert [len(values) for values in drawn[0]] == [4, 4, 2]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(itertools.chain(*drawn[0]))) == 10
    assert list(batches_of(DataLoader(Stream(), collate_fn=list), 5, 4, 0)) == [[0, 1, 2, 3], [4]]


# Bad input


def test_no_samples_are_an_error():
    model = build("llama")
    with pytest.raises(ValueError, match="there are no calibration samples: the dataloader gave no batch"):
        calibrate(model, find_targets(model), [], ["gradient"], 4)


@pytest.mark.parametrize("name", ["gradient", "squared_gradient"])
def test_batches_without_labels_are_an_error_where_a_loss_is_needed(name):
    model = build("llama")
    samples = [{"input_ids": sample["input_ids"]} for sample in samples_of(model)]
    calibrate(model, find_targets(model), loader(samples), ["input_norm"], 4)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM gives no loss for .* with input_ids\. They need 'labels'"):
        calibrate(model, find_targets(model), loader(samples), [name], 4)


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_an_error_that_names_a_module(name, value):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] = value
    message = rf"the {name.replace('_', ' ')} of 'model\.layers\..*' is NaN or infinite over the calibration samples"
    with pytest.raises(ValueError, match=message):
        calibrate(model, find_targets(model), loader(samples_of(model)), [name], 4)


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_padding_is_no_input(family):
    """Alone, a sample needs none; beside a longer one it does."""
    model = build(family)
    short, long = (torch.arange(1, n + 1) for n in (3, 12))
    labels = torch.tensor(0) if family == "bert" else torch.full((12,), -100)

    def sample(ids: torch.Tensor, size: int) -> dict[str, torch.Tensor]:
        padded = torch.cat([ids, ids.new_zeros(size - len(ids))])
        mask = (torch.arange(size) < len(ids)).long()
        return {"input_ids": padded, "attention_mask": mask, "labels": labels if family == "bert" else labels[:size]}

    alone = [default_data_collator([sample(ids, len(ids))]) for ids in (short, long)]
    together = [default_data_collator([sample(short, 12), sample(long, 12)])]
    targets = find_targets(model)
    one, other = (calibrate(model, targets, b, ["input_norm"], 2)["input_norm"] for b in (alone, together))
    for name, norm in one.items():
        torch.testing.assert_close(other[name], norm, rtol=1e-4, atol=1e-5)


def test_a_part_that_no_sample_reaches_has_norms_of_one_and_that_is_said(caplog):
    model = sixteen_experts()
    data = [{"input_ids": torch.tensor([[3, 4, 5]])}]
    norms = calibrate(model, find_targets(model), data, ["input_norm"], 1)["input_norm"]
    norm = norms["model.layers.0.mlp.experts.down_proj"]
    unreached = int((norm == 1).all(dim=-1).sum())
    assert 10 <= unreached < 16  # Three tokens go to six experts at most.
    message = (
        f"reaches {unreached} of the 16 parts of 'model.layers.0.mlp.experts.down_proj'; their weights count alike"
    )
    assert message in caplog.text


def test_a_weight_may_stand_on_the_left():
    """As in Mamba, which multiplies a layer's weight by hand."""

    class Left(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3, bias=False)

        def forward(self, x, labels=None):
            out = (self.layer.weight @ x.transpose(1, 2)).transpose(1, 2)
            return {"loss": (out - 1).square().flatten(1).mean(1).mean(), "out": out}

    torch.manual_seed(0)
    left = Left().double()
    right = nn.Linear(5, 3, bias=False).double()
    right.weight = left.layer.weight
    x = torch.randn(6, 4, 5).double()
    data = [{"x": x[:4]}, {"x": x[4:]}]
    found = calibrate(left, find_targets(left), data, ["input_norm", "squared_gradient"], 6)
    name = "layer.weight"
    torch.testing.assert_close(found["input_norm"][name], x.flatten(0, 1).norm(dim=0)[None].float())
    squares = torch.zeros(3, 5)
    for sample in x:
        (gradient,) = torch.autograd.grad((right(sample) - 1).square().mean(), right.weight)
        squares += gradient.square().float() / 6
    torch.testing.assert_close(found["squared_gradient"][name], squares)


def test_the_labels_of_a_model_under_peft_are_shifted_too():
    peft = pytest.importorskip("peft")
    plain = build("llama")
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    sample = default_data_collator(samples_of(plain))
    assert torch.equal(label_counts(model, sample), label_counts(plain, sample))


def test_labels_in_lists_are_cut_with_their_samples():
    """As those of detection."""

    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, labels):
            assert len(labels) == len(x)
            seen.append(len(x))
            return {"loss": (self.layer(x) - torch.stack([label["box"] for label in labels])).square().sum()}

    seen: list[int] = []
    model = Detector()
    data = [{"x": torch.randn(4, 4), "labels": [{"box": torch.randn(4)} for _ in range(4)]}]
    calibrate(model, find_targets(model), data, ["gradient"], 3)
    assert seen == [3]
