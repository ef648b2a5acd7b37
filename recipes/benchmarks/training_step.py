"""Time of a training step while masks are held, against a dense step and against torch.nn.utils.prune.

python recipes/benchmarks/training_step.py

Three Trainers take turns in one process, each with its own copy of a GPT-Neo with 29 million parameters: dense, under
PruningTrainerCallback, and under torch.nn.utils.prune, the latter two at the same 80 % sparsity. A turn is a `train()`
of one step with 8 samples of 256 tokens. What is measured is that step, from `on_step_begin` to `on_step_end`:
forward, backward, clipping, AdamW, callbacks. A first turn of each warms up and does not count.

seconds     median of the turns
ratio       median of each turn's time divided by that of the dense turn right beside it, so that what else the
            machine does cancels out
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from typing import Any

import torch
from selection import gpt_neo, prune_with_torch
from transformers import GPTNeoForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from hf_prune import PruningConfig, PruningTrainerCallback

SAMPLES, TOKENS = 8, 256
BARS = {"dense": "", "hf_prune": "at most 1.02", "torch.nn.utils.prune": "above hf_prune"}


class Stopwatch(TrainerCallback):
    """Comes after all other callbacks, so that what they do at the end of a step counts as part of it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def trainer_of(model: GPTNeoForCausalLM, folder: str, *callbacks: TrainerCallback) -> Trainer:
    tokens = torch.randint(model.config.vocab_size, (SAMPLES, TOKENS))
    args = TrainingArguments(
        folder,
        max_steps=1,
        per_device_train_batch_size=SAMPLES,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model, args, train_dataset=[{"input_ids": ids, "labels": ids} for ids in tokens], callbacks=list(callbacks)
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=20, help="Turns that each of the three takes.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="Print all measurements as JSON instead of a table.")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    torch.manual_seed(0)
    dense = gpt_neo()
    ours, theirs = copy.deepcopy(dense), copy.deepcopy(dense)
    prune_with_torch(theirs)
    pruning = PruningTrainerCallback(PruningConfig(sparsity=0.8, schedule="one_shot"))
    watches = {name: Stopwatch() for name in ("dense", "hf_prune", "torch.nn.utils.prune")}
    with tempfile.TemporaryDirectory() as folder:
        trainers = [
            trainer_of(dense, folder, watches["dense"]),
            trainer_of(ours, folder, pruning, watches["hf_prune"]),
            trainer_of(theirs, folder, watches["torch.nn.utils.prune"]),
        ]
        for turn in range(1 + args.turns):
            for trainer in trainers[:: 1 if turn % 2 else -1]:
                trainer.train()
    seconds = {name: watch.seconds[1:] for name, watch in watches.items()}
    if args.json:
        print(json.dumps({"threads": args.threads, "seconds": seconds}))
        return

    print(f"{args.turns} turns each, {args.threads} threads:\n")
    print(f"{'':22}{'seconds':>8}{'ratio':>8}   bar")
    for name, turns in seconds.items():
        ratio = statistics.median(turn / beside for turn, beside in zip(turns, seconds["dense"], strict=True))
        print(f"{name:22}{statistics.median(turns):>8.3f}{ratio:>8.3f}   {BARS[name]}".rstrip())


if __name__ == "__main__":
    main()
