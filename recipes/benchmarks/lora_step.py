"""What a training step costs with LoRA whose adapters reach no pruned weight, beside plain LoRA and full fine-tuning.

python recipes/benchmarks/lora_step.py

Four copies of a GPT-Neo with 29 million parameters, 80 % of its weights zero, take turns in one process: forward,
backward, and a step of AdamW over what is trained.

full            all parameters are trained
plain           peft's LoRA of rank 8 on all Linears: its merge fills the zeros
masked          the same after `keep_sparsity`: one product with `W + M ∘ s B A`
two products    the same where something looks at the layers: a product with `W`, and one with `M ∘ s B A`

seconds         median of the turns
ratio           median of each turn's time divided by that of the plain turn right beside it
MB kept         of tensors that a forward pass keeps for the backward pass, parameters and masks left out
trained         number of trained parameters
"""

import argparse
import copy
import statistics
import time

import torch
from peft import LoraConfig, get_peft_model
from selection import gpt_neo, prune_with_hf_prune
from torch import nn

from hf_prune import keep_sparsity
from hf_prune.recovery.masked_lora import MaskedLinear


def contenders(rank: int) -> dict[str, nn.Module]:
    """Name → model."""
    torch.manual_seed(0)
    full = gpt_neo()
    prune_with_hf_prune(full)
    plain = get_peft_model(copy.deepcopy(full), LoraConfig(target_modules="all-linear", r=rank))
    masked, two = keep_sparsity(copy.deepcopy(plain)), keep_sparsity(copy.deepcopy(plain))
    for name, module in two.named_modules():
        if name.endswith("base_layer"):
            module.register_forward_hook(lambda *_: None)
    return {"full": full, "plain": plain, "masked": masked, "two products": two}


def kept_by(model: nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """Megabytes that a forward pass keeps for the backward pass, each memory once; parameters and masks left out."""
    known = {p.data_ptr() for p in model.parameters()}
    masks = [module.sparsity_mask for module in model.modules() if isinstance(module, MaskedLinear)]
    known |= {mask.data_ptr() for mask in masks if mask is not None}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch)
    return sum(kept.values()) / 1e6


def main() -> None:
    """Measures in turns, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    models = contenders(args.rank)
    ids = torch.randint(1024, (args.samples, args.tokens))
    batch = {"input_ids": ids, "labels": ids}
    trained = {name: [p for p in model.parameters() if p.requires_grad] for name, model in models.items()}
    optimizers = {name: torch.optim.AdamW(parameters, lr=1e-5) for name, parameters in trained.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(1 + args.turns):
        for name in list(models)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            models[name](**batch).loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            if turn:
                seconds[name].append(time.perf_counter() - start)

    sizes = f"{args.samples} x {args.tokens} tokens, rank {args.rank}"
    print(f"Batches of {sizes}, {args.turns} turns, {args.threads} threads:\n")
    print(f"{'':14}{'seconds':>9}{'ratio':>8}{'MB kept':>10}{'trained':>13}")
    for name, turns in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(turns, seconds["plain"], strict=True))
        count = sum(p.numel() for p in trained[name])
        kept = kept_by(models[name], batch)
        print(f"{name:14}{statistics.median(turns):>9.3f}{ratio:>8.2f}{kept:>10.1f}{count:>13,}")


if __name__ == "__main__":
    main()
