import dataclasses
import itertools
import math
import random
import time
from fractions import Fraction

import pytest

from hf_prune.scopes import GLOBAL, OWL_SPREAD, SCOPES, Pool, pools

# As in a small GPT-2: attention and feed-forward of several widths, a convolution, experts of three times their shape.
SHAPES = {
    "attn": (768, 2304),
    "proj": (768, 768),
    "up": (768, 3072),
    "down": (3072, 768),
    "narrow": (768, 2),
    "conv": (64, 3, 7, 7),
    "experts": (128, 256),
}
SIZES = {name: math.prod(shape) * (3 if name == "experts" else 1) for name, shape in SHAPES.items()}
SPARSITIES = [0.0, 0.1, 1 / 3, 0.5, 0.75, 0.9, 0.99, 0.9999]


def divide(sizes, sparsity, scope, *, shapes=None, dropped=None, layer_sparsity=None, outliers=None):
    return pools(
        sizes,
        sparsity,
        SCOPES[scope] or GLOBAL,
        shapes=shapes or {name: (size, 1) for name, size in sizes.items()},
        dropped=dropped or dict.fromkeys(sizes, 0),
        layer_sparsity=layer_sparsity or {},
        measured=outliers or {name: len(name) / 100 for name in sizes},
    )


def drops(result):
    """Name → number to drop, of pools of one tensor each."""
    assert all(len(pool.names) == 1 for pool in result)
    return {pool.names[0]: pool.drop for pool in result}


def model(rng):
    """Shapes and sizes of a random model."""
    shapes, sizes = {}, {}
    for i in range(rng.randint(1, 9)):
        dimensions = 2 if rng.random() < 0.7 else 4
        shapes[f"l{i}"] = tuple(rng.randint(1, 60 if dimensions == 2 else 12) for _ in range(dimensions))
        sizes[f"l{i}"] = math.prod(shapes[f"l{i}"]) * rng.choice([1, 1, 1, 4])
    return shapes, sizes


def erk(shapes, sizes, keep):
    """The Erdős–Rényi kernel rule in fractions: layer → what it keeps, by filling up the layers one after the other.

    A layer keeps `min(1, e · sum(dims) / prod(dims))` of its weights, with the `e` at which all layers keep `keep`.
    """
    weight = {name: Fraction(sum(shape), math.prod(shape)) for name, shape in shapes.items()}
    by_weight = sorted(sizes, key=weight.__getitem__, reverse=True)
    for dense in range(len(by_weight) + 1):
        full, rest = by_weight[:dense], by_weight[dense:]
        left = keep - sum(sizes[name] for name in full)
        e = Fraction(left) / sum(weight[name] * sizes[name] for name in rest) if rest else Fraction(0)
        if not rest or e * weight[rest[0]] <= 1:
            return {name: Fraction(sizes[name]) if name in full else e * weight[name] * sizes[name] for name in sizes}
    raise AssertionError


# Global


@pytest.mark.parametrize("scope", ["global", "auto"])
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_global_is_one_pool_of_exactly_the_sparsity(scope, sparsity):
    total = sum(SIZES.values())
    assert divide(SIZES, sparsity, scope) == [Pool(tuple(SIZES), round(sparsity * total))]


def test_global_is_exact_for_any_sizes():
    rng = random.Random(0)
    for _ in range(500):
        _, sizes = model(rng)
        sparsity = rng.random()
        (pool,) = divide(sizes, sparsity, "global")
        assert pool.names == tuple(sizes)
        assert pool.drop == round(sparsity * sum(sizes.values()))


# Layer


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_layer_gives_each_tensor_the_sparsity(sparsity):
    result = divide(SIZES, sparsity, "layer")
    assert drops(result) == {name: round(sparsity * size) for name, size in SIZES.items()}


# ERK


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_erk_is_exact_in_total(sparsity):
    result = drops(divide(SIZES, sparsity, "erk", shapes=SHAPES))
    assert set(result) == set(SIZES)
    assert sum(result.values()) == round(sparsity * sum(SIZES.values()))


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_erk_is_the_erdos_renyi_kernel_rule(sparsity):
    result = drops(divide(SIZES, sparsity, "erk", shapes=SHAPES))
    exact = erk(SHAPES, SIZES, sum(SIZES.values()) - round(sparsity * sum(SIZES.values())))
    for name, drop in result.items():
        assert abs(SIZES[name] - drop - exact[name]) < 1 + Fraction(1, 10**6)


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.99])
def test_under_erk_density_goes_with_the_sum_of_the_dimensions_over_their_product(sparsity):
    result = drops(divide(SIZES, sparsity, "erk", shapes=SHAPES))
    sparse = [name for name, drop in result.items() if drop > 1]
    assert len(sparse) >= 4
    # What rounding to whole weights can move: one weight in each direction.
    lowest, highest = 0.0, math.inf
    for name in sparse:
        weight = sum(SHAPES[name]) / math.prod(SHAPES[name])
        keep = SIZES[name] - result[name]
        lowest = max(lowest, (keep - 1) / SIZES[name] / weight)
        highest = min(highest, (keep + 1) / SIZES[name] / weight)
    assert lowest <= highest
    # Of the layers that stay dense the rule would have kept more than all.
    for name in set(SIZES) - set(sparse):
        assert highest * sum(SHAPES[name]) / math.prod(SHAPES[name]) >= 1 - 2 / SIZES[name]


def test_erk_holds_for_any_sizes():
    rng = random.Random(1)
    for _ in range(500):
        shapes, sizes = model(rng)
        sparsity = rng.choice([rng.random(), 1 - rng.random() ** 3])
        drop = round(sparsity * sum(sizes.values()))
        result = drops(divide(sizes, sparsity, "erk", shapes=shapes))
        exact = erk(shapes, sizes, sum(sizes.values()) - drop)
        assert sum(result.values()) == drop
        for name, count in result.items():
            assert 0 <= count <= sizes[name]
            assert abs(sizes[name] - count - exact[name]) < 1 + Fraction(1, 10**6)


def test_erk_with_blocks_goes_by_the_layers_shape_and_counts_blocks():
    sizes = {name: size // 2 for name, size in SIZES.items()}
    result = drops(divide(sizes, 0.9, "erk", shapes=SHAPES))
    exact = erk(SHAPES, sizes, sum(sizes.values()) - round(0.9 * sum(sizes.values())))
    assert sum(result.values()) == round(0.9 * sum(sizes.values()))
    assert all(abs(sizes[name] - result[name] - exact[name]) < 1.001 for name in sizes)


def test_layers_of_one_shape_are_equally_sparse_under_erk():
    shapes = dict.fromkeys("abcd", (30, 20))
    result = drops(divide(dict.fromkeys("abcd", 600), 0.6667, "erk", shapes=shapes))
    assert sum(result.values()) == round(0.6667 * 2400)
    assert max(result.values()) - min(result.values()) <= 1


def test_erk_takes_a_weight_without_elements():
    result = drops(divide({"a": 0, "b": 100}, 0.5, "erk", shapes={"a": (0, 3), "b": (10, 10)}))
    assert result == {"a": 0, "b": 50}


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.7, 0.9])
def test_owl_is_the_rule_of_its_paper(sparsity):
    """Blocks of one size, as in a language model: the published code gives each the density below."""
    rng = random.Random(0)
    sizes = {f"h.{block}.{name}": size for block in range(6) for name, size in (("attn.q", 4000), ("mlp", 16000))}
    outliers = {name: rng.random() / 10 for name in sizes}
    ratios = [(outliers[f"h.{i}.attn.q"] * 4000 + outliers[f"h.{i}.mlp"] * 16000) / 20000 for i in range(6)]
    low, high = min(ratios), max(ratios)
    lean = [(ratio - low) / (high - low) * OWL_SPREAD * 2 for ratio in ratios]
    density = [value - sum(lean) / 6 + (1 - sparsity) for value in lean]
    assert 0 < min(density) < max(density) < 1
    result = drops(divide(sizes, sparsity, "owl", outliers=outliers))
    assert sum(result.values()) == round(sparsity * sum(sizes.values()))
    for name, drop in result.items():
        assert drop / sizes[name] == pytest.approx(1 - density[int(name.split(".")[1])], abs=1e-3)


def test_layers_without_outliers_are_equally_sparse_under_owl():
    sizes = {"h.0.a": 1000, "h.1.a": 1000}
    assert drops(divide(sizes, 0.7, "owl", outliers=dict.fromkeys(sizes, 0.0))) == {"h.0.a": 700, "h.1.a": 700}


# Round after round


@pytest.mark.parametrize("scope", ["layer", "erk", "owl"])
def test_a_tensor_never_drops_fewer_than_before(scope):
    rng = random.Random(2)
    for _ in range(200):
        shapes, sizes = model(rng)
        dropped = dict.fromkeys(sizes, 0)
        for sparsity in sorted(rng.random() for _ in range(6)):
            result = drops(divide(sizes, sparsity, scope, shapes=shapes, dropped=dropped))
            assert all(dropped[name] <= result[name] <= sizes[name] for name in sizes)
            if scope != "layer":
                assert sum(result.values()) == round(sparsity * sum(sizes.values()))
            dropped = result


def test_erk_is_exact_also_where_a_layer_was_sparser_before():
    rng = random.Random(3)
    for _ in range(300):
        shapes, sizes = model(rng)
        sparsity = rng.random()
        drop = round(sparsity * sum(sizes.values()))
        dropped, left = {}, drop
        for name in sorted(sizes, key=lambda _: rng.random()):
            dropped[name] = rng.randint(0, min(left, sizes[name]))
            left -= dropped[name]
        result = drops(divide(sizes, sparsity, "erk", shapes=shapes, dropped=dropped))
        assert sum(result.values()) == drop
        assert all(dropped[name] <= result[name] <= sizes[name] for name in sizes)


def test_erk_is_quick_also_where_a_large_layer_was_sparser_before():
    """As in a sparse model whose zeros are held; one step for each weight would take seconds to minutes."""
    size = 2 * 10**7
    sizes, dropped, shapes = dict.fromkeys("ab", size), {"a": size, "b": 0}, dict.fromkeys("ab", (size // 1000, 1000))
    start = time.perf_counter()
    result = drops(divide(sizes, 0.625, "erk", shapes=shapes, dropped=dropped))
    assert time.perf_counter() - start < 1
    assert result == {"a": size, "b": size // 4}


@pytest.mark.parametrize("scope", ["global", "auto", "erk", "owl"])
def test_more_dropped_than_the_sparsity_is_an_error(scope):
    sizes, shapes = {"a": 100, "b": 100}, dict.fromkeys("ab", (10, 10))
    message = (
        r"0\.6000 of the targets is zero already, more than the sparsity 0\.5000 asked for in this round\. What is "
        r"pruned stays pruned: take fewer rounds or a higher initial_sparsity, or start without hold_zeros\."
    )
    with pytest.raises(ValueError, match=message):
        divide(sizes, 0.5, scope, shapes=shapes, dropped={"a": 80, "b": 40})
    with pytest.raises(
        ValueError, match=r"0\.6000 of the targets is zero already, more than the sparsity 0\.5950 asked"
    ):
        divide(sizes, 0.595, scope, shapes=shapes, dropped={"a": 80, "b": 40})
    assert sum(pool.drop for pool in divide(sizes, 0.6, scope, shapes=shapes, dropped={"a": 80, "b": 40})) == 120


def test_more_dropped_of_one_tensor_than_its_sparsity_is_an_error():
    with pytest.raises(ValueError, match=r"0\.8000 of 'a' is zero already, more than the sparsity 0\.5000 asked for"):
        divide({"a": 100, "b": 100}, 0.5, "layer", dropped={"a": 80, "b": 0})
    with pytest.raises(ValueError, match=r"0\.8000 of 'a' is zero already, more than the sparsity 0\.3000 asked for"):
        divide({"a": 100, "b": 100}, 0.9, "global", dropped={"a": 80, "b": 0}, layer_sparsity={"a": 0.3})


# A tensor's own sparsity


@pytest.mark.parametrize("scope", SCOPES)
def test_a_tensor_with_its_own_sparsity_leaves_the_competition(scope):
    own = {"up": 0.25, "conv": 0.0}
    result = divide(SIZES, 0.9, scope, shapes=SHAPES, layer_sparsity=own)
    rest = {name: size for name, size in SIZES.items() if name not in own}
    names = list(itertools.chain.from_iterable(pool.names for pool in result))
    assert sorted(names) == sorted(SIZES)
    assert Pool(("up",), round(0.25 * SIZES["up"])) in result
    assert Pool(("conv",), 0) in result
    assert [pool for pool in result if set(pool.names) <= set(rest)] == divide(rest, 0.9, scope, shapes=SHAPES)


@pytest.mark.parametrize("scope", SCOPES)
def test_all_tensors_may_have_their_own_sparsity(scope):
    own = dict.fromkeys(SIZES, 0.5)
    assert drops(divide(SIZES, 0.9, scope, shapes=SHAPES, layer_sparsity=own)) == {
        name: round(size / 2) for name, size in SIZES.items()
    }


def test_a_pool_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Pool(("a",), 1).drop = 2
