"""Masked language modelling: an encoder and text, a task of `criteria.py`.

python recipes/criteria.py masked_language --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 --dataset topics

A head that the checkpoint does not have is new, so the model is trained before it is pruned. Loss is that of the
masked tokens; which ones these are is drawn once.
"""

from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    TrainingArguments,
    default_data_collator,
)

from common.dense import DenseArguments
from common.splits import SplitArguments, three_splits
from common.task import Task
from common.text import cut_blocks, load_texts

DEFAULTS = {"metric_for_best_model": "loss", "greater_is_better": False, "learning_rate": 1e-4, "warmup_steps": 0.1}
SMALL_MODEL: dict[str, object] = {}
STUDY = {"dense_steps": 1000}


@dataclass
class ScriptArguments(SplitArguments, DenseArguments):
    """Which text, which model."""

    dataset: str = field(
        default="topics", metadata={"help": "topics, a .txt file, a folder with train.txt, or a dataset of the Hub."}
    )
    model_name_or_path: str | None = field(default=None, metadata={"help": "Folder or Hub name of an encoder."})
    block_size: int = field(default=64, metadata={"help": "Number of tokens of an example."})
    masked: float = field(default=0.15, metadata={"help": "The fraction of tokens that is to be guessed."})


def load_task(script: ScriptArguments, training: TrainingArguments) -> Task:
    """Text in three splits, some of its tokens masked, and the encoder."""
    if script.model_name_or_path is None:
        raise ValueError("masked_language has no small model: give --model_name_or_path.")
    name = script.model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(name)
    with training.main_process_first():  # so that the others find what `datasets` has cached
        texts = three_splits(load_texts(script.dataset, 0, training.seed), script, training.seed)
        blocks = cut_blocks(texts, tokenizer, script.block_size)
        splits = {split: _masked(rows, tokenizer, script.masked, training.seed) for split, rows in blocks.items()}

    def make_model() -> PreTrainedModel:
        return AutoModelForMaskedLM.from_pretrained(name, dtype="float32")

    trainer_kwargs = {
        "train_dataset": splits["train"],
        "eval_dataset": splits["validation"],
        "data_collator": default_data_collator,
        "processing_class": tokenizer,
    }
    return Task(make_model, False, trainer_kwargs, splits["test"])


def _masked(rows: Dataset, tokenizer: Any, fraction: float, seed: int) -> Dataset:
    """Rows with some of their tokens masked, as BERT was trained, and these as labels."""
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=fraction, seed=seed)

    def mask(batch: dict[str, list[list[int]]]) -> dict[str, Any]:
        found = collator([{"input_ids": ids} for ids in batch["input_ids"]])
        return {name: found[name].tolist() for name in ("input_ids", "labels")}

    return rows.map(mask, batched=True, desc="Masking")
