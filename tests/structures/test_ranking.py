"""Which structures go."""

import itertools
import re

import pytest
import torch

from hf_prune.structures.groups import StructureGroup
from hf_prune.structures.ranking import choose, count_left, require_attainable, shortfall_of


def places(*counts, kind="head", multiple=1, stay=()):
    return {f"{kind} {i}": StructureGroup(f"{kind} {i}", kind, n, (), multiple, stay) for i, n in enumerate(counts)}


def scores_of(structures, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(those.count, generator=generator).double() for name, those in structures.items()}


def all_kept(structures):
    return {name: torch.ones(those.count, dtype=torch.bool) for name, those in structures.items()}


def gone_of(kept):
    return {name: (~each).nonzero().flatten().tolist() for name, each in kept.items()}


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.25, 0.5, 0.7])
def test_heads_go_as_a_full_sort_says(sparsity, seed):
    structures = places(4, 6, 5)
    scores = scores_of(structures, seed)
    ranked = sorted((float(score), name, i) for name, each in scores.items() for i, score in enumerate(each))
    expected = {name: [] for name in structures}
    for _, name, i in ranked:
        done = sum(map(len, expected.values())) == round(sparsity * 15)
        if not done and len(expected[name]) < structures[name].count - 1:
            expected[name].append(i)
    kept = choose(structures, scores, all_kept(structures), sparsity, "global", {})
    assert gone_of(kept) == {name: sorted(each) for name, each in expected.items()}


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5, 0.6])
def test_no_other_widths_lose_less(sparsity, seed):
    """The oracle tries all widths of all places."""
    structures = places(16, 24, 32, kind="neuron", multiple=8)
    scores = scores_of(structures, seed)
    kept = choose(structures, scores, all_kept(structures), sparsity, "global", {})
    lowest = {name: each.sort().values for name, each in scores.items()}
    losses = {
        numbers: sum(float(each[:n].sum()) for each, n in zip(lowest.values(), numbers, strict=True))
        for numbers in itertools.product([0, 8], [0, 8, 16], [0, 8, 16, 24])
    }
    asked = round(sparsity * 72)
    total = min((sum(numbers) for numbers in losses), key=lambda total: (abs(total - asked), -total))
    best = min((numbers for numbers in losses if sum(numbers) == total), key=losses.__getitem__)
    assert tuple(len(gone) for gone in gone_of(kept).values()) == best
    assert all(scores[name][~each].max() <= scores[name][each].min() for name, each in kept.items() if not each.all())


def test_a_width_that_is_no_multiple_becomes_one_first():
    structures = places(20, kind="neuron", multiple=8)
    for sparsity, left in [(0.05, 20), (0.1, 16), (0.3, 16), (0.5, 8), (0.6, 8)]:
        kept = choose(structures, scores_of(structures), all_kept(structures), sparsity, "global", {})
        assert int(kept["neuron 0"].sum()) == left, sparsity


def test_each_kind_loses_the_same_share():
    structures = {**places(4, 4), **places(16, 16, kind="neuron", multiple=4)}
    scores = scores_of(structures)
    scores["neuron 0"] /= 1e6
    scores["neuron 1"] /= 1e6
    kept = choose(structures, scores, all_kept(structures), 0.5, "global", {})
    gone = gone_of(kept)
    assert len(gone["head 0"]) + len(gone["head 1"]) == 4
    assert len(gone["neuron 0"]) + len(gone["neuron 1"]) == 16


def test_under_scope_layer_each_place_loses_the_same():
    structures = places(8, 8, 8)
    kept = choose(structures, scores_of(structures), all_kept(structures), 0.5, "layer", {})
    assert [len(gone) for gone in gone_of(kept).values()] == [4, 4, 4]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("sparsity", "each"), [(0.1, 0), (0.25, 1), (0.5, 2), (0.7, 3)])
def test_of_each_run_as_many_go(sparsity, each, seed):
    """The oracle sorts each run by itself."""
    structures = {"q": StructureGroup("q", "query", 12, (), runs=3)}
    scores = scores_of(structures, seed)
    kept = choose(structures, scores, all_kept(structures), sparsity, "global", {})
    lowest = [sorted(range(4 * run, 4 * run + 4), key=lambda i: float(scores["q"][i]))[:each] for run in range(3)]
    assert gone_of(kept)["q"] == sorted(itertools.chain(*lowest))


def test_runs_of_different_groups_compete_by_what_goes_at_once():
    structures = {name: StructureGroup(name, "query", 4, (), runs=2) for name in "ab"}
    scores = {"a": torch.tensor([0.0, 9, 8, 9]).double(), "b": torch.tensor([3.0, 5, 3, 5]).double()}
    assert gone_of(choose(structures, scores, all_kept(structures), 0.25, "global", {})) == {"a": [], "b": [0, 2]}


def test_the_width_of_each_run_is_a_multiple():
    group = StructureGroup("experts", "neuron", 60, (), multiple=8, runs=3)
    assert group.counts_that_may_go() == [0, 12, 36]
    assert count_left(group, 0.5) == 24


def test_what_stays_in_a_run_holds_for_all_runs():
    assert StructureGroup("q", "query", 8, (), stay=(0, 1, 5), runs=2).counts_that_may_go() == [0, 2, 4]


def test_in_layers_that_go_nothing_else_is_chosen():
    structures = {
        "layers": StructureGroup("layers", "layer", 3, ()),
        **{f"layers.{i}.attn": StructureGroup(f"layers.{i}.attn", "head", 4, ()) for i in range(3)},
    }
    scores = {name: torch.arange(each.count).double() for name, each in structures.items()}
    kept = choose(structures, scores, all_kept(structures), 1 / 3, "global", {})
    # A third of three layers, and of the eight heads in the two that stay.
    assert gone_of(kept) == {
        "layers": [0], "layers.0.attn": [0, 1, 2, 3], "layers.1.attn": [0, 1], "layers.2.attn": [0]
    }  # fmt: skip


def test_a_pool_may_have_lost_more_than_its_share_once_a_layer_is_gone():
    structures = {
        "layers": StructureGroup("layers", "layer", 2, ()),
        **{f"layers.{i}.attn": StructureGroup(f"layers.{i}.attn", "head", 4, ()) for i in range(2)},
    }
    scores = {name: torch.arange(each.count).double() for name, each in structures.items()}
    kept = {**all_kept(structures), "layers.1.attn": torch.tensor([False, False, False, True])}
    assert gone_of(choose(structures, scores, kept, 0.5, "global", {}))["layers.1.attn"] == [0, 1, 2]


def test_layers_are_one_pool_whatever_the_scope():
    structures = places(4, 4, kind="layer")
    scores = {"layer 0": torch.arange(4.0).double(), "layer 1": 10 + torch.arange(4.0).double()}
    kept = choose(structures, scores, all_kept(structures), 0.25, "layer", {})
    assert gone_of(kept) == {"layer 0": [0, 1], "layer 1": []}


def test_what_is_gone_stays_gone_and_counts():
    structures = places(4, 4)
    kept = all_kept(structures)
    kept["head 0"][3] = False
    scores = {"head 0": torch.tensor([2.0, 1.0, 3.0, 9.0]).double(), "head 1": torch.arange(4.0).double() + 5}
    after = choose(structures, scores, kept, 0.375, "global", {})
    assert gone_of(after) == {"head 0": [0, 1, 3], "head 1": []}


def test_what_has_to_stay_stays():
    structures = places(4, kind="layer", stay=(0,))
    kept = choose(structures, {"layer 0": torch.arange(4.0).double()}, all_kept(structures), 0.5, "global", {})
    assert gone_of(kept) == {"layer 0": [1, 2]}


def test_a_place_may_have_its_own_sparsity():
    structures = places(8, 8)
    kept = choose(structures, scores_of(structures), all_kept(structures), 0.5, "global", {"head 0": 0.25})
    assert [len(gone) for gone in gone_of(kept).values()] == [2, 4]


def test_of_ties_the_first_go():
    structures = places(3, 3)
    kept = choose(structures, {n: torch.ones(3).double() for n in structures}, all_kept(structures), 0.5, "global", {})
    assert gone_of(kept) == {"head 0": [0, 1], "head 1": [0]}


@pytest.mark.parametrize(
    ("structures", "sparsity", "match"),
    [
        (places(2, 2), 0.8, r"remove 3 of the 4 heads in 2 places, and at most 2 can go: at least one head must"),
        (places(32, kind="neuron", multiple=8), 0.9, r"at least a multiple of 8 neurons must stay.*or multiple_of"),
        (places(12, kind="neuron", multiple=16), 0.9, r"at most 0 can go"),
        (places(2, kind="layer", stay=(0, 1)), 0.5, r"at most 0 can go"),
        (
            {"q": StructureGroup("q", "query", 9, (), runs=3)},
            0.9,
            r"8 of the 9 queries in 'q', and at most 6 can go: at least a multiple of 3 queries must stay",
        ),
    ],
)
def test_a_sparsity_that_would_empty_a_place(structures, sparsity, match):
    with pytest.raises(ValueError, match=match):
        require_attainable(structures, sparsity, {})


def test_more_is_gone_than_asked_for():
    structures = places(4)
    kept = {"head 0": torch.tensor([True, False, False, False])}
    with pytest.raises(ValueError, match=r"3 of the 4 heads in 'head 0' are zero already, more than the 2 asked for"):
        choose(structures, scores_of(structures), kept, 0.5, "global", {})


def test_scores_that_are_nan():
    structures = places(4)
    scores = {"head 0": torch.tensor([1.0, float("nan"), 1.0, 1.0]).double()}
    with pytest.raises(ValueError, match="1 of the 4 scores of 'head 0' are NaN"):
        choose(structures, scores, all_kept(structures), 0.5, "global", {})


@pytest.mark.parametrize(
    ("structures", "gone", "sparsity", "said"),
    [
        (places(2), 0, 0.2, r"sparsity 0\.2, but 0 of the 2 heads in 'head 0' are pruned \(0\)\. .*: 0 and 0\.5\. Ch"),
        (places(96, kind="neuron", multiple=64), 32, 0.2, r"32 of the 96 neurons .*: 0 and 0\.3333\. .* multiple_of"),
        (places(2, 2), 0, 0.1, r"0 of the 4 heads in 2 places are pruned.* step is 1 of them, a sparsity of 0\.25\."),
        (places(40, 40, kind="neuron", multiple=16), 8, 0.3, r"The smallest step is 8 of them, a sparsity of 0\.1\."),
        (places(40), 12, 0.3, None),
        (places(12, kind="layer"), 4, 0.3, None),  # 3.6 were asked for.
        (places(3072, 3072, kind="neuron", multiple=8), 1240, 0.2, None),
        (places(2), 0, 0.0, None),
    ],
)
def test_a_pool_that_misses_its_sparsity_says_what_can_be_had(structures, gone, sparsity, said):
    kept = all_kept(structures)
    kept[next(iter(kept))][:gone] = False
    found = shortfall_of(structures, kept, sparsity)
    assert found is None if said is None else re.search(said, found)
