import dataclasses
import itertools

import pytest
import torch

from hf_prune.calibration.statistics import STATISTICS
from hf_prune.criteria import (
    CRITERIA,
    ScoreInputs,
    fisher,
    lamp,
    magnitude,
    needs,
    needs_of,
    pooling_of,
    random,
    scope_of,
    snip,
    taylor,
    wanda,
)
from hf_prune.scopes import SCOPES

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def uniform(name="layer.weight", shape=(100_000,), seed=0):
    return random(ScoreInputs(name, torch.zeros(shape), seed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_magnitude_is_the_absolute_value_without_a_cast(dtype):
    weight = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[0, 0, 0], weight[0, 1, 0], weight[0, 2, 0] = -0.0, float("inf"), -float("inf")
    scores = magnitude(ScoreInputs("layer.weight", weight.clone()))
    assert scores.dtype == dtype
    assert scores.shape == weight.shape
    expected = [value if value > 0 else -value for value in weight.flatten().tolist()]
    assert scores.flatten().tolist() == expected


def test_magnitude_leaves_the_weight_alone():
    weight = torch.tensor([-1.0, 2.0])
    magnitude(ScoreInputs("layer.weight", weight)).zero_()
    assert weight.tolist() == [-1.0, 2.0]


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (4, 2, 3, 3), (0, 3), (1, 1)])
def test_random_has_the_weights_shape(shape):
    scores = random(ScoreInputs("layer.weight", torch.ones(shape)))
    assert scores.shape == shape
    assert scores.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_does_not_depend_on_the_values_or_their_dtype(dtype):
    weight = torch.full((50,), 3.0, dtype=dtype)
    assert torch.equal(random(ScoreInputs("layer.weight", weight)), uniform(shape=(50,)))


def test_random_is_the_same_for_the_same_name_and_seed_whatever_came_before():
    first = uniform()
    torch.manual_seed(1234)
    torch.rand(17)
    uniform("another.weight", seed=5)
    assert torch.equal(uniform(), first)


def test_random_is_the_same_in_every_process():
    """A name's `hash` for example is not; a resumed run and its other ranks have to draw the same numbers."""
    expected = torch.tensor([[0.12561947, 0.26177579], [0.58088303, 0.12509203]])
    torch.testing.assert_close(uniform("h.0.mlp.weight", shape=(2, 2), seed=7), expected, rtol=0, atol=1e-7)


def test_random_depends_on_the_name_and_on_the_seed():
    draws = [uniform(name, seed=seed) for name in ("a", "b", "1", "a:1") for seed in (0, 1, 11, -1, 2**63)]
    for one, other in itertools.combinations(draws, 2):
        # Of two independent draws about one pair in 2**24 is equal, and the correlation is within five sigmas of 0.
        assert (one == other).float().mean() < 0.001
        assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 5 / len(one) ** 0.5


def test_random_leaves_the_global_random_state_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    uniform()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [0, 1, 42])
def test_random_is_uniform_on_zero_to_one(seed):
    scores = uniform(seed=seed)
    assert scores.min() >= 0
    assert scores.max() < 1
    counts = torch.histc(scores, bins=50, min=0, max=1)
    expected = len(scores) / 50
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert 23.98 < chi_squared < 85.35  # All but 0.1 % of the draws lie above, and all but 0.1 % below.
    # Neighbours in a tensor are independent too.
    assert abs(torch.corrcoef(torch.stack([scores[:-1], scores[1:]]))[0, 1]) < 5 / len(scores) ** 0.5


def test_the_known_criteria():
    assert {"magnitude": magnitude, "random": random}.items() <= CRITERIA.items()


def test_score_inputs_cannot_be_changed():
    inputs = ScoreInputs("layer.weight", torch.zeros(2))
    assert inputs.seed == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        inputs.weight = torch.ones(2)


# Against formulas


def inputs(shape=(4, 5), **statistics) -> ScoreInputs:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return ScoreInputs("layer.weight", weight, statistics=statistics)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def test_first_and_second_order():
    gradient, squares = drawn(4, 5), drawn(4, 5).square()
    for i, j in itertools.product(range(4), range(5)):
        w = inputs().weight[i, j]
        expected = abs(float(w) * float(gradient[i, j]))
        assert taylor(inputs(gradient=gradient))[i, j] == pytest.approx(expected)
        assert snip(inputs(gradient=gradient))[i, j] == pytest.approx(expected)
        expected = float(w) ** 2 * float(squares[i, j]) / 2
        assert fisher(inputs(squared_gradient=squares))[i, j] == pytest.approx(expected)


@pytest.mark.parametrize("shape", [(1, 5), (4, 1), (4, 5)])
def test_wanda_is_the_product_of_weight_and_input_norm(shape):
    norm = drawn(*shape).abs()
    scores = wanda(inputs(input_norm=norm))
    for i, j in itertools.product(range(4), range(5)):
        factor = float(norm[min(i, shape[0] - 1), min(j, shape[1] - 1)])
        assert scores[i, j] == pytest.approx(abs(float(inputs().weight[i, j])) * factor)


@pytest.mark.parametrize("shape", [(7,), (4, 5), (2, 3, 4)])
def test_lamp_is_what_its_definition_says(shape):
    """Score(u) = w[u]² / Σ_{v ≥ u} w[v]², for weights in ascending order of magnitude."""
    given = inputs(shape)
    weights = given.weight.flatten().double().tolist()
    for weight, score in zip(weights, lamp(given).flatten().tolist(), strict=True):
        rest = sum(other**2 for other in weights if abs(other) >= abs(weight))
        assert score == pytest.approx(weight**2 / rest)
    assert lamp(given).max() == 1


def test_lamp_of_zeros_is_zero():
    assert not lamp(ScoreInputs("a", torch.zeros(5))).any()
    assert lamp(ScoreInputs("a", torch.tensor([0.0, 3.0, 0.0]))).tolist() == [0.0, 1.0, 0.0]


def test_within_a_layer_lamp_ranks_as_magnitude_does():
    given = inputs((30, 40))
    assert torch.equal(lamp(given).flatten().argsort(), given.weight.abs().flatten().argsort())


def test_what_was_not_declared_is_an_error_that_says_how():
    with pytest.raises(ValueError, match=r"reads the 'gradient' of 'layer\.weight', .* put @needs\('gradient'\)"):
        taylor(inputs())


@pytest.mark.parametrize("name", CRITERIA)
def test_every_need_is_a_statistic_and_every_scope_is_known(name):
    assert set(needs_of(CRITERIA[name])) <= {*STATISTICS, "movement"}
    assert scope_of(CRITERIA[name]) in SCOPES


def test_what_the_score_of_a_structure_is_has_two_ways():
    assert {name for name, criterion in CRITERIA.items() if pooling_of(criterion) == "norm"} == {"magnitude"}
    assert pooling_of(lambda inputs: inputs.weight) == "sum"
    with pytest.raises(ValueError, match=r"pooling must be one of sum, norm; got 'mean'\."):
        needs(pooling="mean")
