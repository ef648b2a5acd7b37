"""Time and memory of cutting 80 % of 28 million weights at once, against torch.nn.utils.prune.global_unstructured.

python recipes/benchmarks/selection.py

The two take turns, each time in a process of its own that has built the model (a GPT-Neo) and pruned a tiny one to
warm up. What is measured there is the one call that prunes:

seconds     wall time of the call
extra MiB   highest resident memory during the call, less what was resident right before it. It includes the masks,
            and in the case of torch also the weight that it keeps beside each weight_orig.

Needs Linux, which can tell a process its highest resident memory and forget it again.
"""

import argparse
import functools
import json
import statistics
from collections.abc import Callable

import torch
from isolated import Measurement, measure, parse_arguments, take_turns
from torch.nn.utils import prune as torch_prune
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from hf_prune import PruningConfig, prune, sparsity_report

SPARSITY = 0.8
BARS = {"seconds": 15, "extra MiB": 10}  # how many times less than torch it has to be


def gpt_neo(hidden_size: int = 768) -> GPTNeoForCausalLM:
    """The body of TinyStories-33M with a small vocabulary: 28.3 million weights to prune, 29.3 million parameters."""
    return GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=1024,
            max_position_embeddings=256,
            hidden_size=hidden_size,
            num_layers=4,
            num_heads=16,
            attention_types=[[["global", "local"], 2]],
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def prune_with_hf_prune(model: GPTNeoForCausalLM) -> None:
    prune(model, PruningConfig(sparsity=SPARSITY, schedule="one_shot"))


def prune_with_torch(model: GPTNeoForCausalLM) -> None:
    linears = [module for module in model.transformer.modules() if isinstance(module, torch.nn.Linear)]
    torch_prune.global_unstructured(
        [(linear, "weight") for linear in linears], pruning_method=torch_prune.L1Unstructured, amount=SPARSITY
    )


PRUNERS: dict[str, Callable[[GPTNeoForCausalLM], None]] = {
    "hf_prune": prune_with_hf_prune,
    "torch.nn.utils.prune": prune_with_torch,
}


def measure_pruner(pruner: Callable[[GPTNeoForCausalLM], None]) -> Measurement:
    """Prunes one model in this process."""
    pruner(gpt_neo(hidden_size=64))
    torch.manual_seed(0)
    model = gpt_neo()
    measurement = measure(functools.partial(pruner, model))
    for module in model.modules():
        if hasattr(module, "weight_orig"):
            torch_prune.remove(module, "weight")  # so that both leave an ordinary model with zeros
    report = sparsity_report(model)
    assert report.zeros == round(SPARSITY * report.total), report
    return measurement


def main() -> None:
    args = parse_arguments(argparse.ArgumentParser(description=__doc__.splitlines()[0]))
    if args.measure:
        print(json.dumps(measure_pruner(PRUNERS[args.measure])))
        return
    runs = take_turns(PRUNERS, args.turns)
    if args.json:
        print(json.dumps({"threads": args.threads, "sparsity": SPARSITY, "runs": runs}))
        return
    print(f"Medians of {args.turns} turns each, {args.threads} threads:\n")
    print(f"{'':12}{'hf_prune':>12}{'torch.nn.utils.prune':>24}{'ratio':>8}{'bar':>6}")
    for quantity, bar in BARS.items():
        ours, theirs = (statistics.median(run[quantity] for run in runs[name]) for name in PRUNERS)
        print(f"{quantity:12}{ours:>12.3f}{theirs:>24.3f}{theirs / ours:>8.1f}{bar:>6}")


if __name__ == "__main__":
    main()
