"""Small models: few layers, narrow and random, of the same class and from the same config as a large one."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig, PreTrainedModel

from ..calibration.contexts import keep_random_state
from .configs import write_layers_
from .groups import StructureGroup

HEADS = (
    "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_decoder_heads"
).split()
KEY_VALUE_HEADS = "num_key_value_heads num_kv_heads n_head_kv".split()
LAYERS = (
    "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers "
    "num_decoder_layers"
).split()
_WIDTHS = "hidden_size d_model n_embd dim embed_dim embedding_size emb_dim word_embed_proj_dim dim_model".split()
INNER = (
    "intermediate_size n_inner ffn_dim d_ff d_inner encoder_ffn_dim decoder_ffn_dim moe_intermediate_size "
    "ffn_hidden_size hidden_dim shared_expert_intermediate_size shared_intermediate_size mlp_hidden_size dim_ff "
    "dff expert_ffn_hidden_size"
).split()
_HEAD_WIDTHS = (
    "head_dim d_kv attention_head_size kv_channels v_head_dim qk_nope_head_dim qk_rope_head_dim rotary_dim dim_head"
).split()
_RANKS = "q_lora_rank kv_lora_rank".split()
_EXPERTS = (
    "num_experts num_local_experts n_routed_experts moe_num_experts num_experts_per_layer".split()
)
_TOP_K = "num_experts_per_tok num_experts_per_token moe_topk moe_k top_k moe_top_k num_experts_per_topk".split()

_N_HEADS, _N_KEY_VALUE_HEADS, _HEAD_WIDTH, _INNER_WIDTH, _VOCABULARY = 4, 2, 8, 24, 288


def configs_in(model_config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """A config and those inside of it."""
    yield model_config
    for name in model_config.sub_configs:
        if isinstance(inner := getattr(model_config, name, None), PretrainedConfig):
            yield from configs_in(inner)


def small_config(model_config: PretrainedConfig, depth: int, *, narrow: bool) -> PretrainedConfig:
    small = copy.deepcopy(model_config)
    for each in configs_in(small):
        _cut_layers_(each, depth)
        _cut_vocabulary_(each)
        if narrow:
            _narrow_(each)
    return small


def _has(c: PretrainedConfig, name: str) -> bool:
    return type(vars(c).get(name)) is int


def _cut_layers_(c: PretrainedConfig, depth: int) -> None:
    for i, name in enumerate([n for n in LAYERS if _has(c, n)]):
        count = getattr(c, name)
        if count > depth + i:
            write_layers_(c, StructureGroup("", "layer", count, (), fields=((name, 1),)), list(range(depth + i)))


def _cut_vocabulary_(c: PretrainedConfig) -> None:
    if not _has(c, "vocab_size") or c.vocab_size <= _VOCABULARY:
        return
    last = _VOCABULARY
    for name, value in vars(c).items():
        if type(value) is int and value >= _VOCABULARY - 32 and name.endswith(("token_id", "token_index")):
            last -= 1
            setattr(c, name, last)
        elif isinstance(value, list) and name.endswith("token_id"):
            setattr(c, name, [min(v, last - 1) for v in value])
    c.vocab_size = _VOCABULARY


def _narrow_(c: PretrainedConfig) -> None:
    old = {n: v for n, v in vars(c).items() if type(v) is int}
    new: dict[str, int] = {}
    heads = next((old[n] for n in HEADS if n in old), None)
    width = next((old[n] for n in _WIDTHS if n in old), None)
    for n in HEADS:
        if n in old:
            new[n] = min(old[n], _N_HEADS)
    for n in KEY_VALUE_HEADS:
        if n in old and old[n] > 1:
            new[n] = min(old[n], _N_HEADS) if old[n] == heads else min(old[n], _N_KEY_VALUE_HEADS)
    for n in _HEAD_WIDTHS:
        if n in old:
            new[n] = min(old[n], _HEAD_WIDTH)
    for n in _WIDTHS:
        if n in old:
            new[n] = _N_HEADS * _HEAD_WIDTH if heads is None or old[n] == width else min(16, old[n])
    for i, n in enumerate(n for n in INNER if n in old):
        new[n] = min(old[n], _INNER_WIDTH + 8 * i)
    for n in _RANKS:
        if n in old:
            new[n] = min(old[n], 16)
    for n in _EXPERTS:
        if n in old:
            new[n] = min(old[n], 8)
    for n in _TOP_K:
        if n in old:
            new[n] = min(old[n], 2)
    for n in ("n_group", "num_expert_group"):
        if n in old:
            new[n] = min(old[n], 2)
    for n in ("topk_group",):
        if n in old:
            new[n] = 1
    for n in ("chunk_size", "mamba_chunk_size"):
        if n in old:
            new[n] = min(old[n], 16)
    for n in ("mamba_d_state", "state_size", "ssm_state_size"):
        if n in old:
            new[n] = min(old[n], 16)
    if "image_size" in old and "patch_size" in old:
        new["image_size"] = 4 * old["patch_size"]
    for n, v in new.items():
        setattr(c, n, v)


def small_model(kind: type[PreTrainedModel], c: PretrainedConfig) -> PreTrainedModel:
    """A model in float64 from a config, with random weights: also those that are zero or one at first."""
    with keep_random_state(torch.device("cpu")):
        torch.manual_seed(0)
        c = copy.deepcopy(c)
        if hasattr(c, "dtype"): c.dtype = None
        model = kind(c).double().eval()
        with torch.no_grad():
            for p in model.parameters():
                p += 0.1 * torch.randn_like(p)
    model.set_attn_implementation("eager") if False else None
    return model
