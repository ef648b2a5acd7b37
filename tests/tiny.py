"""Tiny models of many families, built from configs, and samples to train them on."""

import copy
import functools
from collections.abc import Callable

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn

TOKENS = {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TEXT = {**TOKENS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
IMAGES = {"num_labels": 3, "num_channels": 1}

FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**TOKENS, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    ),
    "gpt_neo": lambda: transformers.GPTNeoForCausalLM(
        transformers.GPTNeoConfig(
            **TOKENS,
            max_position_embeddings=16,
            hidden_size=16,
            num_layers=2,
            num_heads=2,
            attention_types=[[["global", "local"], 1]],
            window_size=8,
        )
    ),
    "bert": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(**TEXT, max_position_embeddings=16, num_labels=3)
    ),
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=8,
            patch_size=4,
            **IMAGES,
        )
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, num_key_value_heads=1)),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            **TOKENS, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
        )
    ),
    "resnet": lambda: transformers.ResNetForImageClassification(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **IMAGES)
    ),
    "convnext": lambda: transformers.ConvNextForImageClassification(
        transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2, **IMAGES)
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**TEXT, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2)
    ),
}


COMPARES_SHAPES = Version(transformers.__version__) >= Version("5.23")
"""Whether Transformers compares what it reads with a model whose config holds a record. If not, we do, and know of no
`ignore_mismatched_sizes`."""
needs_comparison = pytest.mark.skipif(not COMPARES_SHAPES, reason="ignore_mismatched_sizes needs Transformers 5.23")


def build(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny model with perturbed weights: no zero biases, no unit norms, no natural zeros."""
    model = copy.deepcopy(_built(family)).to(dtype)
    torch.manual_seed(0)
    return model


@functools.cache
def _built(family: str) -> nn.Module:
    torch.manual_seed(0)
    model = FAMILIES[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def sixteen_experts() -> nn.Module:
    """A model of which few samples cannot reach every expert: of each token two are asked."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**TEXT, num_key_value_heads=1, num_local_experts=16, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


def batch(model: nn.Module, size: int = 4, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Samples that the model can be trained on."""
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        side = getattr(model.config, "image_size", 16)
        return [
            {"pixel_values": torch.randn(1, side, side, generator=generator), "labels": torch.tensor(i % 3)}
            for i in range(size)
        ]
    tokens = [torch.randint(1, 60, (12,), generator=generator) for _ in range(size)]
    if "SequenceClassification" in type(model).__name__:
        return [{"input_ids": ids, "labels": torch.tensor(i % 3)} for i, ids in enumerate(tokens)]
    return [{"input_ids": ids, "labels": ids.clone()} for ids in tokens]


def logits(model: nn.Module) -> torch.Tensor:
    """What a model, with adapters or without, says of samples."""
    samples = batch(model.get_base_model() if hasattr(model, "peft_config") else model)
    inputs = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
    with torch.no_grad():
        return model(**inputs).logits


def twin(model: nn.Module) -> nn.Module:
    """An independent copy with equal weights."""
    return copy.deepcopy(model)
