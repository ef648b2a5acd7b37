"""A tokenizer of words, and text for it."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = [*"abcdefghijklmnopqrstuvwxyz", "ä", "the", "fox"]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Knows `WORDS`, has no special tokens around a text, and fits into the vocabulary of tiny models."""
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
