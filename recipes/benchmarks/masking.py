"""What it costs to multiply 28.3 million weights by their masks, by several ways: what holding the masks is made of.

python recipes/benchmarks/masking.py

The ways take turns in one process. Torch multiplies floats by bytes through a copy of the bytes as floats, so that the
size of the pieces counts.

scalar          weights times a number: they are read and written, and no mask is
float masks     four bytes a mask, which hf_prune does not spend
bytes           the masks as they are, whole weights at once
bools           the same, but torch is not told that they are bytes
numpy           the same by NumPy, which uses one thread
pieces of N     bytes, N weights at once: `hf_prune.weights.masks.mask_` takes 2^20
buffer of N     the same, with the copy made by hand into a buffer that stays
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from selection import gpt_neo

Weights = Sequence[tuple[torch.Tensor, torch.Tensor]]


def in_pieces(weights: Weights, size: int, buffer: torch.Tensor | None = None) -> None:
    for weight, mask in weights:
        for values, kept in zip(weight.view(-1).split(size), mask.view(-1).split(size), strict=True):
            values.mul_(kept if buffer is None else buffer[: len(kept)].copy_(kept))


def ways(weights: Weights) -> dict[str, Callable[[], object]]:
    floats, bools = ([mask.to(dtype) for _, mask in weights] for dtype in (torch.float32, torch.bool))
    found: dict[str, Callable[[], object]] = {
        "scalar": lambda: [weight.mul_(1.0) for weight, _ in weights],
        "float masks": lambda: [weight.mul_(mask) for (weight, _), mask in zip(weights, floats, strict=True)],
        "bytes": lambda: [weight.mul_(mask) for weight, mask in weights],
        "bools": lambda: [weight.mul_(mask) for (weight, _), mask in zip(weights, bools, strict=True)],
        "numpy": lambda: [np.multiply(weight, mask, out=weight.numpy()) for weight, mask in weights],
    }
    for power in range(15, 21):
        size, buffer = 2**power, torch.empty(2**power)
        found[f"pieces of 2^{power}"] = functools.partial(in_pieces, weights, size)
        found[f"buffer of 2^{power}"] = functools.partial(in_pieces, weights, size, buffer)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=15, help="Turns that each way takes.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    linears = [module for module in gpt_neo().transformer.modules() if isinstance(module, torch.nn.Linear)]
    weights = [(linear.weight.detach(), (torch.rand_like(linear.weight) > 0.8).byte()) for linear in linears]
    calls = ways(weights)
    milliseconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(1 + args.turns):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:  # The first one warms up.
                milliseconds[name].append(1000 * (time.perf_counter() - start))
    print(f"{args.turns} turns each, {args.threads} threads:\n\n{'':16}{'ms':>6}{'lowest':>8}{'highest':>9}")
    for name, each in milliseconds.items():
        print(f"{name:16}{statistics.median(each):>6.1f}{min(each):>8.1f}{max(each):>9.1f}")


if __name__ == "__main__":
    main()
