"""Functions that run on two processes which can talk to each other."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed


def on_two_processes(function: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """Calls `function(rank, *args)` on each; what it returns is tensors, numbers and containers of them."""
    torch.multiprocessing.spawn(_run, args=(folder, function, args), nprocs=2)
    return [torch.load(folder / f"rank-{rank}", weights_only=True) for rank in range(2)]


def _run(rank: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    # A file to meet at, because a port that is free now may not be free in a moment.
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.save(function(rank, *args), folder / f"rank-{rank}")
    # Else threads of gloo may still let go of tensors while the interpreter ends, and the process aborts.
    torch.distributed.destroy_process_group()
