import random
import re

import pytest

from common.stories import ENDINGS, HABITS, OPENINGS, PLOTS, SIGHTS, split_of, tell, tell_stories


def passages(split: str, seed: int, stories: int = 300) -> list[str]:
    rng = random.Random(seed)
    return [passage for _ in range(stories) for passage in tell(rng, split)]


def test_same_seed_same_stories() -> None:
    assert tell_stories(100, seed=1) == tell_stories(100, seed=1)
    assert tell_stories(100, seed=1)["train"] != tell_stories(100, seed=2)["train"]


def test_more_training_stories_leave_the_other_splits_alone() -> None:
    few, many = tell_stories(100, seed=0), tell_stories(119, seed=0)
    assert few["test"] == many["test"]
    assert few["validation"] == many["validation"]
    assert (len(few["train"]), len(many["train"])) == (90, 109)


def test_no_passage_is_in_two_splits_whatever_the_seeds() -> None:
    train, validation, test = (set(passages(s, seed)) for seed, s in enumerate(("train", "validation", "test")))
    assert len(train) > 1000
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_the_passages_of_a_split_are_what_its_stories_are_made_of() -> None:
    story = tell_stories(100, seed=0)["test"][0]
    told = tell(random.Random("0 test"), "test")
    assert story == " ".join(told)
    assert {split_of(passage) for passage in told} == {"test"}


def test_every_split_uses_every_template() -> None:
    plots = [templates for plot in PLOTS for templates in plot]
    for split in ("train", "validation", "test"):
        told = passages(split, seed=0, stories=400)
        for template in (t for templates in (OPENINGS, HABITS, *plots, SIGHTS, ENDINGS) for t in templates):
            pattern = re.compile(re.sub(r"\\\{\w+\\\}", ".+", re.escape(template)))
            assert any(pattern.fullmatch(passage) for passage in told), (split, template)


def test_stories_are_english() -> None:
    text = " ".join(tell_stories(500, seed=0)["train"])
    assert not re.search(r"\ba [aeiou]", text)
    assert not re.search(r"[{}]|  ", text)
    assert not re.search(r"[.!?] [a-z]", re.sub(r"\"[^\"]*\"", "", text))


def test_stories_are_rich() -> None:
    stories = tell_stories(2000, seed=0)["train"]
    told = passages("train", seed=0)
    assert len(set(stories)) == len(stories)
    assert len(set(told)) > 0.98 * len(told)


def test_too_few_stories() -> None:
    with pytest.raises(ValueError, match="num_stories must be at least 100, got 99"):
        tell_stories(99, seed=0)
