from pathlib import Path

import pytest
from transformers import AutoTokenizer, GPTNeoConfig

from common.tokenizer import END, train_tokenizer

TEXTS = ["Once upon a time, there was a fox.", "Once upon a time, there was a bear.", "The end."] * 5


def test_any_text_comes_back_the_same() -> None:
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    for text in ("Once upon a time", "naïve – 狐 🦊\n\t  two  spaces", ""):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_size_and_end_of_text() -> None:
    tokenizer = train_tokenizer(TEXTS, vocab_size=280)
    assert len(tokenizer) == 280
    assert tokenizer.eos_token == tokenizer.pad_token == END
    assert tokenizer(f"a{END}")["input_ids"][-1] == tokenizer.eos_token_id
    assert len(tokenizer("Once upon a time")["input_ids"]) < len("Once upon a time")


def test_same_texts_same_tokenizer() -> None:
    first, again = (train_tokenizer(TEXTS, vocab_size=300) for _ in range(2))
    assert first.get_vocab() == again.get_vocab()


def test_a_saved_tokenizer_loads_as_any_other(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    tokenizer.save_pretrained(tmp_path)
    GPTNeoConfig().save_pretrained(tmp_path)  # the model's config beside it must not make it another tokenizer
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "Once upon a time, 狐 was there."
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert loaded.eos_token_id == tokenizer.eos_token_id


def test_too_small() -> None:
    with pytest.raises(ValueError, match="vocab_size must be above 256, the number of bytes, got 256"):
        train_tokenizer(TEXTS, vocab_size=256)
