from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from common.splits import SplitArguments, three_splits
from common.text import continue_text, cut_blocks, help_topics, load_texts
from common.tokenizer import train_tokenizer


def load(dataset: object) -> DatasetDict:
    return load_texts(str(dataset), num_stories=100, seed=0)


def test_stories() -> None:
    assert {name: len(split) for name, split in load("stories").items()} == {"train": 90, "validation": 5, "test": 5}


def test_no_paragraph_of_the_topics_is_in_two_splits() -> None:
    assert sum(len(topic) for topic in help_topics()) > 200_000
    splits = three_splits(load("topics"), SplitArguments(), seed=0)
    counts = Counter(
        paragraph
        for split in splits.values()
        for paragraph in {p.strip() for topic in split["text"] for p in topic.split("\n\n")}
    )
    assert len(counts) > 1000
    assert counts.most_common(1)[0][1] == 1


def test_a_text_file_is_split_into_paragraphs(tmp_path: Path) -> None:
    (tmp_path / "all.txt").write_text("\n\n".join(f"Line {i}.\nMore of {i}." for i in range(20)), encoding="utf-8")
    data = load(tmp_path / "all.txt")
    assert data["train"]["text"][3] == "Line 3.\nMore of 3."
    assert {k: len(v) for k, v in three_splits(data, SplitArguments(), seed=0).items()} == {
        "train": 13,
        "validation": 4,
        "test": 3,
    }


def test_a_text_file_of_one_paragraph(tmp_path: Path) -> None:
    (tmp_path / "all.txt").write_text("one\ntwo\nthree", encoding="utf-8")
    with pytest.raises(ValueError, match="train has 1 examples, too few to split validation off"):
        three_splits(load(tmp_path / "all.txt"), SplitArguments(), seed=0)


def test_a_folder_of_text_files(tmp_path: Path) -> None:
    for name in ("train", "validation", "test"):
        (tmp_path / f"{name}.txt").write_text(f"{name} one\n\n{name} two", encoding="utf-8")
    (tmp_path / "notes.txt").write_text("not data", encoding="utf-8")
    assert {name: split["text"][:] for name, split in load(tmp_path).items()} == {
        name: [f"{name} one", f"{name} two"] for name in ("train", "validation", "test")
    }


def test_a_folder_of_other_text_files(tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text("Once.", encoding="utf-8")
    with pytest.raises(ValueError, match=r"must have a train.txt .* found \['story.txt'\]"):
        load(tmp_path)


def test_a_folder_as_the_hub_keeps_tinystories(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("train", "validation"):
        rows = Dataset.from_dict({"text": [f"{name} {i}" for i in range(10)], "extra": list(range(10))})
        rows.to_parquet(str(tmp_path / "data" / f"{name}-00000-of-00001.parquet"))
    data = load(tmp_path)
    assert data["validation"]["text"][0] == "validation 0"
    assert data["train"].column_names == ["text"]
    assert sorted(three_splits(data, SplitArguments(), seed=0)) == ["test", "train", "validation"]


def test_a_dataset_without_text(tmp_path: Path) -> None:
    Dataset.from_dict({"story": ["a"]}).to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(ValueError, match=r"must have a column 'text', but train has \['story'\]"):
        load(tmp_path)


def test_an_unknown_dataset() -> None:
    with pytest.raises(ValueError, match=r"dataset must be 'stories', 'topics'.*got 'storys'"):
        load("storys")


def blocks_of(texts: list[str], block_size: int) -> tuple[DatasetDict, list[int]]:
    tokenizer = train_tokenizer(texts, vocab_size=300)
    ids = [i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    return cut_blocks(DatasetDict(train=Dataset.from_dict({"text": texts})), tokenizer, block_size), ids


def test_blocks_are_the_text_in_a_row() -> None:
    blocks, ids = blocks_of([f"Story number {i} is short." for i in range(50)], block_size=16)
    rows = blocks["train"]["input_ids"][:]
    assert {len(row) for row in rows} == {16}
    assert [i for row in rows for i in row] == ids[: len(ids) // 16 * 16]
    assert blocks["train"]["labels"][:] == rows
    assert blocks["train"].column_names == ["input_ids", "labels"]


def test_text_that_fills_exactly_one_block() -> None:
    _, ids = blocks_of(["A very short text."], block_size=2)
    blocks, _ = blocks_of(["A very short text."], block_size=len(ids))
    assert blocks["train"]["input_ids"][:] == [ids]
    with pytest.raises(ValueError, match=f"train has 1 texts, which do not fill one block of {len(ids) + 1} tokens"):
        blocks_of(["A very short text."], block_size=len(ids) + 1)


def test_blocks_without_a_prediction() -> None:
    with pytest.raises(ValueError, match=r"block_size must be at least 2.*got 1"):
        blocks_of(["A very short text."], block_size=1)


@pytest.mark.parametrize("positions", [2, 20, 2048])
def test_a_model_continues_the_prompt_as_far_as_it_has_room(positions: int) -> None:
    tokenizer = train_tokenizer(["Once upon a time, there was a fox."], vocab_size=280)
    model = GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=280, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global"], 2]],
            max_position_embeddings=positions,
        )
    )  # fmt: skip
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    text = continue_text(model.train(), tokenizer, "Once upon")
    assert text == continue_text(model, tokenizer, "Once upon")
    if positions > 2:
        assert text.startswith("Once upon")
        assert len(text) > len("Once upon")
