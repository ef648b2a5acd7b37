"""Squared gradients of single samples: what a batch gives is what autograd gives of each sample alone."""

import logging

import pytest
import torch
from torch import nn
from transformers import default_data_collator

from hf_prune.calibration.statistics import calibrate
from hf_prune.weights.targets import find_targets
from tests.calibration.test_statistics import (
    SAMPLES,
    alone,
    assert_close,
    double,
    loader,
    samples_of,
    singles,
    squares_and_gradient,
)
from tests.tiny import FAMILIES, build


@pytest.mark.parametrize("size", [1, 4, 7])
@pytest.mark.parametrize("family", FAMILIES)
def test_squared_gradients_are_those_of_single_samples(family, size, caplog):
    model = double(family)
    samples = samples_of(model)
    found = alone(model, samples)
    expected = {n: sum(g[n].square() for _, g in found) / SAMPLES for n in find_targets(model)}
    with caplog.at_level(logging.INFO):
        statistics = calibrate(model, find_targets(model), loader(samples, size), ["squared_gradient"], SAMPLES)
    assert_close(statistics["squared_gradient"], expected)
    # Only experts, which see positions of several samples at once, cannot do it in batches.
    assert ("in passes of their own" in caplog.text) == (family == "mixtral" and size > 1)


def test_a_sample_without_labels_has_no_gradient():
    model = build("gpt_neo", torch.float64)
    samples = samples_of(model)
    samples[2]["labels"][:] = -100
    found = alone(model, samples)
    expected = {n: sum(g[n].square() for _, g in found[:2] + found[3:]) / SAMPLES for n in find_targets(model)}
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


class Weighted(nn.Module):
    """A loss with weights for classes, and with a head that has learned nothing yet: all losses are alike."""

    def __init__(self, head):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        with torch.no_grad():
            self.b.weight.mul_(head)
            self.b.bias.mul_(head)

    def forward(self, x, labels):
        weight = torch.tensor([1.0, 1.0, 20.0], dtype=x.dtype)
        return {"loss": nn.functional.cross_entropy(self.b(self.a(x).tanh()), labels, weight=weight)}


@pytest.mark.parametrize("head", [1, 1e-3])
def test_squared_gradients_with_weights_for_classes_are_those_of_single_samples(head):
    """The two samples on which batches are tried are of classes of equal weight."""
    torch.manual_seed(0)
    model = Weighted(head).double()
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    batches = [{"x": torch.randn(8, 6).double(), "labels": each} for each in (labels % 2, labels)]
    targets = find_targets(model, ["a", "b"])
    expected = squares_and_gradient(model, [sample for data in batches for sample in singles(data)], targets)
    assert_close(calibrate(model, targets, batches, ["squared_gradient"], 16)["squared_gradient"], expected)
