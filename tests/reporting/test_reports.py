import json

import pytest
import torch
from torch import nn

from hf_prune.config import PruningConfig
from hf_prune.reporting.reports import ModuleSparsity, SparsityReport, sparsity_report
from hf_prune.weights.masks import MaskSet


class Net(nn.Module):
    """Two targets, of which one is initialised with zeros, an embedding, a norm and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 4)
        self.up = nn.Linear(4, 8)
        self.down = nn.Linear(8, 4)
        self.norm = nn.LayerNorm(4)
        self.classifier = nn.Linear(4, 3)
        nn.init.zeros_(self.down.weight)
        self.embed.weight.data[0] = 0.0


def count(model, names=None):
    """Zeros and weights, one by one."""
    values = [v for n, p in model.named_parameters() if names is None or n in names for v in p.flatten().tolist()]
    return sum(v == 0 for v in values), len(values)


def masked(net):
    mask = torch.ones(8, 4, dtype=torch.bool)
    mask[2, 1] = mask[7, 3] = mask[0, 0] = False
    masks = MaskSet({"up.weight": mask, "down.weight": torch.rand(4, 8) < 0.75})
    masks.apply_(net)
    return masks


# SparsityReport


def test_a_report_is_what_counting_gives():
    net = Net()
    net.up.weight.data[2, 1] = -0.0
    net.up.weight.data[3] = 0.0
    report = sparsity_report(net)
    assert report.modules == (
        ModuleSparsity("up", (8, 4), 5, 32, None),
        ModuleSparsity("down", (4, 8), 32, 32, None),
    )
    assert [module.sparsity for module in report.modules] == [5 / 32, 1.0]
    assert (report.zeros, report.total) == count(net, ["up.weight", "down.weight"]) == (37, 64)
    assert report.sparsity == 37 / 64
    assert (report.model_zeros, report.model_total) == count(net)
    assert report.model_sparsity == report.model_zeros / report.model_total
    assert report.model_zeros == 37 + 4 + 4  # A row of the embedding, the bias of the norm.
    assert report.masked is None


def test_zeros_beyond_the_masks_are_told_apart():
    net = Net()
    masks = masked(net)
    report = sparsity_report(net, masks=masks)
    assert [(m.name, m.masked) for m in report.modules] == [("up", 3), ("down", masks.masked - 3)]
    assert report.masked == masks.masked < report.zeros == 3 + 32
    beyond = 35 - masks.masked
    assert str(report).endswith(f"\n{beyond} of the zeros are not pruned: they were zero before.")


def test_a_mask_that_is_not_held_shows_too():
    """The report counts zeros in the weights; it does not take the mask's word for them."""
    net = Net()
    masks = MaskSet({"up.weight": torch.zeros(8, 4, dtype=torch.bool)})
    report = sparsity_report(net, masks=masks)
    assert (report.masked, report.zeros, report.total) == (32, 0, 32)


def test_the_config_says_which_weights_are_targets():
    net = Net()
    report = sparsity_report(net, PruningConfig(sparsity=0.5, target_modules=["up", "classifier"]))
    assert [module.name for module in report.modules] == ["up", "classifier"]
    report = sparsity_report(net, PruningConfig(sparsity=0.5, exclude_modules=["up"]))
    assert [module.name for module in report.modules] == ["down"]
    with pytest.raises(ValueError, match="target_modules='nothing' matches no prunable module"):
        sparsity_report(net, PruningConfig(sparsity=0.5, target_modules="nothing"))


def test_a_tied_parameter_is_counted_once():
    net = Net()
    net.up_again = nn.Linear(4, 8, bias=False)
    net.up_again.weight = net.up.weight
    assert sparsity_report(net).model_total == sparsity_report(Net()).model_total


def test_a_report_does_not_touch_the_model():
    net = Net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    masks = masked(Net())
    sparsity_report(net, masks=masks)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_report_prints_as_a_table():
    net = nn.Sequential(nn.Linear(100, 300), nn.Conv2d(2, 4, 3))
    net[0].weight.data[:150] = 0.0
    assert str(sparsity_report(net)) == "\n".join(
        [
            "module               shape   zeros  sparsity",
            "--------------------------------------------",
            "0                300 x 100  15,000    0.5000",
            "1            4 x 2 x 3 x 3       0    0.0000",
            "--------------------------------------------",
            "targets             30,072  15,000    0.4988",
            "whole model         30,376  15,000    0.4938",
        ]
    )


def test_a_table_says_nothing_of_zeros_beyond_the_masks_if_there_are_none():
    net = nn.Sequential(nn.Linear(4, 4))
    masks = MaskSet({"0.weight": torch.tensor([[True, False, True, True]] * 4)})
    masks.apply_(net)
    assert "not pruned" not in str(sparsity_report(net, masks=masks))


def test_a_report_is_json():
    net = Net()
    report = sparsity_report(net, masks=masked(net))
    values = report.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert values["modules"][0] == {
        "name": "up",
        "shape": [8, 4],
        "zeros": 3,
        "total": 32,
        "masked": 3,
        "sparsity": 3 / 32,
    }
    keys = ("sparsity", "zeros", "masked", "total", "model_sparsity", "model_zeros", "model_total")
    assert {key: value for key, value in values.items() if key not in ("modules", "structures", "remaining")} == {
        k: getattr(report, k) for k in keys
    }
    assert json.loads(json.dumps(sparsity_report(net).to_dict()))["masked"] is None


def test_a_report_on_no_weights_prints():
    report = sparsity_report(Net(), masks=MaskSet())
    assert (report.zeros, report.total, report.masked, report.sparsity) == (0, 0, 0, 0.0)
    assert "targets" in str(report)
    assert SparsityReport((ModuleSparsity("empty", (0, 3), 0, 0),), 0, 0).to_dict()["model_sparsity"] == 0.0


def test_masks_that_are_not_applied_are_said():
    model = nn.Sequential(nn.Linear(4, 4))
    report = sparsity_report(model, masks={"0.weight": torch.zeros(4, 4, dtype=torch.bool)})
    assert "At least 16 masked weights are not zero. Set them to zero with MaskSet.apply_." in str(report)
