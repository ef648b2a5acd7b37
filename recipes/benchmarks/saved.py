"""What a saved causal language model does: its perplexity, its parameters and the tokens that it generates.

python recipes/benchmarks/saved.py FOLDER TOKENS
python recipes/benchmarks/saved.py FOLDER TOKENS --recorded

FOLDER is what `save_pretrained` has written, TOKENS a safetensors file with `tokens`, `[samples, length]`. It is
loaded by Transformers alone; by `--recorded` with hf_prune, which reads shapes that no ordinary config can say.
"""

import argparse
import importlib
import json
import math
import sys
import time
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

PROMPT, NEW = 32, 32


@torch.no_grad()
def observe(model: PreTrainedModel, tokens: torch.Tensor) -> dict[str, Any]:
    """Measures a model.

    Args:
        model: A causal language model.
        tokens: `[samples, length]`; the perplexity is over all but the first of each.

    Returns:
        `parameters`, `perplexity`, `seconds` (of the passes for it), and how the first tokens go on, without sampling:
        `generated` with the cache of default, `generated_static` with a static one.
    """
    generate: Any = model.eval().generate
    start = time.perf_counter()
    losses = [float(model(input_ids=each[None], labels=each[None]).loss) for each in tokens]
    seconds = time.perf_counter() - start
    prompt = tokens[:1, :PROMPT]
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": NEW, "do_sample": False}
    return {
        "parameters": model.num_parameters(),
        "perplexity": math.exp(math.fsum(losses) / len(losses)),  # All have as many tokens.
        "seconds": seconds,
        "generated": generate(prompt, **options).tolist(),
        "generated_static": generate(prompt, **options, cache_implementation="static").tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("tokens")
    parser.add_argument("--recorded", action="store_true", help="Import hf_prune first.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.recorded:
        importlib.import_module("hf_prune")
    model = AutoModelForCausalLM.from_pretrained(args.folder)
    observed = observe(model, load_file(args.tokens)["tokens"])
    assert args.recorded or "hf_prune" not in sys.modules
    print(json.dumps(observed))


if __name__ == "__main__":
    main()
