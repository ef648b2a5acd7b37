"""Passes that stop early and blocks that are not computed again show what whole passes show."""

from collections import Counter

import pytest
import torch
from torch import nn

from hf_prune.calibration import eager_experts
from hf_prune.products import ProductWatch
from hf_prune.stages import Stages
from hf_prune.targets import find_targets
from tests.tiny import FAMILIES, batch, build, twin


def batches_of(model: nn.Module, batches: int = 3, size: int = 4) -> list[dict[str, torch.Tensor]]:
    """Whole batches of samples."""
    samples = batch(model, batches * size)
    parts = [samples[i : i + size] for i in range(0, len(samples), size)]
    return [{name: torch.stack([s[name] for s in part]) for name in part[0]} for part in parts]


def inputs_of(model, names, batches):
    """What the first of the names is multiplied with, by whole passes."""
    seen = []
    watch = ProductWatch(find_targets(model), lambda p: seen.append(p) if p.target.name == names[0] else None)
    with torch.no_grad(), eager_experts(model), watch:
        for values in batches:
            model(**values, use_cache=False) if hasattr(model.config, "use_cache") else model(**values)
    return [(product.part, product.inputs(1)) for product in seen]


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_show_the_inputs_that_changed_layers_give(family):
    model = build(family).eval()
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    whole, targets, batches = twin(model), find_targets(model), batches_of(model)
    whole_targets = find_targets(whole)
    seen_names = []
    with eager_experts(model), Stages(model, targets, batches) as stages:
        for stage in stages.order:
            shown = []
            stages.show(stage, lambda product, shown=shown: shown.append((product.part, product.inputs(1))))
            for name in stage.names:
                expected = inputs_of(whole, (name,), batches)
                assert [part for part, _ in shown] == [part for part, _ in expected]
                assert all(torch.equal(a, b) for (_, a), (_, b) in zip(shown, expected, strict=True))
                with torch.no_grad():
                    for each in (targets[name], whole_targets[name]):
                        each.weight.mul_(0.5)
            stages.finish(stage)
            seen_names += stage.names
    assert sorted(seen_names) == sorted(targets)
    assert stages.unused == []
    after, expected = model(**batches[0]), whole(**batches[0])
    assert torch.equal(after.logits, expected.logits)


def test_queries_keys_and_values_are_one_stage():
    model = build("llama").eval()
    with Stages(model, find_targets(model), batches_of(model)) as stages:
        ends = [[name.split(".")[-2] for name in stage.names] for stage in stages.order]
    assert ends == 2 * [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_finished_blocks_are_not_computed_again():
    model = build("llama").eval()
    model.config.use_cache = False
    calls = Counter()
    for i, layer in enumerate(model.model.layers):
        layer.mlp.down_proj.register_forward_hook(lambda *_, i=i: calls.update([i]))
    batches = batches_of(model)
    with Stages(model, find_targets(model), batches) as stages:
        for stage in stages.order:
            stages.show(stage, lambda product: None)
            stages.finish(stage)
        before = dict(calls)
        stages.show(stages.order[-1], lambda product: None)
        assert calls[0] == before[0]
        assert [block in stages._given for block in model.model.layers] == [True, False]
    # Once to see the order; the first block once for its own last stage and once for what it gives.
    assert before == {0: 1 + len(batches), 1: 1}
    model(**batches[0])
    assert calls[0] == before[0] + 1


def test_what_only_finished_blocks_read_takes_no_memory():
    config = build("llama").config
    config.num_hidden_layers = 4
    torch.manual_seed(0)
    model = type(build("llama"))(config).eval()
    model.config.use_cache = False
    kept = []
    with Stages(model, find_targets(model), batches_of(model)) as stages:
        for stage in stages.order:
            stages.show(stage, lambda product: None)
            stages.finish(stage)
            kept.append([bool(t.untyped_storage().nbytes() > 4) for outputs in stages._given.values()
                         for t in outputs.values()])  # fmt: skip
    assert kept[-1] == [False] * 6 + [True] * 3


class Skips(nn.Module):
    """Blocks of which the first is read again at the end, and whose outputs are changed in place."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(4))
        self.last = nn.Linear(4, 4)

    def forward(self, x):
        first = None
        for block in self.blocks:
            x = block(x)
            first = x.clone() if first is None else first
            x += 1
            x = x[:, :4]
        return self.last(x + first)


def test_outputs_that_are_changed_in_place_or_read_elsewhere_are_safe():
    torch.manual_seed(0)
    model = Skips().eval()
    whole = twin(model)
    targets, batches = find_targets(model), [{"x": torch.randn(3, 4)} for _ in range(2)]
    with Stages(model, targets, batches) as stages:
        assert [stage.names for stage in stages.order] == [(name,) for name in targets]
        for stage in stages.order:
            for _ in range(2):  # A second look sees what the first has seen.
                shown = []
                stages.show(stage, lambda product, shown=shown: shown.append(product.inputs(1)))
                expected = []
                names = find_targets(whole)
                watch = ProductWatch(names, lambda p: expected.append(p) if p.target.name == stage.names[0] else None)  # noqa: B023
                with torch.no_grad(), watch:
                    for values in batches:
                        whole(**values)
                assert all(torch.equal(a, b.inputs(1)) for a, b in zip(shown, expected, strict=True))
            stages.finish(stage)


def test_forwards_are_put_back_also_after_an_error():
    model = build("llama").eval()
    model.config.use_cache = False
    replaced = model.model.layers[0].forward
    model.model.layers[0].forward = lambda *args, **kwargs: replaced(*args, **kwargs)  # as hooks of accelerate do
    mine = model.model.layers[0].forward

    def run() -> None:
        with Stages(model, find_targets(model), batches_of(model)) as stages:
            for stage in stages.order[:-1]:
                stages.finish(stage)
            assert model.model.layers[0].forward is not mine
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        run()
    assert model.model.layers[0].forward is mine
    assert "forward" not in vars(model.model.layers[1])


def test_a_weight_that_is_used_twice_is_a_stage_of_its_own():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.b(self.a(self.a(x))) + self.a(x)

    model = Twice().eval()
    with Stages(model, find_targets(model), [{"x": torch.randn(2, 4)}]) as stages:
        assert [(stage.names, stage.uses) for stage in stages.order] == [(("a.weight",), 3), (("b.weight",), 1)]
        seen = []
        stages.show(stages.order[0], seen.append)
    assert len(seen) == 3
