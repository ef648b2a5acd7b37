"""Latency of a model without half of its heads and neurons, against what the operations that are gone promise.

python recipes/benchmarks/shrunk.py

The model is a GPT-Neo with 29 million parameters; the shrunk one is a copy of it that was pruned and shrunk. They take
turns in one process, each a forward pass over 8 samples of 256 tokens without gradients.

parameters  number of parameters
GFLOPs      floating-point operations of the matrix products of a pass
seconds     wall time, median of the turns
share       of the dense model's
promised    the share of the operations, and how many times that the shrunk model takes; the bar is the most accepted
"""

import argparse
import copy
import dataclasses
import json

import torch
from selection import gpt_neo

from hf_prune import PruningConfig, prune, shrink
from hf_prune.calibration.costs import measure_costs

BAR = 1.15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=20, help="Turns that each of the two takes.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", action="store_true", help="Print all measurements as JSON instead of a table.")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    torch.manual_seed(0)
    dense = gpt_neo().to(args.device, getattr(torch, args.dtype))
    shrunk = copy.deepcopy(dense)
    prune(shrunk, PruningConfig(sparsity=0.5, schedule="one_shot", granularity="head+neuron"))
    shrink(shrunk)
    batch = {"input_ids": torch.randint(dense.config.vocab_size, (args.samples, args.tokens))}
    costs = measure_costs({"dense": dense, "shrunk": shrunk}, batch, args.turns)

    if args.json:
        print(json.dumps({"threads": args.threads, **{name: dataclasses.asdict(c) for name, c in costs.items()}}))
        return
    print(f"Batches of {args.samples} x {args.tokens} tokens, {args.turns} turns each, {args.threads} threads:\n")
    print(f"{'':12}{'dense':>12}{'shrunk':>12}{'share':>8}")
    shares = {}
    for name, unit, digits in (("parameters", 1, 0), ("flops", 1e9, 1), ("seconds", 1, 3)):
        before, after = (getattr(costs[model], name) / unit for model in ("dense", "shrunk"))
        shares[name] = after / before
        label = "GFLOPs" if name == "flops" else name
        print(f"{label:12}{before:>12,.{digits}f}{after:>12,.{digits}f}{shares[name]:>8.3f}")
    print(f"\nThe shrunk model takes {shares['seconds'] / shares['flops']:.2f} times what is promised (bar {BAR}).")


if __name__ == "__main__":
    main()
