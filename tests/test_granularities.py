import dataclasses
import itertools
import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_prune.granularities import GRANULARITIES, Block, Pattern, Structural, Unstructured, parse
from hf_prune.weights.targets import Target, find_targets

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def experts(*shape):
    return nn.Parameter(torch.zeros(shape))


# Each kind of weight that can be a target, with 8 outputs and 40 inputs, which 4, 5 and 8 divide.
TARGETS = {
    "linear": Target("linear.weight", nn.Linear(40, 8).weight, (0, 1)),
    "conv1d": Target("conv1d.weight", Conv1D(8, 40).weight, (1, 0)),
    "conv2d": Target("conv2d.weight", nn.Conv2d(40, 8, (3, 2)).weight, (2, 3, 0, 1)),
    "grouped conv2d": Target("grouped.weight", nn.Conv2d(80, 8, 2, groups=2).weight, (2, 3, 0, 1)),
    "experts": Target("experts.gate_up_proj", experts(3, 8, 40), (0, 1, 2)),
    "transposed experts": Target("experts.down_proj", experts(3, 40, 8), (0, 2, 1)),
}
KINDS = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())


def rows(target):
    """The positions of a weight's elements, output by output, each list in the order of the inputs.

    Written against what the layers compute, not against `Target`: `Linear` and experts as `[…, out, in]`, `Conv1D` and
    transposed experts as `[…, in, out]`, `Conv2d` as `[out, in, height, width]`.
    """
    shape = target.weight.shape
    kind = next(kind for kind, other in TARGETS.items() if other.name == target.name)
    if kind == "linear":
        return [[(o, i) for i in range(shape[1])] for o in range(shape[0])]
    if kind == "conv1d":
        return [[(i, o) for i in range(shape[0])] for o in range(shape[1])]
    if kind == "experts":
        return [[(e, o, i) for i in range(shape[2])] for e in range(shape[0]) for o in range(shape[1])]
    if kind == "transposed experts":
        return [[(e, i, o) for i in range(shape[1])] for e in range(shape[0]) for o in range(shape[2])]
    positions = itertools.product(range(shape[2]), range(shape[3]), range(shape[0]))
    return [[(o, i, y, x) for i in range(shape[1])] for y, x, o in positions]


def brute_force(scores, kept, target, n, m):
    """N:M in plain Python: in each group the lowest `m − n` go, what is pruned already first, then by position."""
    values = scores.tolist()
    alive = kept.tolist() if kept is not None else torch.ones(scores.shape, dtype=torch.bool).tolist()
    mask = torch.ones(scores.shape, dtype=torch.bool)

    def at(nested, position):
        for index in position:
            nested = nested[index]
        return nested

    for row in rows(target):
        for start in range(0, len(row), m):
            group = row[start : start + m]
            ranks = [((at(alive, p), at(values, p) if at(alive, p) else 0.0), j) for j, p in enumerate(group)]
            for _, j in sorted(ranks)[: m - n]:
                mask[group[j]] = False
    return mask


def draw(target, dtype, kind, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = target.weight.shape
    if kind == "normal":
        return torch.randn(shape, generator=generator).to(dtype)
    if kind == "ties":
        return torch.randint(0, 3, shape, generator=generator).to(dtype)
    if kind == "equal":
        return torch.full(shape, 0.5, dtype=dtype)
    if kind == "signed zeros":
        return torch.where(torch.rand(shape, generator=generator) < 0.5, 0.0, -0.0).to(dtype)
    infinite = torch.tensor([-math.inf, -math.inf, 0.0, math.inf])
    return infinite[torch.randint(0, 4, shape, generator=generator)].to(dtype)


# Reading


@pytest.mark.parametrize(
    ("text", "granularity"),
    [
        ("unstructured", Unstructured()),
        ("2:4", Pattern(2, 4)),
        ("1:4", Pattern(1, 4)),
        ("3:5", Pattern(3, 5)),
        ("15:16", Pattern(15, 16)),
        ("block:1x1", Block(1, 1)),
        ("block:4x4", Block(4, 4)),
        ("block:16x2", Block(16, 2)),
    ],
)
def test_a_granularity_is_read_as_a_config_spells_it(text, granularity):
    assert parse(text) == granularity


@pytest.mark.parametrize("text", ["0:4", "4:4", "5:4", "0:0"])
def test_a_pattern_that_keeps_nothing_or_all_is_an_error(text):
    with pytest.raises(ValueError, match=rf"N:M keeps N of every M and needs 0 < N < M, got '{text}'\."):
        parse(text)


@pytest.mark.parametrize("text", ["block:0x4", "block:4x0", "block:0x0"])
def test_a_block_without_an_area_is_an_error(text):
    with pytest.raises(ValueError, match=rf"block:RxC needs R and C of at least 1, got '{text}'\."):
        parse(text)


@pytest.mark.parametrize(
    "text",
    [
        *["", "rows", "Unstructured", "unstructured ", "2:4\n", "2 : 4", "-2:4", "2:-4", "2.0:4", "2:4:8", ":", "2:"],
        *["N:M", "2/4", "block", "block:4", "block:4x", "block:x4", "block:-4x4", "block:4X4", "block:4x4x4", "4x4"],
    ],
)
def test_an_unknown_granularity_is_an_error_that_lists_the_known(text):
    with pytest.raises(ValueError, match=r"granularity must be unstructured, .*; got ") as error:
        parse(text)
    assert all(kind.spelling in str(error.value) for kind in GRANULARITIES)
    assert "N:M (such as 2:4), block:RxC (such as block:4x4)" in str(error.value)
    assert "one or several of head, neuron, channel, layer, query, width, expert, joined by +" in str(error.value)


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("head", ("head",)),
        ("expert+neuron", ("expert", "neuron")),
        ("query+neuron+width", ("query", "neuron", "width")),
        ("layer+head", ("layer", "head")),
    ],
)
def test_kinds_of_structures_are_joined(text, kinds):
    assert parse(text) == Structural(kinds)
    assert str(parse(text)) == text


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("head+query", r"'head\+query' cannot be: with a head go the queries that read it"),
        ("query+neuron+head", "cannot be: with a head go the queries"),
        ("layer+channel", "cannot be: networks with channels have no other structures"),
        ("neuron+neuron", r"granularity 'neuron\+neuron' names a kind of structures twice"),
        ("head+", "granularity must be"),
        ("head+heads", "granularity must be"),
    ],
)
def test_kinds_that_do_not_go_together(text, match):
    with pytest.raises(ValueError, match=match):
        parse(text)


@pytest.mark.parametrize("granularity", [Unstructured(), Pattern(2, 4), Block(2, 2)])
def test_a_granularity_cannot_be_changed(granularity):
    with pytest.raises(dataclasses.FrozenInstanceError):
        granularity.n = 3


# How a weight is read as a matrix


@KINDS
def test_a_matrix_has_a_row_for_each_output_and_the_inputs_last(target):
    values = torch.arange(target.weight.numel()).view(target.weight.shape)
    expected = torch.tensor([[int(values[position]) for position in row] for row in rows(target)])
    assert torch.equal(target.to_matrix(values), expected)
    assert (target.out_features, target.in_features) == (8, 40)


@KINDS
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
def test_from_matrix_is_the_inverse_of_to_matrix(target, dtype):
    values = torch.arange(target.weight.numel()).view(target.weight.shape)
    values = values % 3 == 0 if dtype == torch.bool else values.to(dtype)
    assert torch.equal(target.from_matrix(target.to_matrix(values)), values)
    matrix = target.to_matrix(values)
    assert torch.equal(target.to_matrix(target.from_matrix(matrix)), matrix)


def test_layers_are_found_with_these_axes():
    model = nn.Sequential(nn.Linear(4, 8), Conv1D(8, 4), nn.Conv2d(4, 8, 3), nn.Conv2d(4, 8, 3, groups=2))
    axes = [target.axes for target in find_targets(model).values()]
    assert axes == [TARGETS[kind].axes for kind in ("linear", "conv1d", "conv2d", "grouped conv2d")]


def test_a_permutation_that_is_not_its_own_inverse_is_undone_too():
    target = Target("weight", experts(2, 3, 4), (1, 2, 0))
    values = torch.arange(24).view(2, 3, 4)
    assert target.to_matrix(values).tolist() == [
        [values[i, j, k] for i in range(2)] for j in range(3) for k in range(4)
    ]
    assert torch.equal(target.from_matrix(target.to_matrix(values)), values)


# Unstructured


@KINDS
def test_unstructured_leaves_everything_as_it_is(target):
    scores = draw(target, torch.float32, "normal")
    granularity = Unstructured()
    granularity.check([target])
    assert granularity.count(target) == target.weight.numel()
    assert torch.equal(granularity.pool(scores, target), scores)
    assert torch.equal(granularity.pool_mask(scores > 0, target), scores > 0)
    assert torch.equal(granularity.spread(scores > 0, target), scores > 0)


# N:M


@KINDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (4, 8), (3, 5)])
def test_a_pattern_keeps_the_best_of_each_group(target, dtype, n, m):
    scores = draw(target, dtype, "normal")
    before = scores.clone()
    mask = Pattern(n, m).keep(scores, None, target)
    assert torch.equal(mask, brute_force(scores, None, target, n, m))
    assert mask.dtype == torch.bool
    assert mask.is_contiguous()
    assert torch.equal(scores, before)
    assert int(mask.sum()) * m == mask.numel() * n


@pytest.mark.parametrize("target", [TARGETS["conv1d"], TARGETS["conv2d"]], ids=["conv1d", "conv2d"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["ties", "equal", "signed zeros", "infinite"])
@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (4, 8), (3, 5), (2, 40)])
def test_ties_go_by_position(target, dtype, kind, n, m):
    scores = draw(target, dtype, kind)
    assert torch.equal(Pattern(n, m).keep(scores, None, target), brute_force(scores, None, target, n, m))


def test_the_first_of_equals_goes_first():
    target = Target("w.weight", nn.Linear(4, 2, bias=False).weight, (0, 1))
    mask = Pattern(2, 4).keep(torch.ones(2, 4), None, target)
    assert mask.tolist() == [[False, False, True, True]] * 2


@KINDS
@pytest.mark.parametrize("kind", ["normal", "ties", "infinite"])
@pytest.mark.parametrize("m", [4, 5, 8])
def test_what_is_pruned_stays_pruned_on_the_way_to_a_pattern(target, kind, m):
    kept = None
    for n in range(m - 1, 0, -1):
        # New scores each round, as after training: what is pruned may score highest now.
        scores = draw(target, torch.float32, kind, seed=n)
        mask = Pattern(n, m).keep(scores, kept, target)
        assert torch.equal(mask, brute_force(scores, kept, target, n, m))
        assert torch.all(target.to_matrix(mask).reshape(-1, m).sum(1) == n)
        assert kept is None or not torch.any(mask & ~kept)
        kept = mask


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dead_weight_ranks_below_minus_infinity(dtype):
    target = Target("w.weight", nn.Linear(4, 1, bias=False).weight, (0, 1))
    scores = torch.tensor([[-math.inf, -math.inf, math.inf, 0.0]], dtype=dtype)
    kept = torch.tensor([[True, True, False, True]])
    assert Pattern(3, 4).keep(scores, kept, target).tolist() == [[True, True, False, True]]
    assert Pattern(2, 4).keep(scores, kept, target).tolist() == [[False, True, False, True]]
    assert Pattern(1, 4).keep(scores, kept, target).tolist() == [[False, False, False, True]]


def test_groups_with_too_many_zeros_cannot_become_a_pattern():
    target = Target("layer.weight", nn.Linear(8, 2, bias=False).weight, (0, 1))
    kept = torch.ones(2, 8, dtype=torch.bool)
    kept[1, 4:7] = False
    message = (
        r"'layer' has groups of 4 with more than 2 zeros already; they cannot become 2:4\. Start without hold_zeros\."
    )
    with pytest.raises(ValueError, match=message):
        Pattern(2, 4).keep(torch.ones(2, 8), kept, target)
    kept[1, 6] = True
    assert Pattern(2, 4).keep(torch.ones(2, 8), kept, target)[1].tolist() == [False, False, True, True] * 2


def test_a_pattern_needs_groups_that_tile_the_inputs():
    targets = [
        TARGETS["linear"],
        Target("encoder.classifier.weight", nn.Linear(770, 4).weight, (0, 1)),
        Target("h.0.c_attn.weight", Conv1D(12, 6).weight, (1, 0)),
        Target("depthwise.weight", nn.Conv2d(8, 8, 4, groups=8).weight, (2, 3, 0, 1)),
        Target("experts.down_proj", experts(4, 30, 8), (0, 2, 1)),
    ]
    message = (
        r"^2:4 needs in_features divisible by 4; 'encoder\.classifier' has 770, 'h\.0\.c_attn' has 6, "
        r"'depthwise' has 1, 'experts\.down_proj' has 30\. Add to exclude_modules\.$"
    )
    with pytest.raises(ValueError, match=message):
        Pattern(2, 4).check(targets)


@pytest.mark.parametrize("granularity", [Pattern(1, 4), Pattern(3, 5), Pattern(7, 20), Block(8, 40), Block(2, 5)])
def test_what_tiles_the_weights_passes(granularity):
    granularity.check(TARGETS.values())


# Blocks


def blocks(target, block):
    """The positions of each block's weights, as `[block row][block column] → positions`."""
    every = rows(target)
    return [
        [
            [every[top + r][left + c] for r in range(block.rows) for c in range(block.columns)]
            for left in range(0, len(every[0]), block.columns)
        ]
        for top in range(0, len(every), block.rows)
    ]


BLOCKS = pytest.mark.parametrize("block", [Block(4, 4), Block(1, 8), Block(8, 1), Block(8, 20), Block(1, 1)], ids=str)


@KINDS
@BLOCKS
def test_a_block_scores_the_sum_of_its_weights(target, block):
    scores = draw(target, torch.float64, "normal")
    expected = torch.tensor([[sum(float(scores[p]) for p in b) for b in row] for row in blocks(target, block)])
    pooled = block.pool(scores, target)
    assert pooled.dtype == torch.float64
    torch.testing.assert_close(pooled, expected.double(), rtol=1e-6, atol=1e-5)
    assert pooled.numel() == block.count(target)
    assert pooled.numel() * block.rows * block.columns == scores.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_blocks_of_half_precision_are_summed_in_float32(dtype):
    target = Target("w.weight", nn.Linear(512, 64, bias=False).weight, (0, 1))
    pooled = Block(64, 512).pool(torch.full((64, 512), 4.0, dtype=dtype), target)
    assert pooled.dtype == torch.float32
    assert pooled.tolist() == [[131_072.0]]  # Beyond float16's range.


@KINDS
@BLOCKS
def test_a_mask_of_blocks_spreads_over_their_weights_and_back(target, block):
    positions = blocks(target, block)
    generator = torch.Generator().manual_seed(0)
    block_mask = torch.rand(len(positions), len(positions[0]), generator=generator) < 0.5
    expected = torch.ones(target.weight.shape, dtype=torch.bool)
    for row, row_mask in zip(positions, block_mask.tolist(), strict=True):
        for block_positions, keep in zip(row, row_mask, strict=True):
            for position in block_positions:
                expected[position] = keep
    mask = block.spread(block_mask, target)
    assert torch.equal(mask, expected)
    assert mask.is_contiguous()
    assert torch.equal(block.pool_mask(mask, target), block_mask)


@pytest.mark.parametrize("flipped", [(0, 0), (3, 7), (5, 2)])
@pytest.mark.parametrize("start", [True, False])
def test_a_block_that_is_masked_in_part_is_an_error(flipped, start):
    target = Target("layer.weight", nn.Linear(8, 8, bias=False).weight, (0, 1))
    mask = torch.full((8, 8), start)
    assert bool(Block(4, 2).pool_mask(mask, target).all()) == start
    mask[flipped] = not start
    message = (
        r"the zeros of 'layer' are not whole blocks of 4x2\. "
        r"Start without hold_zeros, or choose another granularity\."
    )
    with pytest.raises(ValueError, match=message):
        Block(4, 2).pool_mask(mask, target)


def test_blocks_have_to_tile_every_target():
    targets = [
        TARGETS["linear"],
        Target("wide.weight", nn.Linear(10, 8).weight, (0, 1)),
        Target("tall.weight", Conv1D(10, 8).weight, (1, 0)),
        Target("conv.weight", nn.Conv2d(3, 8, 4).weight, (2, 3, 0, 1)),
        # 4 · 6 rows in all, but a block may not reach from one expert into the next.
        Target("experts.up_proj", experts(4, 6, 8), (0, 1, 2)),
    ]
    message = (
        r"^block:4x4 needs out_features divisible by 4 and in_features divisible by 4; 'wide' is 8 x 10, "
        r"'tall' is 10 x 8, 'conv' is 8 x 3, 'experts\.up_proj' is 6 x 8\. "
        r"Add to exclude_modules, or choose another block\.$"
    )
    with pytest.raises(ValueError, match=message):
        Block(4, 4).check(targets)
