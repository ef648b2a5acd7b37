"""Memory: how much more a call takes at its highest than what is there before it."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch


def peak_of(call: Callable[[], object]) -> float:
    """Calls something, and tells what it took at most: of CUDA where there is a GPU, else of the process.

    Returns:
        The megabytes, not a number where nobody tells them (without a GPU they need Linux).
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    status, marks = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not marks.exists():
        call()
        return float("nan")

    def kilobytes(field: str) -> int:
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))

    # Without this, memory that was let go of before would be used again, and not be seen.
    ctypes.CDLL(None).malloc_trim(0)
    marks.write_text("5")  # forgets the highest so far
    before = kilobytes("VmRSS")
    call()
    return (kilobytes("VmHWM") - before) * 1024 / 1e6
