"""Passes that stop early and blocks that are not computed again show what whole passes show."""

import contextlib
import dataclasses
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from hf_prune.calibration.activations import ProductWatch
from hf_prune.calibration.contexts import configured, eager_experts
from hf_prune.reconstruction.stages import Stages
from hf_prune.weights.targets import find_targets
from tests.structures.models import build as build_of_structures
from tests.tiny import FAMILIES, batch, build, twin


def batches_of(model: nn.Module, batches: int = 3, size: int = 4) -> list[dict[str, torch.Tensor]]:
    """Whole batches of samples."""
    samples = batch(model, batches * size)
    parts = [samples[i : i + size] for i in range(0, len(samples), size)]
    return [{name: torch.stack([s[name] for s in part]) for name in part[0]} for part in parts]


def products(model, name, batches):
    """What a target is multiplied with, by whole passes."""
    seen = []
    watch = ProductWatch(find_targets(model), lambda p: seen.append(copied(p)) if p.target.name == name else None)
    for values in batches:
        torch.clear_autocast_cache()
        with torch.no_grad(), watch:
            model(**values)
    return seen


def copied(product):
    """The part and its inputs, as they are now."""
    return product.part, product.inputs(1).clone()


def compare(model, batches, whole=None, looks=1, step=1):
    """Goes through all stages, changes each, and compares what is shown with whole passes of a twin.

    Only each `step`th weight is a target.
    """
    whole = whole or twin(model)
    targets, whole_targets = (dict([*find_targets(each).items()][step - 1 :: step]) for each in (model, whole))
    shown_names = []
    with Stages(model, targets, batches) as stages:
        for stage in stages.order:
            for _ in range(looks):
                shown = []
                stages.run(stage, lambda product, _, shown=shown: shown.append(copied(product)))
                for name in stage.names:
                    expected = products(whole, name, batches)
                    assert [part for part, _ in shown] == [part for part, _ in expected]
                    assert len(shown) > 0
                    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(shown, expected, strict=True))
            with torch.no_grad():
                for name in stage.names:
                    for each in (targets[name], whole_targets[name]):
                        each.weight.mul_(0.5)
            stages.finish(stage)
            shown_names += stage.names
    assert sorted(shown_names) == sorted(targets)
    assert stages.unused == []


@pytest.mark.parametrize("step", [1, pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FAMILIES)
def test_stages_show_the_inputs_that_changed_layers_give(family, step):
    model = build(family).eval()
    whole, batches = twin(model), batches_of(model)
    with contextlib.ExitStack() as stack:
        for each in (model, whole):
            stack.enter_context(configured(each, "use_cache", False))
            stack.enter_context(eager_experts(each))
        compare(model, batches, whole, step=step)
    assert all(torch.equal(model(**values).logits, whole(**values).logits) for values in batches)


def test_queries_keys_and_values_are_one_stage():
    model = build("llama").eval()
    with Stages(model, find_targets(model), batches_of(model)) as stages:
        ends = [[name.split(".")[-2] for name in stage.names] for stage in stages.order]
    assert ends == 2 * [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def kept_outputs(stages):
    """Whether the outputs that finished blocks give take memory."""
    return [
        bool(t.untyped_storage().nbytes() > t.element_size())
        for given in stages._cache.values()
        for output in given.values()
        for t in pytree.tree_leaves(output)
        if torch.is_tensor(t)
    ]


LAYERS = {
    "llama": lambda model: [(layer.self_attn.o_proj, layer.mlp.down_proj) for layer in model.model.layers],
    "gpt2": lambda model: [(layer.attn.c_proj, layer.mlp.c_proj) for layer in model.transformer.h],
}


@pytest.mark.parametrize("family", LAYERS)
def test_finished_blocks_are_computed_once_more(family):
    model = build(family).eval()
    model.config.use_cache = False
    calls, parts = Counter(), Counter()
    for i, (part, last) in enumerate(LAYERS[family](model)):
        part.register_forward_hook(lambda *_, i=i: parts.update([i]))
        last.register_forward_hook(lambda *_, i=i: calls.update([i]))
    batches = batches_of(model)
    with Stages(model, find_targets(model), batches) as stages:
        for stage in stages.order:
            stages.run(stage, lambda *_: None)
            stages.finish(stage)
    # To see the order, once, and the first block for what it gives; its own last stage is left within the product.
    assert calls == {0: 1 + len(batches), 1: 1}
    # The attention for what it gives to the stages behind it, and to its block.
    assert parts == {0: 1 + len(batches), 1: 1 + len(batches)}
    model(**batches[0])
    assert calls[0] == 1 + len(batches) + 1


def test_what_lies_between_blocks_is_computed_once_when_nothing_before_it_changes():
    model = build("t5").eval()
    targets = {n: t for n, t in find_targets(model).items() if n.endswith(("wo.weight", "wi.weight"))}
    calls = Counter()
    blocks = [*model.encoder.block, *model.decoder.block]
    for i, block in enumerate(blocks):
        block.layer[0].SelfAttention.o.register_forward_hook(lambda *_, i=i: calls.update([i]))
    batches = batches_of(model)
    with configured(model, "use_cache", False), Stages(model, targets, batches) as stages:
        for stage in stages.order:
            stages.run(stage, lambda *_: None)
            stages.finish(stage)
    # To see the order once, and the first one also to see what batches read of values.
    assert calls == {0: len(batches) + 1 + len(batches), **dict.fromkeys(range(1, len(blocks)), 1 + len(batches))}


@pytest.mark.parametrize("family", ["llama", "vit", "t5"])
def test_what_only_finished_blocks_read_takes_no_memory(family):
    model = build(family).eval()
    torch.manual_seed(0)
    model.config.num_hidden_layers = model.config.num_layers = 4
    model.config.num_decoder_layers = 4
    model = type(model)(model.config).eval()
    model.config.use_cache = False
    kept = []
    with Stages(model, find_targets(model), batches_of(model)) as stages:
        for stage in stages.order:
            stages.run(stage, lambda *_: None)
            stages.finish(stage)
            kept.append(kept_outputs(stages))
    assert any(sum(each) < len(each) / 2 for each in kept)
    # Of the last blocks, and in T5 of the encoder's last and of those whose position bias others read.
    assert max(map(sum, kept)) <= {"t5": 8}.get(family, 2) * 3


class Chunks(nn.Module):
    """Uses a layer as often as there are pairs of positions."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.last = nn.Linear(4, 4)

    def forward(self, x):
        for block in self.blocks:
            x = torch.cat([block(part) for part in x.split(2)]).tanh()
        return self.last(x)


def test_batches_may_use_a_layer_more_or_less_often():
    torch.manual_seed(0)
    model = Chunks().eval()
    batches = [{"x": torch.randn(size, 4)} for size in (2, 8, 4, 6)]
    compare(model, batches)


class Talks(nn.Module):
    """Blocks that leave a note for later ones."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, notes):
            notes["sum"] = notes.get("sum", 0) + self.layer(x)
            return x + notes["sum"]

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))

    def forward(self, x):
        notes = {}
        for block in self.blocks:
            x = block(x, notes)
        return x


def test_blocks_that_leave_notes_for_others_are_computed():
    torch.manual_seed(0)
    compare(Talks().eval(), [{"x": torch.randn(3, 4)} for _ in range(2)])


def test_hooks_on_blocks_are_applied_once():
    torch.manual_seed(0)
    model = build("llama").eval()
    model.config.use_cache = False
    whole = twin(model)
    for each in (model, whole):
        each.model.layers[0].register_forward_hook(lambda module, args, output: output * 2)
    compare(model, batches_of(model), whole)


def test_what_autocast_remembers_is_forgotten():
    """Weights that take gradients are cast once in a region, and would stay as they were."""
    model = build("llama").eval()
    model.config.use_cache = False
    with torch.autocast("cpu", torch.bfloat16):
        compare(model, batches_of(model))


def test_experts_of_their_own_are_left_by_what_comes_later():
    """Which of them are used depends on the data, and on what was pruned before."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
            self.last = nn.Linear(4, 4)

        def forward(self, x, which):
            x = self.first(x)
            return self.last(x + sum(self.experts[int(i)](x) for i in which))

    torch.manual_seed(0)
    model = Experts().eval()
    batches = [{"x": torch.randn(3, 4), "which": torch.tensor(which)} for which in ([0, 1], [1, 2], [0, 2], [2, 2])]
    lasts = Counter()
    model.last.register_forward_hook(lambda *_: lasts.update(["last"]))
    with Stages(model, find_targets(model), batches) as stages:
        assert [stage.names[0].removesuffix(".weight") for stage in stages.order] == [
            "first", "experts.0", "experts.1", "experts.2", "last",
        ]  # fmt: skip
        assert [stage.uses for stage in stages.order] == [1, None, None, None, 1]
        before = lasts["last"]
        seen = []
        stages.run(stages.order[1], lambda product, _: seen.append(product))
        # Left in the product of what comes later, before the hooks of its module.
        assert (len(seen), lasts["last"]) == (2, before)
        assert stages.order[1].later == {"experts.1.weight", "experts.2.weight", "last.weight"}


class Block(nn.Module):
    """Has a part that holds several of its weights."""

    def __init__(self):
        super().__init__()
        self.part = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.out = nn.Linear(4, 4)

    def forward(self, x):
        return self.out(self.part(x).tanh())


class Routes(nn.Module):
    """The values of a tensor say which blocks are called, how often and in which order."""

    def __init__(self, read):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.last = nn.Linear(4, 4)
        self.read = read

    def forward(self, x, route):
        x = self.first(x)
        for i in self.read(route):
            x = self.blocks[i](x)
        return self.last(x)


class RoutesAtFirst(Routes):
    """Reads them before the first product."""

    def forward(self, x, route):
        route = self.read(route)
        x = self.first(x)
        for i in route:
            x = self.blocks[i](x)
        return self.last(x)


class Depths(Routes):
    """Reads what a block has given, which one it was is a value."""

    def forward(self, x, route):
        given = [self.first(x)]
        for block in self.blocks:
            given.append(block(given[-1]))
        return self.last(given[self.read(route)[0] + 1])


READS = {
    "items": lambda tensor: [int(i) for i in tensor],
    "tolist": lambda tensor: tensor.tolist(),
    "numpy": lambda tensor: [int(i) for i in tensor.numpy()],
    "shapes": lambda tensor: [len((torch.arange(9) < i).nonzero()) for i in tensor],
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("model_class", [Routes, RoutesAtFirst, Depths])
def test_values_may_decide_what_a_pass_does(model_class, read):
    torch.manual_seed(0)
    model = model_class(READS[read]).eval()
    routes = [[0, 1, 2], [2, 1, 0], [0, 2, 2], [1, 0, 0], [1, 2, 1]]
    batches = [{"x": torch.randn(3, 4), "route": torch.tensor(route)} for route in routes]
    compare(model, batches)


def test_values_that_all_passes_read_alike_make_no_difference():
    """As those of masks, which are read before the first layer."""
    torch.manual_seed(0)
    model, calls = RoutesAtFirst(READS["items"]).eval(), Counter()
    model.last.register_forward_pre_hook(lambda *_: calls.update(["last"]))
    batches = [{"x": torch.randn(3, 4), "route": torch.tensor([0, 1, 2])} for _ in range(5)]
    Stages(model, find_targets(model), batches)
    assert calls["last"] == 1


class Leaves(nn.Module):
    """Blocks with a part that has effects beside its output."""

    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.o = (nn.Linear(4, 4) for _ in range(3))
            self.part = self.Part(self.a, self.b)

        class Part(nn.Module):
            def __init__(self, a, b):
                super().__init__()
                self.a, self.b = a, b

            def forward(self, x):
                self.scale = self.a(x).sigmoid()
                return self.b(x)

        def forward(self, x):
            return self.o(self.part(x) * self.part.scale)

    class Appends(Keeps):
        class Part(nn.Module):
            def __init__(self, a, b):
                super().__init__()
                self.a, self.b = a, b

            def forward(self, x, aside):
                aside.append(self.a(x))
                return self.b(x)

        def forward(self, x):
            aside = []
            return self.o(self.part(x, aside) + aside[0])

    class Writes(Keeps):
        class Part(nn.Module):
            def __init__(self, a, b):
                super().__init__()
                self.a, self.b = a, b

            def forward(self, x):
                return x.add_(self.b(self.a(x).tanh()))

        def forward(self, x):
            x = x.clone()
            self.part(x)
            return self.o(x)

    def __init__(self, kind):
        super().__init__()
        self.blocks = nn.ModuleList(getattr(self, kind)() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("kind", ["Keeps", "Appends", "Writes"])
def test_parts_with_effects_beside_their_output_are_computed(kind):
    torch.manual_seed(0)
    compare(Leaves(kind).eval(), [{"x": torch.randn(3, 4)} for _ in range(2)])


GLOBAL = []


class Tells(nn.Module):
    """Blocks whose output is not all that others read of them."""

    @dataclasses.dataclass
    class Given:
        x: torch.Tensor

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.notes, self.store = nn.Linear(4, 4), {}, []

        def forward(self, x, way):
            y = self.layer(x).tanh()
            if way == "attribute":
                self.notes["y"] = y
            if way in ("list", "global"):
                (self.store if way == "list" else GLOBAL).append(y)
            return Tells.Given(x + y) if way == "dataclass" else x + y

    def __init__(self, way):
        super().__init__()
        self.way, self.hooked = way, []
        self.blocks, self.last = nn.ModuleList(self.Block() for _ in range(3)), nn.Linear(4, 4)
        if way == "hook":
            for block in self.blocks:
                block.layer.register_forward_hook(lambda *args: self.hooked.append(args[-1]))

    def forward(self, x):
        for store in (GLOBAL, self.hooked, *(block.store for block in self.blocks)):
            store.clear()
        for block in self.blocks:
            given = block(x, self.way)
            if self.way == "dataclass":
                given.x += x
            x = given.x if self.way == "dataclass" else given
        attributes = [block.notes["y"] for block in self.blocks if block.notes]
        stored = [y for block in self.blocks for y in block.store]
        return self.last(sum([*GLOBAL, *self.hooked, *attributes, *stored], x))


@pytest.mark.parametrize("way", ["attribute", "list", "global", "hook", "dataclass"])
def test_blocks_that_tell_others_more_than_their_output_are_computed(way):
    torch.manual_seed(0)
    model = Tells(way).eval()
    whole = Tells(way).eval()  # Hooks of a copy would still be those of the first.
    whole.load_state_dict(model.state_dict())
    compare(model, [{"x": torch.randn(5, 4)} for _ in range(3)], whole)


def test_a_model_does_not_take_the_end_of_a_pass_for_its_own_error():
    class Tries(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            try:
                hidden = self.a(x * 1)
            except Exception:
                hidden = self.a(x)
            return self.b(hidden.tanh())

    torch.manual_seed(0)
    compare(Tries().eval(), [{"x": torch.randn(5, 4)}])


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
    compare(Skips().eval(), [{"x": torch.randn(3, 4)} for _ in range(2)], looks=2)


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
        stages.run(stages.order[0], lambda product, _: seen.append(product))
    assert len(seen) == 3


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox"])
def test_dense_weights_are_kept_of_what_is_under_way(name):
    """And of nothing where no output is added to anything, as behind a norm of its own."""
    model = build_of_structures(name).eval()
    targets = {n: t for n, t in find_targets(model).items() if n.endswith(("down_proj.weight", "4h_to_h.weight"))}
    tokens = torch.randint(3, 60, (2, 10))
    kept = []
    with (
        configured(model, "use_cache", False),
        Stages(model, targets, [{"input_ids": tokens}, {"input_ids": tokens.flip(1)}], with_dense=True) as stages,
    ):
        assert len(stages.order) == 3
        for stage in stages.order:
            stages.run_beside_dense(stage, lambda *_: lambda difference: kept.append(difference is None))
            stages.finish(stage)
            assert len({target.weight for target in targets.values()} & stages._dense.keys()) <= (name != "gemma2") * 2
            assert sum(kept_outputs(stages)) <= 4 * (name != "gemma2") + 4
    assert stages._dense == {}
    assert kept == 6 * [name == "gemma2"]
