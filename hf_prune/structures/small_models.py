"""Small models: few layers, narrow and random, of the same class and from the same config as a large one."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ..calibration.contexts import keep_random_state, silent
from ..calibration.passes import call
from .comparing import computing_exactly
from .configs import write_layers_
from .example_inputs import example_batch
from .groups import StructureGroup
from .layer import layer_kind, lists_of_layers_in
from .loading import build_empty
from .names import (
    EXPERT_COUNTS,
    EXPERTS_CHOSEN,
    HEAD_WIDTH_FIELDS,
    KEY_VALUE_HEAD_FIELDS,
    LAYER_FIELDS,
    NEURON_FIELDS,
    QUERY_HEAD_FIELDS,
    STREAM_WIDTH_FIELDS,
)

_N_HEADS, _HEAD_WIDTH, _INNER_WIDTH, _TOKENS, _PATCHES = 6, 8, 24, 288, 4
_WIDTH = _N_HEADS * _HEAD_WIDTH
_AT_MOST = {
    **dict.fromkeys(QUERY_HEAD_FIELDS, _N_HEADS),
    **dict.fromkeys(HEAD_WIDTH_FIELDS, _HEAD_WIDTH),
    **dict.fromkeys(["linear_num_key_heads", "linear_num_value_heads", "linear_num_heads", "index_n_heads"], 2),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank", "o_lora_rank", "mamba_d_state", "state_size", "chunk_size"], 16),
    **dict.fromkeys(["mamba_chunk_size", "ssm_state_size", "mamba_dt_rank"], 16),
    **dict.fromkeys(EXPERT_COUNTS, 8),
    **dict.fromkeys([*EXPERTS_CHOSEN, "n_group", "num_expert_group"], 2),
    **dict.fromkeys(["topk_group", "mamba_n_groups", "n_groups"], 1),
}
"""Fields of configs → what they are at most in a narrow model."""
_LARGEST = 2**23  # The most parameters that a small model may have.


def small_model_like(model: PreTrainedModel) -> PreTrainedModel:
    """A small model in float64 that can be called, of a model's class; narrow, unless its class cannot be so.

    It has the first layers of the model's, so many that there is one of each kind.

    Raises:
        ValueError: if none can be built or called, or only large ones.
    """
    depth, why = _depth(model), []
    for narrow in (True, False):
        try:
            small_config = shorten(model.config, depth, narrow=narrow)
            size = sum(parameter.numel() for parameter in build_empty(type(model), small_config).parameters())
            if size > _LARGEST:
                raise ValueError(f"it cannot be built narrower than with {size} parameters")
            small = random_model(type(model), small_config)
            call_exactly(copy.deepcopy(small))  # Some keep what they have computed, with its graph.
            return small
        except Exception as error:  # Configs and models check all kinds of things, each in its own way.
            why.append(f"{type(error).__name__}: {error}")
    raise ValueError(f"no small {type(model).__name__} can be built and called ({why[0]})")


def class_and_config(model: PreTrainedModel) -> tuple[type[PreTrainedModel], str]:
    """What is equal for models that look alike: their class, and their config as JSON."""
    return type(model), json.dumps(model.config.to_dict(), sort_keys=True, default=str)


def random_model(kind: type[PreTrainedModel], small_config: PretrainedConfig) -> PreTrainedModel:
    """A loaded model in float64, with random weights: also those that are zero or one at first."""
    how: Any = dict(dtype=torch.float64, attn_implementation="eager")
    with keep_random_state(torch.device("cpu")), torch.device("cpu"), silent():
        torch.manual_seed(0)
        model: Any = kind._from_config(copy.deepcopy(small_config), **how)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        # Buffers that are not saved, such as tables of positions, are computed otherwise where a model is loaded.
        model = kind.from_pretrained(None, config=copy.deepcopy(small_config), state_dict=model.state_dict(), **how)
    return model.double().eval()


def call_exactly(model: PreTrainedModel) -> Any:
    """The output of a small model on an example, in float64 wherever it would compute in float32."""
    batch = {n: v.double() if v.is_floating_point() else v for n, v in (example_batch(model) or {}).items()}
    with computing_exactly(model):
        return call(model, batch)


def shorten(model_config: PretrainedConfig, depth: int, *, narrow: bool) -> PretrainedConfig:
    """A config with the first layers of another one and few tokens; maybe narrow, with few heads and experts."""
    small = copy.deepcopy(model_config)
    for each in _configs_in(small):
        vars(each).pop("quantization_config", None)  # What was recorded of other shapes is of no matter here.
        _drop_layers_(each, depth)
        _drop_tokens_(each)
        if narrow:
            _narrow_(each)
    with silent():
        return type(small).from_dict(small.to_dict())  # As it is once it was saved: some correct what they read.


def _depth(model: PreTrainedModel) -> int:
    """How many layers a small model needs to have one of each kind, and what may follow on the last."""
    depth = 2
    for layers in lists_of_layers_in(model.base_model).values():
        kinds = [layer_kind(layer) for layer in layers]
        if len(set(kinds)) > 1:
            depth = max(depth, 2 + max(kinds.index(kind) for kind in set(kinds)) + 1)
    return depth


def _configs_in(model_config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """A config, and those of the parts of a model that it holds."""
    yield model_config
    for name in model_config.sub_configs:
        if isinstance(inner := getattr(model_config, name, None), PretrainedConfig):
            yield from _configs_in(inner)


def _whole_numbers(model_config: PretrainedConfig) -> dict[str, int]:
    return {name: value for name, value in vars(model_config).items() if type(value) is int}


def _drop_layers_(model_config: PretrainedConfig, depth: int) -> None:
    """Leaves the first layers; of a decoder one more than of an encoder, so that they can be told apart."""
    fields = [name for name in LAYER_FIELDS if name in _whole_numbers(model_config)]
    for i, name in enumerate(fields):
        count = getattr(model_config, name)
        if count > depth + i:
            write_layers_(model_config, StructureGroup("", "layer", count, (), fields=((name, 1),)), range(depth + i))


def _drop_tokens_(model_config: PretrainedConfig) -> None:
    """Leaves the first tokens; those with a meaning get numbers among them."""
    said = _whole_numbers(model_config)
    if said.get("vocab_size", 0) <= _TOKENS:
        return
    if "vocab_size_per_layer_input" in said:
        model_config.vocab_size_per_layer_input = _TOKENS
    last = _TOKENS
    for name, value in list(vars(model_config).items()):
        if name.endswith(("token_id", "token_index")):
            if type(value) is int and value >= _TOKENS // 2:
                last -= 1
                setattr(model_config, name, last)
            elif isinstance(value, list):
                setattr(model_config, name, [min(each, last - 1) for each in value])
    model_config.vocab_size = _TOKENS


def _narrow_(model_config: PretrainedConfig) -> None:
    """Lowers widths and the numbers of heads, neurons and experts; what is equal, or differs, goes on doing so."""
    said = _whole_numbers(model_config)
    heads = next((said[name] for name in QUERY_HEAD_FIELDS if name in said), None)
    width = next((said[name] for name in STREAM_WIDTH_FIELDS if name in said), None)
    new = {name: min(value, _AT_MOST[name]) for name, value in said.items() if name in _AT_MOST}
    for name in KEY_VALUE_HEAD_FIELDS:
        if name in said and heads is not None:
            few = min(heads, _N_HEADS)
            # Where one is alone, nobody could tell what belongs to it.
            fewer = min(said[name], _N_HEADS // 2) if said[name] > 1 else few // 2 if few % 2 == 0 else 1
            new[name] = few if said[name] == heads else fewer
    for name in STREAM_WIDTH_FIELDS:
        if name in said:
            new[name] = _WIDTH if said[name] == width else min(said[name], _WIDTH // 2)
    # Each its own, so that they can be told apart.
    for i, name in enumerate(name for name in NEURON_FIELDS if name in said):
        new[name] = min(said[name], _INNER_WIDTH + 8 * i)
    expanded = said.get("mamba_expand", said.get("expand", 0)) * _WIDTH
    if expanded and "mamba_d_head" in said:
        new |= {"mamba_n_heads": _N_HEADS, "mamba_d_head": expanded // _N_HEADS}
        new |= {"mamba_d_ssm": expanded} if "mamba_d_ssm" in said else {}
    if "image_size" in said and "patch_size" in said:
        new["image_size"] = _PATCHES * said["patch_size"]
    for name, value in new.items():
        setattr(model_config, name, value)
