"""Time and memory of a cut by each criterion, beside passes, products, and the implementation of SparseGPT's authors.

python recipes/benchmarks/cuts.py
python recipes/benchmarks/cuts.py --reference ../sparsegpt

The model is a GPT-Neo with 29 million parameters, the data are 128 samples of 256 tokens in batches of 8. All take
turns, each time in a process of its own. `sparsegpt+layer` is sparsegpt with layers that are equally sparse, for which
no gradients are needed. Beside the criteria there are

forward         one forward pass over the samples
backward        one forward and one backward pass over the samples: what gives ordinary gradients
products        the least that sparsegpt+layer has to multiply: two forward passes over the samples, one Hessian for
                each input of a layer, and its factorization
reference       the implementation that the authors of SparseGPT published, with `--reference FOLDER`: a clone of
                https://github.com/IST-DASLab/sparsegpt, of which the class `SparseGPT` is used, block by block as its
                scripts do

seconds         wall time, median of the turns
extra MiB       highest resident memory during the cut, less what was resident before it. Needs Linux.
"""

import argparse
import contextlib
import functools
import importlib
import io
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from isolated import Measurement, measure, parse_arguments, take_turns
from selection import gpt_neo
from torch import nn
from transformers import GPTNeoForCausalLM

from hf_prune import PruningConfig, prune

SPARSITY = 0.5
TOKENS = 256
BATCH_SIZE = 8
CRITERIA = ("magnitude", "lamp", "wanda", "snip", "taylor", "fisher", "sparsegpt")
# How many times as long it may take.
BARS = {("fisher", "backward"): 4.0, ("sparsegpt+layer", "products"): 2.0, ("sparsegpt+layer", "reference"): 1.0}

Data = Sequence[dict[str, torch.Tensor]]
Call = Callable[[GPTNeoForCausalLM, Data], None]


def samples_of(model: GPTNeoForCausalLM, number: int) -> Data:
    """Batches of random tokens."""
    tokens = torch.randint(model.config.vocab_size, (number, TOKENS), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": batch, "labels": batch} for batch in tokens.split(BATCH_SIZE)]


def forward(model: GPTNeoForCausalLM, data: Data) -> None:
    model.eval()
    with torch.no_grad():
        for batch in data:
            model(**batch)


def backward(model: GPTNeoForCausalLM, data: Data) -> None:
    model.eval()
    for batch in data:
        model(**batch).loss.backward()


def prune_by(criterion: str, model: GPTNeoForCausalLM, data: Data, scope: str = "auto") -> None:
    samples = sum(len(batch["input_ids"]) for batch in data)
    prune(model, PruningConfig(sparsity=SPARSITY, criterion=criterion, scope=scope, calibration_samples=samples), data)


def products(model: GPTNeoForCausalLM, data: Data) -> None:
    for _ in range(2):
        forward(model, data)
    width = model.config.hidden_size
    with torch.no_grad():
        for _ in range(model.config.num_layers):
            for fan_in in (width, width, width, 4 * width):  # of q, k and v together, out_proj, c_fc, c_proj
                hessian, x = torch.zeros(fan_in, fan_in), torch.randn(BATCH_SIZE * TOKENS, fan_in)
                for batch in data:
                    rows = x[: batch["input_ids"].numel()]
                    hessian.addmm_(rows.T, rows)
                hessian.diagonal().add_(hessian.diagonal().mean())
                inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
                torch.linalg.cholesky(inverse, upper=True)


def reference(folder: str, model: GPTNeoForCausalLM, data: Data) -> None:
    """Block by block: one pass for the Hessians of all its layers, the layers, and one pass for the next block."""
    sys.path.insert(0, folder)
    pruner = importlib.import_module("sparsegpt").SparseGPT
    inputs: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def catch(block: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
        inputs.append((args[0], kwargs))
        raise StopIteration

    model.eval()
    blocks = model.transformer.h
    # It synchronizes with a GPU, and prints what it takes.
    with (
        torch.no_grad(),
        mock.patch("torch.cuda.synchronize"),
        mock.patch("torch.cuda.empty_cache"),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        catcher = blocks[0].register_forward_pre_hook(catch, with_kwargs=True)
        for batch in data:
            with contextlib.suppress(StopIteration):
                model(**batch, use_cache=False)
        catcher.remove()
        for block in blocks:
            linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
            pruners = [pruner(linear) for linear in linears]
            handles = [
                linear.register_forward_hook(lambda _, args, out, one=one: one.add_batch(args[0], out))
                for linear, one in zip(linears, pruners, strict=True)
            ]
            for x, kwargs in inputs:
                block(x, **kwargs)
            for handle in handles:
                handle.remove()
            for one in pruners:
                one.fasterprune(SPARSITY)
                one.free()
            inputs = [(_first(block(x, **kwargs)), kwargs) for x, kwargs in inputs]


def _first(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return output if torch.is_tensor(output) else output[0]


def contenders(folder: str | None) -> dict[str, Call]:
    """What takes turns."""
    found: dict[str, Call] = {"forward": forward, "backward": backward}
    found |= {criterion: functools.partial(prune_by, criterion) for criterion in CRITERIA}
    found |= {"sparsegpt+layer": functools.partial(prune_by, "sparsegpt", scope="layer"), "products": products}
    if folder:
        found["reference"] = functools.partial(reference, folder)
    return found


def measure_one(call: Call, samples: int) -> Measurement:
    """Calls it in this process, first with a tiny model to warm up."""
    torch.manual_seed(0)
    tiny, model = gpt_neo(hidden_size=64), gpt_neo()
    call(tiny, samples_of(tiny, 1))
    return measure(functools.partial(call, model, samples_of(model, samples)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=128, help=f"Calibration samples of {TOKENS} tokens.")
    parser.add_argument("--only", nargs="*", help="Of all contenders these.")
    parser.add_argument("--reference", help="A clone of the reference implementation of SparseGPT.")
    args = parse_arguments(parser)
    calls = contenders(args.reference)
    if args.measure:
        print(json.dumps(measure_one(calls[args.measure], args.samples)))
        return
    runs = take_turns(args.only or calls, args.turns)
    if args.json:
        print(json.dumps({"threads": args.threads, "samples": args.samples, "runs": runs}))
        return
    print(f"{args.samples} samples of {TOKENS} tokens, medians of {args.turns} turns, {args.threads} threads:\n")
    print(f"{'':20}{'seconds':>9}{'extra MiB':>11}")
    medians = {
        name: {quantity: statistics.median(run[quantity] for run in found) for quantity in found[0]}
        for name, found in runs.items()
    }
    for name, found in medians.items():
        print(f"{name:20}{found['seconds']:>9.2f}{found['extra MiB']:>11.1f}")
    print()
    for (one, other), bar in BARS.items():
        if one in medians and other in medians:
            ratio = medians[one]["seconds"] / medians[other]["seconds"]
            print(f"{one} / {other}: {ratio:.2f} (bar: {bar:g})")


if __name__ == "__main__":
    main()
