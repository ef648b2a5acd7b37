"""Tiny models of the mixture-of-experts types of Transformers, built from their config classes."""

import contextlib
import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from hf_prune.calibration.contexts import eager_experts
from hf_prune.structures.experts import find_mixtures
from tests.structures.models import perturbed

EXPERTS, CHOSEN = 8, 2
# What fields of any of these configs are called; each takes those that it has.
_FIELDS = {
    **dict.fromkeys(("hidden_size", "d_model"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"), 24),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 12),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), CHOSEN),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("encoder_sparse_step", "decoder_sparse_step", "expert_layer_period", "n_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "expert_layer_offset"), 0),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "kv_lora_rank", "q_lora_rank"), 8),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "linear_key_head_dim", "linear_value_head_dim"), 4),
    **dict.fromkeys(("mamba_num_heads", "mamba_n_heads", "d_kv", "rotary_dim"), 4),
    **dict.fromkeys(("mamba_head_dim", "mamba_d_head", "head_dim", "global_head_dim", "moe_latent_size"), 8),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_key_heads", "index_n_heads"), 2),
    **dict.fromkeys(("index_head_dim", "index_topk", "sliding_window"), 8),
    "vocab_size": 60,
    "max_position_embeddings": 64,
    "num_key_value_heads": 2,
    "qk_head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
    "hidden_size_per_layer_input": 4,
    "vocab_size_per_layer_input": 60,
    "num_global_key_value_heads": 2,
}
_LATENT = {"num_key_value_heads": 4}  # Attention with latent keys and values has a key head for each query head.
_PLAIN = """
    afmoe aria_text bailing_hybrid cohere2_moe dots1 ernie4_5_moe exaone_moe flex_olmo glm4_moe gpt_oss granitemoe
    granitemoehybrid granitemoeshared hunyuan_v1_moe hy_v3 jamba jetmoe laguna llama4_text mimo_v2_flash minimax
    minimax_m2 mixtral nemotron_h olmoe phimoe qwen2_moe qwen3_5_moe_text qwen3_moe qwen3_next solar_open
    switch_transformers
"""
MIXTURES: dict[str, dict[str, object]] = {
    **{name: {} for name in _PLAIN.split()},
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "glm_moe_dsa"), _LATENT),
    "gemma4_text": {"enable_moe_block": True},
}
"""Model type → what its config needs beside `_FIELDS`. Their experts can go."""

AVAILABLE = [name for name in MIXTURES if name in CONFIG_MAPPING]  # Later ones came after the oldest Transformers.


def class_of(model_type: str) -> type[transformers.PreTrainedModel]:
    """The class of its models that have a head."""
    names = {**MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    return getattr(transformers, names[model_type])


def build_mixture(model_type: str, dtype: torch.dtype = torch.float64, **fields: object) -> nn.Module:
    """A tiny model with weights that are none of them special, in evaluation mode."""
    kind = CONFIG_MAPPING[model_type]
    known = kind().to_dict()
    given = {name: value for name, value in _FIELDS.items() if name in known}
    config = kind(**{**given, **MIXTURES.get(model_type, {}), **fields})
    torch.manual_seed(0)
    model = perturbed(class_of(model_type)(config))
    with torch.no_grad():  # Corrections by which experts are chosen that would not be otherwise.
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "correction" in name or name.endswith("expert_bias"):
                tensor.normal_()
    return model.to(dtype)


class InFloat64(TorchFunctionMode):
    """Routers compute in float32 whatever the weights are, and round otherwise with fewer rows: in it they do not."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def wide(value):
            return torch.float64 if value is torch.float32 else value

        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(wide, args), **{name: wide(value) for name, value in (kwargs or {}).items()})


@torch.no_grad()
def logits_of(model: nn.Module) -> torch.Tensor:
    tokens = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(5))
    others = {"decoder_input_ids": tokens[:, :5]} if model.config.is_encoder_decoder else {"use_cache": False}
    wide = InFloat64() if model.dtype == torch.float64 else contextlib.nullcontext()
    with eager_experts(model), wide:  # Fused kernels know no float64.
        return model(input_ids=tokens, **others).logits


def barred_logits(model: nn.Module, kept: Mapping[str, torch.Tensor], monkeypatch) -> torch.Tensor:
    """The oracle: what a model gives if every product with a router's weight has −∞ for what is not kept.

    The weights of these experts stay as they are; corrections of their scores are −∞ too.
    """
    model, linear, done = copy.deepcopy(model), F.linear, set()
    weights = {}
    for mixture in find_mixtures(model):
        if mixture.name in kept:
            gone = ~kept[mixture.name]
            weights[mixture.router.module] = (model.get_submodule(mixture.router.module).weight.detach(), gone)
            for name in mixture.router.corrections:
                path, _, attribute = f"{mixture.router.block}.{name}".rpartition(".")
                getattr(model.get_submodule(path), attribute).data.view(-1)[: len(gone)][gone] = -torch.inf

    def with_bars(x, weight, bias=None):
        output = linear(x, weight, bias)
        for name, (own, gone) in weights.items():
            if weight.shape == own.shape and torch.equal(weight.detach(), own.to(weight.dtype)):
                done.add(name)
                output[..., : len(gone)][..., gone] = -torch.inf
        return output

    with monkeypatch.context() as patch:
        patch.setattr(F, "linear", with_bars)
        found = logits_of(model)
    assert done == set(weights)
    return found
