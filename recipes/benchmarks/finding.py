"""How long heads, neurons and layers of a model type that no table describes take to be found and proved, once.

python recipes/benchmarks/finding.py
python recipes/benchmarks/finding.py jamba hiera

Each type gives one tiny model of its default config: what is measured is made from the config alone, and takes as long
for a large one.

finding  seconds of CPU until a small model is built and its structures are found
proving  until all of them were removed on trial, on one thread
"""

import argparse
import statistics
import time
from unittest import mock

import torch
import transformers
from tiny_models import model_types, tiny

from hf_prune.structures import proof
from hf_prune.structures.discovery import stacks_in
from hf_prune.structures.families import FAMILIES

BAR = 3.0


def seconds(model_type: str) -> tuple[float, float] | None:
    """Seconds until a type is found, and until it is proved; None if it has no tiny model."""
    try:
        model = tiny(model_type)
    except ValueError:
        return None
    found: list[float] = []

    def timed(small: transformers.PreTrainedModel) -> object:
        stacks = stacks_in(small)
        found.append(time.process_time())
        return stacks

    with mock.patch.object(proof, "stacks_in", timed):
        start = time.process_time()
        proof.prove(model, None)
        end = time.process_time()
    return (found or [end])[0] - start, end - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", help="Model types; all that are in no table, if none is named.")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    seconds("opt")  # What is imported at the first call is no matter of a type.
    proved: dict[str, float] = {}
    print(f"{'model type':32} {'finding':>8} {'proving':>8}")
    for name in args.types or [each for each in model_types() if each not in FAMILIES]:
        if (both := seconds(name)) is not None:
            proved[name] = both[1]
            print(f"{name:32} {both[0]:8.2f} {both[1]:8.2f}", flush=True)
    slow = [f"{name} {each:.1f}" for name, each in sorted(proved.items(), key=lambda item: -item[1]) if each > BAR]
    print(
        f"{len(proved)} types, median {statistics.median(proved.values()):.2f} s; above {BAR:g} s: {', '.join(slow)}"
    )


if __name__ == "__main__":
    main()
