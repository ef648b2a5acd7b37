"""Prunes a language model while it trains: by default a small GPT-Neo on small stories, with nothing to download.

accelerate launch recipes/tinystories.py
accelerate launch recipes/tinystories.py --sparsity 0.8 --schedule one_shot
accelerate launch recipes/tinystories.py --model_name_or_path roneneldan/TinyStories-33M \
    --dataset roneneldan/TinyStories --max_steps 5000
"""

from dataclasses import dataclass, field, replace

from accelerate import PartialState
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from common.arguments import parse
from common.dense import DenseArguments, dense_model
from common.report import DenseTest, end, report
from common.splits import SplitArguments, three_splits
from common.task import Task
from common.text import continue_text, cut_blocks, load_texts
from common.tokenizer import train_tokenizer
from hf_prune import PruningTrainerCallback
from hf_prune.metrics import perplexity_metrics

DEFAULTS = {
    "output_dir": "output/tinystories",
    "metric_for_best_model": "perplexity",
    "greater_is_better": False,
    "dense_steps": 600,
}
SMALL_MODEL = {
    "learning_rate": 2e-3,
    "warmup_steps": 0.1,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 32,
}
PRUNING = {"sparsity": 0.9}
STUDY = {"block_size": 64, "num_stories": 10000, "max_eval_samples": 100, "dense_steps": 3000}


@dataclass
class ScriptArguments(SplitArguments, DenseArguments):
    """Which text, which model."""

    dataset: str = field(
        default="stories",
        metadata={"help": "stories, topics, a .txt file, a folder with train.txt, or a dataset of the Hub."},
    )
    # 600 steps an epoch, so that the cuts of the default run fall on evaluations.
    num_stories: int = field(default=5416, metadata={"help": "Number of stories that --dataset stories makes."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or Hub name of a pretrained model; a small GPT-Neo if left out."}
    )
    train_dense: bool = field(default=False, metadata={"help": "Fine-tune a pretrained model before it is pruned."})
    vocab_size: int = field(default=1024, metadata={"help": "Number of tokens of the small model."})
    block_size: int = field(default=128, metadata={"help": "Number of tokens of a training example."})


def small_gpt_neo(tokenizer: PreTrainedTokenizerBase, block_size: int) -> GPTNeoForCausalLM:
    """A GPT-Neo with about one million random weights."""
    return GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            num_layers=4,
            num_heads=4,
            attention_types=[[["global", "local"], 2]],
            window_size=64,
            activation_function="gelu",  # one kernel, where GPT-Neo's own gelu_new is eight
            max_position_embeddings=block_size,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def load_task(script: ScriptArguments, training: TrainingArguments) -> Task:
    """Text in three splits, and the model that is to be pruned."""
    with training.main_process_first():  # so that the others find what `datasets` has cached
        texts = load_texts(script.dataset, script.num_stories, training.seed)
        texts = three_splits(texts, script, training.seed)
        if script.model_name_or_path:
            tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
        else:
            tokenizer = train_tokenizer(texts["train"]["text"], script.vocab_size)
        blocks = cut_blocks(texts, tokenizer, script.block_size)

    def make_model() -> PreTrainedModel:
        if not script.model_name_or_path:
            return small_gpt_neo(tokenizer, script.block_size)
        model = AutoModelForCausalLM.from_pretrained(script.model_name_or_path, dtype="float32")
        if script.block_size > (longest := getattr(model.config, "max_position_embeddings", script.block_size)):
            raise ValueError(f"block_size must be at most {longest} for this model, got {script.block_size}.")
        return model

    compute_metrics, preprocess_logits_for_metrics = perplexity_metrics()
    trainer_kwargs = {
        "train_dataset": blocks["train"],
        "eval_dataset": blocks["validation"],
        "data_collator": default_data_collator,
        "processing_class": tokenizer,
        "compute_metrics": compute_metrics,
        "preprocess_logits_for_metrics": preprocess_logits_for_metrics,
    }
    has_dense_model = bool(script.model_name_or_path) and not script.train_dense
    return Task(make_model, has_dense_model, trainer_kwargs, blocks["test"])


def main() -> None:
    """Text, dense model, pruning, report."""
    script, pruning, training = parse(ScriptArguments, DEFAULTS, SMALL_MODEL, PRUNING)
    set_seed(training.seed)
    task = load_task(script, training)
    model = dense_model(task, script, training)
    training = replace(training)  # Made anew, because with DeepSpeed accelerate takes what was made last.

    dense, callback = DenseTest(task.test), PruningTrainerCallback(pruning)
    trainer = Trainer(model, training, callbacks=[dense, callback], **task.trainer_kwargs)
    dense.predict = trainer.predict
    callback.evaluate = trainer.evaluate
    callback.log = trainer.log

    tokenizer = task.trainer_kwargs["processing_class"]
    prompt = " ".join(tokenizer.decode(task.test[0]["input_ids"]).split()[:8])
    dense_story = continue_text(model, tokenizer, prompt)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    report(trainer, callback, dense)
    story = continue_text(model, tokenizer, prompt)
    PartialState().print(f"\nStory before: {dense_story}\n\nStory after: {story}")
    end(trainer)


if __name__ == "__main__":
    main()
