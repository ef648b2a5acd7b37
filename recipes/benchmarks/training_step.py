"""Time of a training step while masks are held, against a dense step and against torch.nn.utils.prune.

python recipes/benchmarks/training_step.py

Three Trainers take turns in one process, each with its own copy of a GPT-Neo with 29 million parameters: dense, under
PruningTrainerCallback, and under torch.nn.utils.prune, the latter two at the same 80 % sparsity. A turn is a `train()`
of a few steps. What is measured is the median of its steps, from `on_step_begin` to `on_step_end`: forward, backward,
clipping, AdamW, callbacks. A first turn of each warms up and does not count.

What masking adds to a step depends on the weights alone, while the step grows with its batch. So it is measured twice:
with 8 samples of 256 tokens, as in training (a turn is one step), where it is less than what turns differ by anyway;
and with one sample of 8 tokens (a turn is ten steps), where nothing hides it.

seconds     median of the turns
added       median of what each turn takes longer than the dense turn right beside it, in milliseconds
ratio       median of each turn's time divided by that of the dense turn right beside it, so that what else the
            machine does cancels out; with the half-width of its 95 % confidence interval (bootstrap)

Further turns with 8 x 256 tokens run under torch's profiler. A masked step calls the operators of a dense one and some
of its own, and how long these take can be told however much the others vary:

operators   calls beyond those of a dense step, by name and shapes of the inputs
own ms      time in them, median of the turns, with the lowest and the highest
"""

import argparse
import copy
import json
import random
import statistics
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import torch
from selection import gpt_neo, prune_with_torch
from torch.profiler import ProfilerActivity
from transformers import GPTNeoForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from hf_prune import PruningConfig, PruningTrainerCallback

CONTENDERS = ("dense", "hf_prune", "torch.nn.utils.prune")


class Stopwatch(TrainerCallback):
    """Comes after all other callbacks, so that what they do at the end of a step counts as part of it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)


class Operators(TrainerCallback):
    """The operators of each step: name and shapes of the inputs → number of calls, and milliseconds in them."""

    def __init__(self) -> None:
        self.steps: list[dict[tuple[str, str], tuple[int, float]]] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.profiler = torch.profiler.profile(activities=[ProfilerActivity.CPU], record_shapes=True)
        self.profiler.start()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.profiler.stop()
        found = self.profiler.key_averages(group_by_input_shape=True)
        self.steps.append({(e.key, str(e.input_shapes)): (e.count, e.self_cpu_time_total / 1000) for e in found})


def trainer_of(
    model: GPTNeoForCausalLM, samples: int, tokens: int, steps: int, folder: str, *callbacks: TrainerCallback
) -> Trainer:
    batch = torch.randint(model.config.vocab_size, (samples, tokens))
    args = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=samples,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model, args, train_dataset=[{"input_ids": ids, "labels": ids} for ids in batch], callbacks=list(callbacks)
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def take_turns(samples: int, tokens: int, steps: int, turns: int, observers: Mapping[str, TrainerCallback]) -> None:
    """Lets each contender take one turn to warm up, and then as many as are asked for; its observer sees all."""
    torch.manual_seed(0)
    dense = gpt_neo()
    ours, theirs = copy.deepcopy(dense), copy.deepcopy(dense)
    prune_with_torch(theirs)
    pruning = PruningTrainerCallback(PruningConfig(sparsity=0.8, schedule="one_shot"))
    with tempfile.TemporaryDirectory() as folder:
        trainers = [
            trainer_of(dense, samples, tokens, steps, folder, observers["dense"]),
            trainer_of(ours, samples, tokens, steps, folder, pruning, observers["hf_prune"]),
            trainer_of(theirs, samples, tokens, steps, folder, observers["torch.nn.utils.prune"]),
        ]
        for turn in range(1 + turns):
            for trainer in trainers[:: 1 if turn % 2 else -1]:
                trainer.train()


def measure(samples: int, tokens: int, steps: int, turns: int) -> dict[str, list[float]]:
    """The seconds of each turn of each contender."""
    watches = {name: Stopwatch() for name in CONTENDERS}
    take_turns(samples, tokens, steps, turns, watches)
    return {
        name: [statistics.median(watch.seconds[i : i + steps]) for i in range(steps, len(watch.seconds), steps)]
        for name, watch in watches.items()
    }


def measure_operators(samples: int, tokens: int, turns: int) -> dict[str, list[tuple[int, float]]]:
    """Calls of the operators that a contender has and a dense step has not, and milliseconds in them, of each turn."""
    observers = {name: Operators() for name in CONTENDERS}
    take_turns(samples, tokens, 1, turns, observers)
    dense = observers.pop("dense").steps[-1]

    def own(step: dict[tuple[str, str], tuple[int, float]]) -> tuple[int, float]:
        more = {key: calls - dense.get(key, (0, 0))[0] for key, (calls, _) in step.items()}
        more = {key: calls for key, calls in more.items() if calls > 0}
        return sum(more.values()), sum(step[key][1] * calls / step[key][0] for key, calls in more.items())

    return {name: [own(step) for step in observer.steps[1:]] for name, observer in observers.items()}


def half_width(values: list[float], draws: int = 1000) -> float:
    """Half of the 95 % confidence interval of the median, by the bootstrap."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(draws))
    return (medians[int(0.975 * draws)] - medians[int(0.025 * draws)]) / 2


def show(seconds: dict[str, list[float]]) -> None:
    print(f"{'':22}{'seconds':>8}{'added ms':>10}{'ratio':>8}")
    for name, turns in seconds.items():
        pairs = list(zip(turns, seconds["dense"], strict=True))
        ratios = [turn / beside for turn, beside in pairs]
        added = 1000 * statistics.median(turn - beside for turn, beside in pairs)
        spread = f" ± {half_width(ratios):.3f}" if name != "dense" else ""
        print(f"{name:22}{statistics.median(turns):>8.3f}{added:>10.1f}{statistics.median(ratios):>8.3f}{spread}")


def show_operators(found: dict[str, list[tuple[int, float]]]) -> None:
    print(f"{'':22}{'operators':>10}{'own ms':>8}")
    for name, turns in found.items():
        calls, times = zip(*turns, strict=True)
        spread = f" ({min(times):.1f} to {max(times):.1f})"
        print(f"{name:22}{round(statistics.median(calls)):>10}{statistics.median(times):>8.1f}{spread}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--turns", type=int, default=20, help="Turns that each of the three takes with 8 x 256 tokens."
    )
    parser.add_argument("--profiled_turns", type=int, default=5, help="Turns under the profiler.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="Print all measurements as JSON instead of tables.")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    batches = {(8, 256): 1, (1, 8): 10}  # samples and tokens: steps of a turn
    seconds = {batch: measure(*batch, steps, args.turns) for batch, steps in batches.items()}
    operators = measure_operators(8, 256, args.profiled_turns)
    if args.json:
        named = {f"{samples}x{tokens}": turns for (samples, tokens), turns in seconds.items()}
        print(json.dumps({"threads": args.threads, "seconds": named, "operators": operators}))
        return
    for (samples, tokens), turns in seconds.items():
        print(f"\nBatches of {samples} x {tokens} tokens, {len(turns['dense'])} turns each, {args.threads} threads:\n")
        show(turns)
    print(f"\nInside the step of 8 x 256 tokens, {args.profiled_turns} turns each:\n")
    show_operators(operators)


if __name__ == "__main__":
    main()
