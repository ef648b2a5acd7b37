"""Text: built-in stories, Python's help topics, text files, or a dataset with a text column, cut into blocks."""

from pathlib import Path
from pydoc_data.topics import topics

from datasets import Dataset, DatasetDict, load_dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.sources import load, local_path
from common.stories import tell_stories


def load_texts(dataset: str, num_stories: int, seed: int) -> DatasetDict:
    """Loads the splits that `dataset` has, each with the column `text`.

    Args:
        dataset: "stories", "topics", a `.txt` file, a folder with train.txt (and validation.txt, test.txt), another
            folder that `datasets` can read, or a name on the Hub.
        num_stories: Number of stories to make for "stories".
        seed: Seed of the stories.

    Raises:
        ValueError: There is no such dataset, or it has no column `text`.
    """
    if dataset == "stories":
        stories = tell_stories(num_stories, seed)
        return DatasetDict({split: Dataset.from_dict({"text": texts}) for split, texts in stories.items()})
    if dataset == "topics":
        return DatasetDict(train=Dataset.from_dict({"text": help_topics()}))
    path = local_path(dataset, built_in="'stories', 'topics'")
    if path and (path.is_file() or any(path.glob("*.txt"))):
        return _load_text_files(path)
    data = load(str(path or dataset))
    for split, rows in data.items():
        if "text" not in rows.column_names:
            raise ValueError(f"{dataset} must have a column 'text', but {split} has {rows.column_names}. Rename one.")
    return data.select_columns("text")


def help_topics() -> list[str]:
    """The topics of Python's `help()`, without any paragraph that an earlier topic has.

    The chapter on compound statements repeats those on each statement: without this, test text would be trained on.
    """
    seen: set[str] = set()
    texts = []
    for _, topic in sorted(topics.items()):
        paragraphs = [p for p in topic.strip().split("\n\n") if p.strip() not in seen]
        seen.update(p.strip() for p in paragraphs)
        if paragraphs:
            texts.append("\n\n".join(paragraphs))
    return texts


def _load_text_files(path: Path) -> DatasetDict:
    if path.is_file():
        files = {"train": str(path)}
    else:
        names = ("train", "validation", "test")
        files = {name: str(path / f"{name}.txt") for name in names if (path / f"{name}.txt").exists()}
    if "train" not in files:
        found = sorted(file.name for file in path.glob("*.txt"))
        raise ValueError(f"{path} must have a train.txt (and may have validation.txt, test.txt), found {found}.")
    # Paragraphs, not lines, are the documents that a split is made of: neighbouring lines belong together.
    return load_dataset("text", data_files=files, sample_by="paragraph")


def cut_blocks(texts: DatasetDict, tokenizer: PreTrainedTokenizerBase, block_size: int) -> DatasetDict:
    """Joins the texts of each split, an end-of-text token behind each, and cuts blocks for a language model.

    Returns:
        Splits with `input_ids` and `labels`, both `[block_size]`. What is left over behind the last block of a
        thousand texts is dropped.

    Raises:
        ValueError: A split is too short for one block, or the block for one prediction.
    """
    if block_size < 2:
        raise ValueError(f"block_size must be at least 2, a token and the next one, got {block_size}.")

    # An encoder's tokenizer puts its own token behind each text.
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def cut(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = [i for text in tokenizer(batch["text"])["input_ids"] for i in [*text, *end]]
        blocks = [ids[i : i + block_size] for i in range(0, len(ids) - block_size + 1, block_size)]
        return {"input_ids": blocks, "labels": blocks}

    blocks = texts.map(cut, batched=True, remove_columns=["text"], desc="Tokenising")
    for split, rows in blocks.items():
        if not len(rows):
            raise ValueError(
                f"{split} has {len(texts[split])} texts, which do not fill one block of {block_size} tokens. "
                "Give more text or a smaller --block_size."
            )
    return blocks


def continue_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The prompt and the forty tokens that the model finds most likely to come next, or as many as it has room for."""
    room = getattr(model.config, "max_position_embeddings", 1024)
    inputs = tokenizer(prompt, return_tensors="pt", truncation=True, max_length=room - 1).to(model.device)
    new = min(40, room - inputs["input_ids"].shape[1])
    output = model.eval().generate(**inputs, max_new_tokens=new, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))
