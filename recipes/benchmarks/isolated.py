"""Time and memory of a call, measured in a process of its own.

seconds     wall time of the call
extra MiB   highest resident memory during the call, less what was resident right before it

Needs Linux, which can tell a process its highest resident memory and forget it again.
"""

import argparse
import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

Measurement = dict[str, float]


def parse_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments of a benchmark; those added here say how it is measured."""
    parser.add_argument("--turns", type=int, default=5, help="Turns that each contender takes.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="Print all measurements as JSON instead of a table.")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


def measure(call: Callable[[], object]) -> Measurement:
    """Measures a call in this process, which must not have measured before."""
    # Without this, memory freed while the model was built would be used again, and not be seen.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest resident memory so far
    before = _resident("VmRSS")
    start = time.perf_counter()
    call()
    return {"seconds": time.perf_counter() - start, "extra MiB": (_resident("VmHWM") - before) / 1024}


def take_turns(contenders: Iterable[str], turns: int) -> dict[str, list[Measurement]]:
    """Runs this script anew with `--measure CONTENDER`, one contender after another, and reads the JSON it prints."""
    runs: dict[str, list[Measurement]] = {name: [] for name in contenders}
    for turn in range(turns):
        for name in list(runs)[:: -1 if turn % 2 else 1]:
            command = [sys.executable, *sys.argv, "--measure", name]
            runs[name].append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
    return runs


def _resident(field: str) -> int:
    """Resident memory of this process in KiB: `VmRSS` now, `VmHWM` at its highest."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{field}:"))
