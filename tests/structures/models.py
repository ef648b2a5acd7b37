"""Tiny models of every family with heads, neurons and layers, and something to call them with."""

from collections.abc import Callable

import torch
import transformers
from torch import nn

TOKENS = {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
DECODER = {
    **TOKENS,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
GROUPED = {**DECODER, "hidden_size": 24, "num_attention_heads": 12, "num_key_value_heads": 3, "head_dim": 4}
ENCODER = {**DECODER, "num_labels": 3}
IMAGES = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "num_labels": 3,
}
SEQUENCES = {
    **TOKENS,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 32,
    "decoder_start_token_id": 1,
}
T5 = {
    **TOKENS,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 3,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt_neo": lambda: transformers.GPTNeoForCausalLM(
        transformers.GPTNeoConfig(
            **TOKENS,
            max_position_embeddings=32,
            hidden_size=16,
            num_layers=3,
            num_heads=4,
            attention_types=[[["global"], 1], [["local", "global"], 1]],
            window_size=4,
        )
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**TOKENS, n_positions=32, n_embd=16, n_layer=3, n_head=4)
    ),
    "gpt2 with cross-attention": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**TOKENS, n_positions=32, n_embd=16, n_layer=3, n_head=4, add_cross_attention=True)
    ),
    "gpt_neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**DECODER)),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(
            **{k: v for k, v in DECODER.items() if k != "intermediate_size"}, ffn_dim=24, word_embed_proj_dim=16
        )
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)),
    "llama with biases": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**DECODER, attention_bias=True, mlp_bias=True)
    ),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**GROUPED)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**GROUPED)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**GROUPED)),
    "gemma": lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(**GROUPED)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**GROUPED, sliding_window=4)),
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**ENCODER)),
    "bert with cross-attention": lambda: transformers.BertLMHeadModel(
        transformers.BertConfig(**DECODER, is_decoder=True, add_cross_attention=True)
    ),
    "roberta": lambda: transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**ENCODER)),
    "distilbert": lambda: transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(
            **TOKENS, dim=16, n_layers=3, n_heads=4, hidden_dim=24, max_position_embeddings=32, num_labels=3
        )
    ),
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGES)),
    "deit": lambda: transformers.DeiTForImageClassification(transformers.DeiTConfig(**IMAGES)),
    "dinov2": lambda: transformers.Dinov2ForImageClassification(
        transformers.Dinov2Config(**{k: v for k, v in IMAGES.items() if k != "intermediate_size"}, mlp_ratio=2)
    ),
    "dinov2 with gates": lambda: transformers.Dinov2ForImageClassification(
        transformers.Dinov2Config(
            **{k: v for k, v in IMAGES.items() if k != "intermediate_size"}, mlp_ratio=2, use_swiglu_ffn=True
        )
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    "t5 with gates": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(**T5, num_decoder_layers=2, feed_forward_proj="gated-gelu")
    ),
    "bart": lambda: transformers.BartForConditionalGeneration(
        transformers.BartConfig(**SEQUENCES, max_position_embeddings=32)
    ),
    "whisper": lambda: transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(**SEQUENCES, num_mel_bins=4, max_source_positions=8, max_target_positions=32)
    ),
}


def perturbed(model: nn.Module) -> nn.Module:
    """Weights with no zero biases and no unit norms, in evaluation mode."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return perturbed(MODELS[name]()).to(dtype)


def inputs_of(model: nn.Module, size: int = 2, length: int = 10) -> dict[str, torch.Tensor]:
    """A batch to call a model with."""
    generator = torch.Generator().manual_seed(2)
    dtype = next(model.parameters()).dtype
    tokens = torch.randint(3, 60, (size, length), generator=generator)
    name = model.main_input_name
    if name == "pixel_values":
        config = model.config
        side = getattr(config, "image_size", 32)
        return {name: torch.randn(size, config.num_channels, side, side, generator=generator).to(dtype)}
    if name == "input_features":
        return {name: torch.randn(size, 4, 16, generator=generator).to(dtype), "decoder_input_ids": tokens}
    if getattr(model.config, "add_cross_attention", False):
        states = torch.randn(size, 5, model.config.hidden_size, generator=generator).to(dtype)
        return {"input_ids": tokens, "encoder_hidden_states": states}
    if model.config.is_encoder_decoder:
        return {"input_ids": tokens, "decoder_input_ids": tokens[:, :6]}
    return {"input_ids": tokens}


@torch.no_grad()
def logits_of(model: nn.Module) -> torch.Tensor:
    return model(**inputs_of(model)).logits
