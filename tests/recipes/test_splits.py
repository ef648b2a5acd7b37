import pytest
from datasets import Dataset, DatasetDict

from common.splits import SplitArguments, three_splits


def numbers(start: int, stop: int) -> Dataset:
    return Dataset.from_dict({"n": list(range(start, stop))})


def sizes(splits: DatasetDict) -> dict[str, int]:
    return {name: len(split) for name, split in splits.items()}


def test_what_is_there_stays() -> None:
    data = DatasetDict(train=numbers(0, 5), validation=numbers(5, 7), test=numbers(7, 10))
    splits = three_splits(data, SplitArguments(), seed=0)
    assert {name: split["n"][:] for name, split in splits.items()} == {
        "train": [0, 1, 2, 3, 4],
        "validation": [5, 6],
        "test": [7, 8, 9],
    }


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"train": 100}, {"train": 64, "validation": 20, "test": 16}),
        ({"train": 100, "test": 7}, {"train": 80, "validation": 20, "test": 7}),
        ({"train": 100, "validation": 7}, {"train": 80, "validation": 7, "test": 20}),
        ({"train": 20_000}, {"train": 16_000, "validation": 2_000, "test": 2_000}),
        ({"train": 100, "extra": 3, "test": 7}, {"train": 80, "validation": 20, "test": 7}),
    ],
)
def test_missing_splits_come_out_of_train(given: dict[str, int], expected: dict[str, int]) -> None:
    starts = {"train": 0, "validation": 50_000, "test": 60_000, "extra": 70_000}
    data = DatasetDict({name: numbers(starts[name], starts[name] + size) for name, size in given.items()})
    splits = three_splits(data, SplitArguments(), seed=0)
    assert sizes(splits) == expected
    everything = [n for split in splits.values() for n in split["n"]]
    assert len(set(everything)) == len(everything)


def test_the_seed_decides() -> None:
    data = DatasetDict(train=numbers(0, 100))
    first, again, other = (three_splits(data, SplitArguments(), seed=seed)["test"]["n"][:] for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_limits() -> None:
    data = DatasetDict(train=numbers(0, 1000))
    splits = three_splits(data, SplitArguments(max_train_samples=50, max_eval_samples=30), seed=0)
    assert sizes(splits) == {"train": 50, "validation": 30, "test": 30}
    assert max(splits["train"]["n"]) > 500  # not the first ones, which in an image folder are of one class


def test_limits_above_what_there_is_change_nothing() -> None:
    data = DatasetDict(train=numbers(0, 100))
    limited = three_splits(data, SplitArguments(max_train_samples=500, max_eval_samples=500), seed=0)
    assert limited["train"]["n"][:] == three_splits(data, SplitArguments(), seed=0)["train"]["n"][:]


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"must have a split 'train', got \['dev'\]"):
        three_splits(DatasetDict(dev=numbers(0, 9)), SplitArguments(), seed=0)
    with pytest.raises(ValueError, match="train has 4 examples, too few to split validation off: at least 5"):
        three_splits(DatasetDict(train=numbers(0, 4)), SplitArguments(), seed=0)
    with pytest.raises(ValueError, match="max_eval_samples must be at least 1, got 0"):
        three_splits(DatasetDict(train=numbers(0, 9)), SplitArguments(max_eval_samples=0), seed=0)
