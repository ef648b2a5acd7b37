"""Functions and modules that run on several processes which can talk to each other."""

import gc
import os
import signal
import uuid
from collections.abc import Callable, Iterable
from datetime import timedelta
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed
from accelerate.state import AcceleratorState
from torch.distributed import ProcessGroupGloo, Store
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

Run = TypeVar("Run")
Result = TypeVar("Result")


def on_two_processes(function: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """`on_processes` with two."""
    return on_processes(2, function, folder, *args)


def on_processes(size: int, function: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """Calls `function(rank, *args)` on each; what it returns is tensors, numbers and containers of them."""
    folder.mkdir(exist_ok=True)
    forkserver()
    torch.multiprocessing.start_processes(
        _run, args=(size, folder, function, args), nprocs=size, start_method="forkserver"
    )
    return [torch.load(folder / f"rank-{rank}", weights_only=True) for rank in range(size)]


def _run(rank: int, size: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "localhost"}
    one_worker_of_gloo()
    # A file to meet at, because a port that is free now may not be free in a moment.
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    assert torch.distributed.get_world_size() == size
    assert torch.distributed.get_backend() == "gloo"
    torch.set_num_threads(1)
    torch.save(function(rank, *args), folder / f"rank-{rank}")
    end_processes()


def launch_function(function: Callable[..., Any], size: int, *args: Any, timeout: int) -> None:
    """Calls a function on so many processes as torchrun launches them; `ChildFailedError` says how one has failed."""
    forkserver()
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=size, run_id=uuid.uuid4().hex, max_restarts=0,
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="forkserver",
    )  # fmt: skip
    elastic_launch(config, _alarmed)(timeout, function, *args)


def _alarmed(timeout: int, function: Callable[..., Any], *args: Any) -> None:
    signal.alarm(timeout)  # Instead of waiting for ever.
    one_worker_of_gloo()
    torch.set_num_threads(1)
    function(*args)


def one_worker_of_gloo() -> None:
    """Process groups of this process that use gloo have one worker thread from now on, not two.

    Two of them write what each has done last into one string without a lock (torch 2.13, `pgStatus_` in `runLoop` of
    ProcessGroupGloo.cpp). Where long names ("ALLGATHER_COALESCED", of a gathered shard) are on the heap and short ones
    ("ALLREDUCE") are written over them, a process aborts now and then: `malloc(): unaligned tcache chunk detected`.
    """
    init = ProcessGroupGloo.__init__

    def with_one_worker(self: ProcessGroupGloo, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        options = ProcessGroupGloo._Options()
        options._devices, options._threads = [ProcessGroupGloo.create_default_device()], 1
        options._timeout = timeout
        init(self, store, rank, size, options)

    ProcessGroupGloo.__init__ = with_one_worker


def forkserver() -> BaseContext:
    """Processes start from one that has imported what takes seconds; no thread of it runs the tests' code."""
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["datasets", "transformers.trainer", "hf_prune"])
    return context


def in_turn(runs: Iterable[Run], train: Callable[[Run], None]) -> None:
    """One training after the other, as if each were the first; then the processes end."""
    results_in_turn(runs, train)
    end_processes()


def results_in_turn(runs: Iterable[Run], train: Callable[[Run], Result]) -> list[Result]:
    """What each training gives, one after the other, as if each were the first."""
    results = []
    for run in runs:
        results.append(train(run))
        AcceleratorState._reset_state(reset_partial_state=True)
        unset_hf_deepspeed_config()
    return results


def end_processes() -> None:
    """Lets go of what they talk with: else threads of gloo may outlive the interpreter, and the process aborts."""
    gc.collect()  # Those of shards live as long as the shards.
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # One that closes what it has not read resets what the other still reads.
        torch.distributed.destroy_process_group()
