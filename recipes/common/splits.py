"""Three splits from what a dataset has: train trains, validation steers, test decides nothing."""

from dataclasses import dataclass, field

from datasets import DatasetDict

HELD_OUT = 0.2
HELD_OUT_AT_MOST = 2000


@dataclass
class SplitArguments:
    """How much of each split is used."""

    max_train_samples: int | None = field(
        default=None, metadata={"help": "Use at most this many training examples, drawn with the seed."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Use at most this many validation and test examples each."}
    )


def three_splits(data: DatasetDict, args: SplitArguments, seed: int) -> DatasetDict:
    """The splits train, validation and test of `data`; a missing one is split off from train: a fifth, at most 2,000.

    Raises:
        ValueError: There is no train split, or it is too small to split, or no examples would be left.
    """
    for argument in ("max_train_samples", "max_eval_samples"):
        if (limit := getattr(args, argument)) is not None and limit < 1:
            raise ValueError(f"{argument} must be at least 1, got {limit}. Leave it out to use all examples.")
    if "train" not in data:
        raise ValueError(f"the dataset must have a split 'train', got {sorted(data)}. Rename one of them.")
    splits = {"train": data["train"]}
    for name in ("validation", "test"):
        if name in data:
            splits[name] = data[name]
            continue
        held_out = min(HELD_OUT_AT_MOST, int(HELD_OUT * len(splits["train"])))
        if not held_out:
            raise ValueError(
                f"train has {len(splits['train'])} examples, too few to split {name} off: at least "
                f"{1 / HELD_OUT:.0f} are needed. Give more data, or a {name} split of its own."
            )
        parts = splits["train"].train_test_split(test_size=held_out, seed=seed)
        splits["train"], splits[name] = parts["train"], parts["test"]
    for name, split in splits.items():
        limit = args.max_train_samples if name == "train" else args.max_eval_samples
        if limit is not None and limit < len(split):
            # Shuffled, because image folders come class by class.
            splits[name] = split.shuffle(seed=seed).select(range(limit))
    return DatasetDict(splits)
