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
import ctypes
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
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


def measure(pruner: Callable[[GPTNeoForCausalLM], None]) -> dict[str, float]:
    """Prunes one model in this process, which must not have measured before."""
    pruner(gpt_neo(hidden_size=64))
    torch.manual_seed(0)
    model = gpt_neo()
    # Without this, memory freed while the model was built would be used again, and not be seen.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest resident memory so far
    before = resident("VmRSS")
    start = time.perf_counter()
    pruner(model)
    seconds = time.perf_counter() - start
    extra = resident("VmHWM") - before
    for module in model.modules():
        if hasattr(module, "weight_orig"):
            torch_prune.remove(module, "weight")  # so that both leave an ordinary model with zeros
    report = sparsity_report(model)
    assert report.zeros == round(SPARSITY * report.total), report
    return {"seconds": seconds, "extra MiB": extra / 1024}


def resident(field: str) -> int:
    """Resident memory of this process in KiB: `VmRSS` now, `VmHWM` at its highest."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{field}:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=5, help="Turns that each of the two takes.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="Print all measurements as JSON instead of a table.")
    parser.add_argument("--measure", choices=PRUNERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.measure:
        print(json.dumps(measure(PRUNERS[args.measure])))
        return

    runs: dict[str, list[dict[str, float]]] = {name: [] for name in PRUNERS}
    for _ in range(args.turns):
        for name in PRUNERS:
            command = [sys.executable, __file__, "--measure", name, "--threads", str(args.threads)]
            runs[name].append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
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
