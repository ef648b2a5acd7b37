"""What a cut costs each process of a model that FSDP2 has sharded, and what it would cost a much larger one.

python recipes/benchmarks/sharded_cut.py
python recipes/benchmarks/sharded_cut.py --weights 1000000 10000000 --processes 1 2 4 --threads 1

The model is a stack of square linear layers in bfloat16, of which every process makes its own rows and no other. By
magnitude half of all weights go, of all together (global) or of each layer; then the masks are multiplied in, and
digested. More processes than cores wait for each other: the seconds of cores tell what each has to do.

seconds         wall time, the slowest process
core seconds    time of its cores that the busiest process takes
extra MiB       highest resident memory during the cut, less what was resident before it, the largest process;
mask MiB        of which its masks are so much. Needs Linux.
sent MB         what each process sends with ring algorithms, and in how many collectives
"""

import argparse
import functools
import gc
import json
import math
import os
import pickle
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed
from isolated import Measurement, measure, parse_arguments
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn

from hf_prune import PruningConfig
from hf_prune.distributed.shards import own
from hf_prune.plan import Plan
from hf_prune.pruning import cut_
from hf_prune.weights.masks import MaskSet

SPARSITY = 0.5
SCOPES = ("global", "layer")
WIDTHS = {1_000_000: 256, 10_000_000: 512, 100_000_000: 2048, 1_000_000_000: 4096}
LARGE, RANKS, LARGE_LAYERS = 70_000_000_000, 64, 80 * 7  # Llama 70B's weights, and how many tensors they are.


class Traffic:
    """Counts collectives, and what this process sends in them, while they are made as ever."""

    def __init__(self) -> None:
        self.calls, self.bytes = 0, 0.0
        self._all_reduce = torch.distributed.all_reduce
        self._all_gather = torch.distributed.all_gather_object

    def all_reduce(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        size = torch.distributed.get_world_size()
        self._count(2 * tensor.nbytes * (size - 1) / size)
        return self._all_reduce(tensor, *args, **kwargs)

    def all_gather(self, gathered: list[Any], value: Any, *args: Any, **kwargs: Any) -> Any:
        self._count(len(pickle.dumps(value)) * (torch.distributed.get_world_size() - 1))
        return self._all_gather(gathered, value, *args, **kwargs)

    def _count(self, sent: float) -> None:
        self.calls += 1
        self.bytes += sent


def stack(weights: int, width: int) -> nn.Module:
    """Layers with about so many weights, each process with its own rows."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(round(weights / width**2))))
    fully_shard(model.bfloat16(), mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    model.to_empty(device="cpu")
    torch.manual_seed(torch.distributed.get_rank())
    for parameter in model.parameters():
        nn.init.normal_(own(parameter))
    return model


def cut(rank: int, size: int, weights: int, width: int, scope: str, threads: int, folder: str) -> None:
    """One process of one measurement."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(threads)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    measured = measure_cut(stack(weights, width), scope)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(measured))
    gc.collect()  # What is left of the shards holds on to threads of gloo.
    torch.distributed.destroy_process_group()


def measure_cut(model: nn.Module, scope: str) -> Measurement:
    """What a cut costs this process."""
    traffic, held = Traffic(), sum(own(parameter).numel() for parameter in model.parameters())
    config = PruningConfig(sparsity=SPARSITY, scope=scope, target_modules=".*")
    plan = Plan.of(model, config)
    torch.distributed.barrier()
    start = time.process_time()
    counted = mock.patch.object(torch.distributed, "all_reduce", traffic.all_reduce)
    with counted, mock.patch.object(torch.distributed, "all_gather_object", traffic.all_gather):
        measured = measure(lambda: cut_(model, plan, MaskSet(), SPARSITY).digest())
    return {
        **measured,
        "core seconds": time.process_time() - start,
        "mask MiB": held / 2**20,
        "sent MB": traffic.bytes / 1e6,
        "collectives": traffic.calls,
    }


def measure_cell(size: int, weights: int, width: int, scope: str, threads: int) -> Measurement:
    """The largest of each figure over the processes."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(cut, (size, weights, width, scope, threads, folder), nprocs=size)
        measured = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(size)]
    return {name: max(each[name] for each in measured) for name in measured[0]}


def extrapolated(cells: dict[tuple[int, int, str], Measurement], scope: str) -> Measurement:
    """What 70 B weights would cost each of 64 processes, from the largest model measured.

    What a process computes and holds goes with the weights that it has; what it sends, with the number of layers where
    each of them is a competition of its own, and with nothing else.
    """
    weights = max(key[0] for key in cells)
    size = max(key[1] for key in cells if key[0] == weights)
    measured, share = cells[weights, size, scope], (LARGE / RANKS) / (weights / size)
    layers = LARGE_LAYERS / round(weights / WIDTHS[weights] ** 2)
    of_ring = (RANKS - 1) / RANKS / ((size - 1) / size) if size > 1 else math.nan
    return {
        "core seconds": measured["core seconds"] * share,
        "extra MiB": measured["mask MiB"] * share + (measured["extra MiB"] - measured["mask MiB"]),
        "mask MiB": measured["mask MiB"] * share,
        "sent MB": measured["sent MB"] * (layers if scope == "layer" else 1) * of_ring,
        "collectives": measured["collectives"] * (layers if scope == "layer" else 1),
    }


def main() -> None:
    """Measures every cell, prints the table, and what follows from it for 70 B."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=int, nargs="+", default=list(WIDTHS), choices=WIDTHS)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    args = parse_arguments(parser)
    names = ["seconds", "core seconds", "extra MiB", "mask MiB", "sent MB", "collectives"]
    cells: dict[tuple[int, int, str], Measurement] = {}
    for scope in SCOPES:
        for weights in args.weights:
            for size in args.processes:
                turns = [measure_cell(size, weights, WIDTHS[weights], scope, args.threads) for _ in range(args.turns)]
                cells[weights, size, scope] = {name: sorted(t[name] for t in turns)[len(turns) // 2] for name in names}
    if args.json:
        print(json.dumps([{"weights": w, "processes": p, "scope": s, **cell} for (w, p, s), cell in cells.items()]))
        return
    print(f"Medians of {args.turns} turns, {args.threads} threads a process, {os.cpu_count()} cores:\n")
    print(f"{'scope':<8}{'weights':>15}{'processes':>11}" + "".join(f"{name:>14}" for name in names))
    row: Callable[[str, int, int, Measurement], None] = functools.partial(_print_row, names)
    for (weights, size, scope), cell in cells.items():
        row(scope, weights, size, cell)
    print("\nExtrapolated:")
    for scope in SCOPES:
        row(scope, LARGE, RANKS, extrapolated(cells, scope))


def _print_row(names: list[str], scope: str, weights: int, size: int, cell: Measurement) -> None:
    figures = "".join(f"{cell[name]:>14,.2f}" if name in cell else f"{'':>14}" for name in names)
    print(f"{scope:<8}{weights:>15,}{size:>11}{figures}")


if __name__ == "__main__":
    main()
