"""SparseGPT against optimal brain surgeon by brute force, least squares, and the errors of other criteria."""

import dataclasses
import re

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import default_data_collator

from hf_prune import PruningConfig, prune
from hf_prune.calibration.statistics import calibrate
from hf_prune.granularities import Pattern
from hf_prune.reconstruction.sparsegpt import BLOCKSIZE, DAMPING, Quota, reconstruct_
from hf_prune.weights.masks import MaskSet, masked_in
from hf_prune.weights.targets import find_targets
from tests.tiny import batch, build, sixteen_experts


class Layer(nn.Module):
    """One layer, on inputs that go together."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def linear(inputs: int = 12, outputs: int = 7, dtype: torch.dtype = torch.float64) -> Layer:
    torch.manual_seed(0)
    return Layer(nn.Linear(inputs, outputs)).to(dtype)


def correlated(samples: int, inputs: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    torch.manual_seed(1)
    mix = torch.randn(inputs, inputs, dtype=dtype) + 2 * torch.rand(inputs, 1, dtype=dtype)
    return torch.randn(samples, inputs, dtype=dtype) @ mix


def sparsegpt(model: nn.Module, x: torch.Tensor, quota: Quota, masks: MaskSet | None = None) -> MaskSet:
    targets = find_targets(model)
    data = [{"x": part} for part in x.split(5)]
    return reconstruct_(model, targets, masks or MaskSet(), dict.fromkeys(targets, quota), data, len(x))


def brute_force(weight, x, drop, m=None, n=None, damping=DAMPING[0], kept=None):
    """Column by column, with the inverse of the Hessian of the columns that are left computed anew each time."""
    weight, columns = weight.clone(), weight.shape[1]
    hessian = x.T @ x
    hessian += damping * hessian.diagonal()[hessian.diagonal() > 0].mean() * torch.eye(columns, dtype=x.dtype)
    mask = torch.ones_like(weight, dtype=torch.bool)
    for i in range(columns):
        inverse = torch.linalg.inv(hessian[i:, i:])
        if (m is None and i == 0) or (m is not None and i % m == 0):
            group = range(i, columns if m is None else i + m)
            scores = torch.stack([weight[:, j] ** 2 / torch.linalg.inv(hessian[j:, j:])[0, 0] for j in group], 1)
            scores = scores * (x.square().sum(0) > 0)[group]
            if kept is not None:
                scores = scores.where(kept[:, group], -1.0)
            if m is None:
                lowest = scores.flatten().argsort(stable=True)[:drop]
                mask.view(-1)[lowest] = False
            else:
                mask[:, group] = torch.ones_like(scores, dtype=torch.bool).scatter(
                    1, scores.argsort(dim=1, stable=True)[:, : m - n], False
                )
        error = weight[:, i] * ~mask[:, i] / inverse[0, 0]
        weight[:, i:] -= error[:, None] * inverse[0]
    return weight * mask, mask


@pytest.mark.parametrize("drop", [0, 1, 30, 42, 84])
def test_it_is_optimal_brain_surgeon_column_by_column(drop):
    model, x = linear(), correlated(40, 12)
    expected, mask = brute_force(model.layer.weight.detach(), x, drop)
    masks = sparsegpt(model, x, drop)
    assert torch.equal(masks["layer.weight"], mask)
    torch.testing.assert_close(model.layer.weight.detach(), expected, rtol=1e-8, atol=1e-10)
    assert int((model.layer.weight == 0).sum()) == drop


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2), (3, 6)])
def test_patterns_are_chosen_by_the_weights_as_they_have_become(n, m):
    model, x = linear(), correlated(40, 12)
    expected, mask = brute_force(model.layer.weight.detach(), x, 0, m, n)
    masks = sparsegpt(model, x, Pattern(n, m))
    assert torch.equal(masks["layer.weight"], mask)
    torch.testing.assert_close(model.layer.weight.detach(), expected, rtol=1e-8, atol=1e-10)


def test_what_is_pruned_stays_pruned_and_counts():
    model, x = linear(), correlated(40, 12)
    first = sparsegpt(model, x, 30)
    before = model.layer.weight.detach().clone()
    expected, mask = brute_force(before, x, 50, kept=first["layer.weight"])
    second = sparsegpt(model, x, 50, masks=first)
    assert not (second["layer.weight"] & ~first["layer.weight"]).any()
    assert torch.equal(second["layer.weight"], mask)
    torch.testing.assert_close(model.layer.weight.detach(), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("inputs", [BLOCKSIZE - 1, 2 * BLOCKSIZE, 2 * BLOCKSIZE + 40])
@pytest.mark.parametrize("drop", [0.1, 0.5, 0.9])
def test_blocks_of_columns_are_exact_together_and_better_than_other_criteria(inputs, drop):
    """On the inputs of the layer; and not better than least squares, which nothing can be."""
    x = correlated(3 * inputs, inputs)
    model = linear(inputs)
    dense, k = model.layer.weight.detach().clone(), round(drop * 7 * inputs)
    mask = sparsegpt(model, x, k)["layer.weight"]
    assert masked_in(mask) == k
    pruned = model.layer.weight.detach()
    assert torch.equal(pruned == 0, ~mask)

    def error(weight):
        return float(((weight - dense) @ x.T).square().sum())

    best = torch.zeros_like(dense)
    for row in range(len(dense)):
        kept = mask[row]
        best[row, kept] = torch.linalg.lstsq(x[:, kept], x @ dense[row, :, None]).solution[:, 0]
    assert error(best) <= error(pruned) < error(dense * mask)
    others = []
    for name in ("magnitude", "wanda"):
        other = linear(inputs)
        prune(other, PruningConfig(sparsity=drop, criterion=name, calibration_samples=len(x)), [{"x": x}])
        others.append(error(other.layer.weight.detach()))
    assert error(pruned) < min(others)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("quota", [40, Pattern(2, 4)])
def test_a_convolution_is_a_linear_layer_on_patches(groups, quota):
    torch.manual_seed(0)
    options = {"padding": 1, "stride": 2, "groups": groups}
    model = Layer(nn.Conv2d(8, 6, (3, 2), **options)).double()
    x = torch.randn(10, 8, 5, 6).double()
    weight = model.layer.weight.detach().clone()
    masks = sparsegpt(model, x, quota)
    if isinstance(quota, Pattern):
        assert (masks["layer.weight"].unflatten(1, (-1, 4)).sum(2) == 2).all()
    else:
        assert masks["layer.weight"].numel() - masks["layer.weight"].sum() == quota
    patches = torch.nn.functional.unfold(x, (3, 2), padding=1, stride=2)  # [samples, channels · kernel, positions]
    patches = patches.unflatten(1, (groups, -1))
    for group in range(groups):
        rows = slice(group * 6 // groups, (group + 1) * 6 // groups)
        inputs = patches[:, group].transpose(1, 2).flatten(0, 1)
        # Channels of one position of the kernel side by side, as in a pattern.
        order = torch.arange(inputs.shape[1]).view(-1, 6).t().flatten()
        matrix = weight[rows].flatten(1)[:, order]
        expected, _ = brute_force(
            matrix, inputs[:, order], *((0, 4, 2) if isinstance(quota, Pattern) else (quota // groups,))
        )
        found = model.layer.weight.detach()[rows].flatten(1)[:, order]
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_weights_of_an_input_that_is_always_zero_are_pruned_first():
    model, x = linear(), correlated(40, 12)
    x[:, 3] = 0
    mask = sparsegpt(model, x, 20)["layer.weight"]
    assert model.layer.weight.isfinite().all()
    assert masked_in(mask) == 20
    assert not mask[:, 3].any()
    expected, brute = brute_force(linear().layer.weight.detach(), x, 20)
    assert torch.equal(mask, brute)
    torch.testing.assert_close(model.layer.weight.detach(), expected, rtol=1e-8, atol=1e-10)


def test_damping_rises_until_the_hessian_can_be_factorized(monkeypatch):
    cholesky, traces = torch.linalg.cholesky_ex, []

    def fails_once(matrix, **options):
        traces.append(float(matrix.diagonal().sum()))
        factor, failed = cholesky(matrix, **options)
        return factor, failed + (len(traces) == 1)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", fails_once)
    model, x = linear(), correlated(40, 12)
    expected, mask = brute_force(model.layer.weight.detach(), x, 42, damping=DAMPING[1])
    assert torch.equal(sparsegpt(model, x, 42)["layer.weight"], mask)
    torch.testing.assert_close(model.layer.weight.detach(), expected, rtol=1e-8, atol=1e-10)
    total = float(x.square().sum())
    assert traces[:2] == pytest.approx([total * (1 + damping) for damping in DAMPING[:2]])


def test_a_layer_that_cannot_be_solved_is_pruned_by_magnitude_and_that_is_said(monkeypatch, caplog):
    attempts = []

    def fails(hessian, **options):
        attempts.append(float(hessian.diagonal().sum()))
        return hessian, torch.tensor(1)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", fails)
    model, x = linear(2 * BLOCKSIZE), correlated(40, 2 * BLOCKSIZE)
    expected = linear(2 * BLOCKSIZE)
    with torch.no_grad():  # Among all of its columns, and not among those of a block.
        for each in (model, expected):
            each.layer.weight[:, :BLOCKSIZE] /= 100
    prune(expected, PruningConfig(sparsity=0.5))
    sparsegpt(model, x, 7 * BLOCKSIZE)
    assert torch.equal(model.layer.weight, expected.layer.weight)
    assert (
        "1 of the 1 Hessians of 'layer' cannot be factorized, even with 1 times the mean diagonal added" in caplog.text
    )
    total = float(x.square().sum())
    assert attempts == pytest.approx([total * (1 + damping) for damping in DAMPING])


def test_experts_that_no_sample_reaches_are_pruned_by_magnitude_and_that_is_said(caplog):
    model = sixteen_experts()
    experts = model.model.layers[0].mlp.experts.down_proj
    before = experts.detach().clone()
    data = [{"input_ids": torch.tensor([[3, 4, 5]])}]
    prune(model, PruningConfig(sparsity=0.5, criterion="sparsegpt", scope="layer", calibration_samples=1), data)
    found = re.search(
        r"was seen to reach (\d+) of the 16 parts of 'model\.layers\.0\.mlp\.experts\.down_proj'", caplog.text
    )
    by_magnitude = 0
    for expert, dense in zip(experts.detach(), before, strict=True):
        lowest = dense.abs().flatten().argsort(stable=True)[: dense.numel() // 2]
        by_magnitude += torch.equal(expert.flatten(), dense.flatten().scatter(0, lowest, 0.0))
    assert by_magnitude == int(found[1]) >= 10  # Three tokens go to six experts at most.


def test_weights_that_take_no_part_are_pruned_by_magnitude_and_that_is_said(caplog):
    class Idle(Layer):
        def __init__(self):
            super().__init__(nn.Linear(12, 7))
            self.idle = nn.Linear(12, 7)

    torch.manual_seed(0)
    model = Idle().double()
    before = model.idle.weight.detach().clone()
    sparsegpt(model, correlated(40, 12), 42)
    assert "No product of 'idle.weight' was seen in the forward passes; it is pruned by magnitude" in caplog.text
    kept = before.abs() > before.abs().flatten().sort().values[41]
    assert torch.equal(model.idle.weight.detach(), before * kept)


def test_activations_that_are_not_finite_name_the_module_and_change_nothing():
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.b(self.a(x) / 0)

    model = Chain()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=r"what 'b' is multiplied with is NaN or infinite over the calibration"):
        prune(
            model,
            PruningConfig(sparsity=0.5, criterion="sparsegpt", scope="layer", calibration_samples=8),
            [{"x": torch.randn(8, 4)}],
        )
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_no_sample_is_an_error():
    with pytest.raises(ValueError, match="there are no calibration samples"):
        reconstruct_(linear(), find_targets(linear()), MaskSet(), {"layer.weight": 3}, [], 8)


@pytest.mark.parametrize("family", ["llama", "t5", "vit", "mixtral", "resnet"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_loses_less_than_by_magnitude(family, dtype):
    """Of its outputs on the calibration samples, layers one after the other."""
    losses = {}
    for name in ("magnitude", "sparsegpt"):
        model = build(family, dtype).eval()
        data = DataLoader(batch(model, 64), batch_size=16, collate_fn=default_data_collator)
        values = [{k: v.to(dtype) if v.is_floating_point() else v for k, v in each.items()} for each in data]
        with torch.no_grad():
            dense = [model(**each).logits.float() for each in values]
            prune(model, PruningConfig(sparsity=0.6, criterion=name, scope="layer", calibration_samples=64), values)
            losses[name] = sum(
                float((model(**each).logits.float() - y).square().sum()) for each, y in zip(values, dense, strict=True)
            )
        assert all(parameter.dtype == dtype for parameter in model.parameters())
    assert losses["sparsegpt"] < losses["magnitude"]


def test_the_hessian_of_wanda_is_its_diagonal():
    """Where inputs do not go together, what is chosen is what Wanda would choose among all weights of a layer."""
    model = linear()
    x = torch.cat([torch.diag(torch.rand(12).double() + 0.5)] * 3)
    norms = calibrate(model, find_targets(model), [{"x": x}], ["input_norm"], len(x))["input_norm"]["layer.weight"]
    wanda = (model.layer.weight.detach().abs() * norms).flatten()
    before = model.layer.weight.detach().clone()
    mask = sparsegpt(model, x, 30)["layer.weight"].flatten()
    assert wanda[~mask].max() < wanda[mask].min() * 1.05  # Damping adds the same to all inputs.
    torch.testing.assert_close(model.layer.weight.detach().flatten()[mask], before.flatten()[mask])


def test_layers_are_as_sparse_as_by_fisher_unless_another_scope_is_asked_for():
    counts = []
    for name in ("fisher", "sparsegpt"):
        model = build("llama")
        data = DataLoader(batch(model, 8), batch_size=4, collate_fn=default_data_collator)
        config = PruningConfig(sparsity=0.7, criterion=name, calibration_samples=8)
        counts.append([module.zeros for module in prune(model, config, data).modules])
    assert counts[0] == counts[1]
    assert len(set(counts[0])) > 2


def test_without_labels_layers_can_be_equally_sparse():
    model = build("llama")
    data = [{"input_ids": torch.randint(model.config.vocab_size, (8, 6))}]
    config = PruningConfig(sparsity=0.7, criterion="sparsegpt", calibration_samples=8)
    with pytest.raises(ValueError, match=r"They need 'labels' \(for sparsegpt only with scope='global'\)\.$"):
        prune(model, config, data)
    report = prune(model, dataclasses.replace(config, scope="layer"), data)
    assert all(module.zeros == round(0.7 * module.total) for module in report.modules)
    prune(build("llama"), PruningConfig(granularity="2:4", criterion="sparsegpt", calibration_samples=8), data)


def test_inside_autocast_layers_see_what_pruned_ones_give():
    left = build("llama")
    right = build("llama")
    data = DataLoader(batch(left, 8), batch_size=4, collate_fn=default_data_collator)
    config = PruningConfig(sparsity=0.7, criterion="sparsegpt", calibration_samples=8)
    prune(left, config, data)
    with torch.autocast("cpu", torch.bfloat16):
        prune(right, config, data)
    for (name, a), (_, b) in zip(left.named_parameters(), right.named_parameters(), strict=True):
        if "down_proj" in name:
            assert (a - b).norm() < 0.3 * a.norm()


def test_zeros_that_leave_a_pattern_no_room_are_an_error():
    model = build("llama")
    prune(model, PruningConfig(granularity="1:4"))
    data = DataLoader(batch(model, 8), batch_size=4, collate_fn=default_data_collator)
    config = PruningConfig(granularity="2:4", criterion="sparsegpt", hold_zeros=True, calibration_samples=8)
    with pytest.raises(ValueError, match=r"they cannot become 2:4\. Start without hold_zeros\.$"):
        prune(model, config, data)
