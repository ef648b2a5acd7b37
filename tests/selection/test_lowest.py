import functools
import itertools

import pytest
import torch

from hf_prune.selection import lowest as selection
from hf_prune.selection.lowest import drop_lowest
from tests.processes import on_two_processes

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def full_sort(tensors: list[torch.Tensor], k: int) -> list[torch.Tensor]:
    """The oracle: everything in one tensor, sorted stably."""
    dtype = functools.reduce(torch.promote_types, [t.dtype for t in tensors])
    order = torch.cat([t.flatten().to(dtype) for t in tensors]).argsort(stable=True)
    kept = torch.ones(len(order), dtype=torch.bool)
    kept[order[:k]] = False
    parts = kept.split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]


def check(tensors: list[torch.Tensor]) -> None:
    total = sum(t.numel() for t in tensors)
    for k in {0, 1, 2, total // 3, total // 2, total - 1, total} & set(range(total + 1)):
        masks = drop_lowest({str(i): lambda t=t: t for i, t in enumerate(tensors)}, k)
        for mask, expected in zip(masks.values(), full_sort(tensors, k), strict=True):
            assert torch.equal(mask, expected)


SHAPES = [(7, 13), (301,), (1,), (3, 5, 2)]
KINDS = {
    "signed": lambda t: t,
    "non-negative": lambda t: t.abs(),
    "many ties": lambda t: (2 * t).round(),
    "all equal": torch.ones_like,
    "all zero": torch.zeros_like,
    "zeros of both signs": lambda t: torch.where(t > 0, 0.0, -0.0),
    "mostly zero": lambda t: torch.where(t > 1, t, 0.0),
    "infinite": lambda t: torch.where(t > 1, torch.inf, torch.where(t < -1, -torch.inf, t)),
    "close together": lambda t: 1 + t * 1e-6,
}


# Digit after digit to the last one, until a few are left, and after the first digit.
@pytest.mark.parametrize("sorted_share", [0, selection._SORTED_SHARE, 1])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_a_full_sort(dtype, kind, sorted_share, monkeypatch):
    monkeypatch.setattr(selection, "_SORTED_SHARE", sorted_share)
    torch.manual_seed(0)
    check([KINDS[kind](torch.randn(shape)).to(dtype) for shape in SHAPES])


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormals(dtype):
    torch.manual_seed(0)
    smallest = torch.finfo(dtype).smallest_normal / 64
    tensors = [(torch.randn(shape, dtype=torch.float64) * smallest).to(dtype) for shape in SHAPES]
    assert any(0 < t.abs().max() < torch.finfo(dtype).smallest_normal for t in tensors)
    check(tensors)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_element_and_none(dtype):
    check([torch.tensor([0.5], dtype=dtype)])
    check([torch.tensor([0.5], dtype=dtype), torch.empty(0, 3, dtype=dtype)])


def test_mixed_dtypes_are_not_cast_down():
    torch.manual_seed(0)
    check([torch.randn(50).to(dtype) for dtype in DTYPES])
    # Equal in float32, and in float16 even more so.
    close = torch.tensor([1.0, 1.0 + 1e-12, 1.0 - 1e-12], dtype=torch.float64)
    check([close, torch.ones(2, dtype=torch.float16)])


@pytest.mark.parametrize("sorted_share", [0, 1])
def test_several_chunks(sorted_share, monkeypatch):
    monkeypatch.setattr(selection, "_CHUNK", 8)
    monkeypatch.setattr(selection, "_SORTED_SHARE", sorted_share)
    torch.manual_seed(0)
    check([(2 * torch.randn(shape)).round() for shape in SHAPES])
    check([torch.randn(shape) for shape in SHAPES])


def test_non_contiguous_scores():
    torch.manual_seed(0)
    check([torch.randn(13, 7).T, torch.randn(20)[::2]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_dropped_stays_dropped_whatever_its_score(dtype):
    torch.manual_seed(0)
    tensors = {name: torch.randn(40).to(dtype) for name in "abc"}
    tensors["a"][:10] = -torch.inf
    kept = {"a": torch.rand(40) > 0.3, "c": torch.rand(40) > 0.3}
    dropped = sum(int((~mask).sum()) for mask in kept.values())
    scores = {name: lambda t=t: t for name, t in tensors.items()}
    for k in (dropped, dropped + 1, 80, 120):
        masks = drop_lowest(scores, k, kept)
        assert sum(int((~mask).sum()) for mask in masks.values()) == k
        for name, mask in kept.items():
            assert not (masks[name] & ~mask).any()
    # The new ones are the lowest of the others.
    lowest = [torch.where(kept.get(n, torch.tensor(True)), t.double(), -torch.inf) for n, t in tensors.items()]
    infinite = tensors["a"] == -torch.inf
    lowest[0][infinite & kept["a"]] = -1e300
    for mask, expected in zip(drop_lowest(scores, 80, kept).values(), full_sort(lowest, 80), strict=True):
        assert torch.equal(mask, expected)


def test_scores_are_computed_one_tensor_at_a_time():
    alive = []

    def compute(i: int) -> torch.Tensor:
        assert sum(reference() is not None for reference in alive) <= 1
        scores = torch.full((10,), float(i))
        import weakref

        alive.append(weakref.ref(scores))
        return scores

    drop_lowest({str(i): functools.partial(compute, i) for i in range(20)}, 90)
    assert len(alive) >= 60


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_nan_is_an_error_that_names_the_tensor(dtype, sign):
    bad = torch.ones(5, dtype=dtype)
    bad[3] = torch.copysign(torch.tensor(torch.nan), torch.tensor(float(sign)))
    with pytest.raises(ValueError, match=r"1 of the 5 scores of 'layer\.1\.weight' are NaN"):
        drop_lowest({"layer.0.weight": lambda: torch.ones(5), "layer.1.weight": lambda: bad}, 2)


def test_other_dtypes_are_an_error():
    with pytest.raises(ValueError, match=r"the scores of 'w' have dtype torch\.int64; scores must be one of float16"):
        drop_lowest({"w": lambda: torch.arange(3)}, 1)


@pytest.mark.parametrize("k", [-1, 4])
def test_a_count_out_of_range_is_an_error(k):
    with pytest.raises(ValueError, match=rf"k must be in \[0, 3\], the number of scores; got {k}"):
        drop_lowest({"w": lambda: torch.ones(3)}, k)


@pytest.mark.parametrize(
    ("again", "k", "message"),
    [
        (
            torch.tensor([1.0, 2.0, 3.0]),
            2,
            r"^\(3,\) instead of \(4,\) scores of 'a': the criterion gave other scores",
        ),
        (torch.tensor([1.0, 2.0, torch.nan, 4.0]), 3, "the criterion gave other scores when it was called again"),
        (torch.tensor([4.0, 4.0, 4.0, 4.0]), 1, "the criterion gave other scores when it was called again"),
    ],
)
def test_scores_that_are_others_when_asked_again_are_an_error(again, k, message):
    given = itertools.chain([torch.tensor([1.0, 2.0, 3.0, 4.0])], itertools.repeat(again))
    with pytest.raises(ValueError, match=message):
        drop_lowest({"a": lambda: next(given)}, k)


def whole_tensors() -> dict[str, dict[str, torch.Tensor]]:
    """For each kind of numbers and dtype: tensors of which two processes have uneven shards, and of one none."""
    torch.manual_seed(0)
    return {
        f"{kind}, {dtype}": {str(shape): change(torch.randn(shape)).to(dtype) for shape in SHAPES}
        for kind, change in KINDS.items()
        for dtype in DTYPES
    }


def in_shards(tensors: dict[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """What a process has: of the first dimension the first half, rounded up, or the rest."""
    halves = {name: (len(tensor) + 1) // 2 for name, tensor in tensors.items()}
    return {n: t[: halves[n]] if rank == 0 else t[halves[n] :] for n, t in tensors.items()}


def kept_before(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A tenth is gone before."""
    return {name: torch.arange(t.numel()).view(t.shape) % 10 != 3 for name, t in tensors.items()}


def select_from_shards(rank: int) -> dict[str, dict[str, torch.Tensor]]:
    found = {}
    for label, tensors in whole_tensors().items():
        shards, kept = in_shards(tensors, rank), in_shards(kept_before(tensors), rank)
        for share in (0, 0.01, 0.3, 0.5, 0.9, 1):
            k = round(share * sum(t.numel() for t in tensors.values()))
            scores = {name: lambda t=t: t for name, t in shards.items()}
            found[f"{label}, {k}"] = drop_lowest(scores, k, kept, sharded=True)
    return found


@pytest.mark.multiprocess
def test_of_shards_go_what_goes_of_whole_tensors(tmp_path):
    first, second = on_two_processes(select_from_shards, tmp_path)
    assert in_shards(whole_tensors()["signed, torch.float32"], 1)["(1,)"].numel() == 0
    for label, tensors in whole_tensors().items():
        cases = [case for case in first if case.startswith(f"{label}, ")]
        assert len(cases) == 6
        for case in cases:
            scores = {name: lambda t=t: t for name, t in tensors.items()}
            whole = drop_lowest(scores, int(case.split(", ")[-1]), kept_before(tensors))
            for name, mask in whole.items():
                assert torch.equal(torch.cat([first[case][name], second[case][name]]), mask), (case, name)
