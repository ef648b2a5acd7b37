"""Functions that run on several processes which can talk to each other."""

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed


def on_two_processes(function: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """`on_processes` with two."""
    return on_processes(2, function, folder, *args)


def on_processes(size: int, function: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """Calls `function(rank, *args)` on each; what it returns is tensors, numbers and containers of them."""
    folder.mkdir(exist_ok=True)
    # From a process that has imported what takes seconds, and computed nothing: it has no threads that could be lost.
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload(["transformers.trainer", "hf_prune"])
    torch.multiprocessing.start_processes(
        _run, args=(size, folder, function, args), nprocs=size, start_method="forkserver"
    )
    return [torch.load(folder / f"rank-{rank}", weights_only=True) for rank in range(size)]


def _run(rank: int, size: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "localhost"}
    # A file to meet at, because a port that is free now may not be free in a moment.
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    assert torch.distributed.get_world_size() == size
    assert torch.distributed.get_backend() == "gloo"
    torch.set_num_threads(1)
    torch.save(function(rank, *args), folder / f"rank-{rank}")
    end_processes()


def end_processes() -> None:
    """Lets go of what they talk with: else threads of gloo may outlive the interpreter, and the process aborts."""
    gc.collect()  # Those of shards live as long as the shards.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
