"""How fast `hf-prune report` reads a large model, beside reading its files, and how much memory it takes.

python recipes/benchmarks/reading.py
python recipes/benchmarks/reading.py --gigabytes 5 --turns 3

The model is layers in bfloat16 of which half of the weights of each row are zero, wherever or as 2:4, written by this
script into a temporary folder. Both read the same files, in turns, each in a process of its own, after one turn that
does not count: the files are in the page cache if they fit there.

seconds   wall time
GB/s      of the files
peak MB   highest resident memory that is not of the files (those are mapped, and can be dropped). Needs Linux.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

MEASURE = """
import json, sys, threading, time
from pathlib import Path
import hf_prune.publishing.inspection

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1e3

peak, done = 0.0, threading.Event()
def watch():
    global peak
    while not done.wait(0.005):
        peak = max(peak, anonymous())

threading.Thread(target=watch, daemon=True).start()
start = time.perf_counter()
if sys.argv[2] == "report":
    hf_prune.publishing.inspection.report_folder(sys.argv[1])
else:
    block = bytearray(2**24)
    for path in sorted(Path(sys.argv[1]).glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass
seconds = time.perf_counter() - start
done.set()
print(json.dumps([seconds, max(peak, anonymous())]))
"""


def write_model(folder: Path, gigabytes: float, pattern: bool) -> None:
    """Layers of an eighth of a gigabyte, all alike, at most eight in a file."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8192, 7632, generator=generator).bfloat16()
    groups = weight.view(-1, 4 if pattern else weight.shape[1]).abs()
    lowest = groups.argsort(1).argsort(1) < groups.shape[1] // 2
    weight.view(lowest.shape).masked_fill_(lowest, 0)
    names = [f"layers.{number}.weight" for number in range(round(8 * gigabytes))]
    files = {name: f"model-{number // 8:05d}.safetensors" for number, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: weight.clone() for name in names if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def measure(folder: Path, what: str) -> tuple[float, float]:
    """Seconds and megabytes of one turn."""
    command = [sys.executable, "-c", MEASURE, str(folder), what]
    seconds, megabytes = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return seconds, megabytes


def main() -> None:
    """Writes, measures in turns, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=5)
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    print(f"{arguments.gigabytes:g} GB, medians of {arguments.turns} turns:\n")
    print(f"{'zeros':<14}{'':<8}{'seconds':>10}{'GB/s':>8}{'peak MB':>10}")
    for zeros, pattern in (("unstructured", False), ("2:4", True)):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_model(folder, arguments.gigabytes, pattern)
            size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9
            turns = [{what: measure(folder, what) for what in ("read", "report")} for _ in range(arguments.turns + 1)]
        for what in ("read", "report"):
            seconds = statistics.median(turn[what][0] for turn in turns[1:])
            peak = max(turn[what][1] for turn in turns[1:])
            print(f"{zeros:<14}{what:<8}{seconds:>10.2f}{size / seconds:>8.2f}{peak:>10.0f}")


if __name__ == "__main__":
    main()
