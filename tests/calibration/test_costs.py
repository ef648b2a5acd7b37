import copy

import pytest
import torch
from torch import nn

from hf_prune.calibration.costs import Cost, measure_cost_or_parameters, measure_costs
from tests.tiny import build


class Slow(nn.Module):
    """Counts how often it is called, and in which order."""

    def __init__(self, name, calls):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.dropout = nn.Dropout(0.5)
        self.name, self.calls = name, calls

    def forward(self, values):
        self.calls.append((self.name, self.training, torch.is_grad_enabled()))
        return self.dropout(self.linear(values))


def test_the_models_take_turns_in_evaluation_mode():
    calls = []
    models = {name: Slow(name, calls) for name in ("a", "b")}
    state = torch.get_rng_state()
    costs = measure_costs(models, {"values": torch.ones(2, 4)}, turns=3)
    assert calls == [("a", False, False), ("b", False, False)] * 4
    assert all(model.training for model in models.values())
    assert torch.equal(torch.get_rng_state(), state)
    for cost in costs.values():
        assert (cost.parameters, cost.flops) == (15, 2 * 2 * 4 * 3)
        assert cost.seconds > 0


def test_convolutions_and_attention_are_counted():
    conv = nn.Conv2d(3, 5, 3, bias=False)
    cost = measure_costs({"conv": conv}, {"input": torch.ones(2, 3, 8, 8)})["conv"]
    assert cost.flops == 2 * 2 * 5 * 6 * 6 * 3 * 9
    llama = measure_costs({"llama": build("llama")}, {"input_ids": torch.ones(1, 8, dtype=torch.long)})["llama"]
    # Queries and output, keys and values, the three matrices of the feed-forward network; and the head.
    attention = 2 * 2 * 2 * 2 * 8 * 8 * 8  # scores and sums of values, in two layers of two heads of width 8
    products = 2 * 8 * (2 * (16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 32) + 16 * 60)
    rotations = 2 * 4 * 8  # Angles of rotary embeddings, of which older versions of Transformers make a product.
    assert llama.flops - products - attention in (0, rotations)


def test_without_a_batch_only_parameters_are_counted():
    cost = measure_costs({"model": nn.Linear(4, 3)}, None)["model"]
    assert (cost.parameters, cost.flops, cost.seconds) == (15, None, None)


def test_models_are_left_as_they_were():
    model = build("resnet").train()
    before = copy.deepcopy(model.state_dict())
    measure_costs({"resnet": model}, {"pixel_values": torch.randn(2, 1, 16, 16)})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="takes pixel_values, and the batch holds nothing"):
        measure_costs({"resnet": model.resnet.embedder}, {"nothing": torch.ones(1)})
    assert model.training


def test_the_first_batch_is_measured():
    cost = measure_cost_or_parameters(nn.Linear(4, 3), lambda: iter([{"input": torch.ones(2, 4)}, {}]))
    assert (cost.parameters, cost.flops) == (15, 2 * 2 * 4 * 3)


def test_where_there_is_no_batch_parameters_are_counted(caplog):
    assert measure_cost_or_parameters(nn.Linear(4, 3), None) == Cost(15)
    assert measure_cost_or_parameters(nn.Linear(4, 3), lambda: []) == Cost(15)
    assert not caplog.records


def fail():
    raise ValueError("the file is gone")


@pytest.mark.parametrize(
    ("batches", "why"),
    [(lambda: [{"input": torch.ones(2, 5)}], "shapes cannot be multiplied"), (fail, "the file is gone")],
)
def test_what_cannot_be_measured_is_said(caplog, batches, why):
    assert measure_cost_or_parameters(nn.Linear(4, 3), batches) == Cost(15)
    assert "Only parameters are counted, since no forward pass could be measured" in caplog.text
    assert why in caplog.text
