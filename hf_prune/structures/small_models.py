"""Small models: few layers, narrow and random, of the same class and from the same config as a large one."""

import copy
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
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
    EXPERT_GROUPS,
    EXPERTS_CHOSEN,
    HEAD_WIDTH_FIELDS,
    KEY_VALUE_HEAD_FIELDS,
    LAYER_FIELDS,
    NEURON_FIELDS,
    QUERY_HEAD_FIELDS,
    STREAM_WIDTH_FIELDS,
)

_N_HEADS, _HEAD_WIDTH, _INNER_WIDTH, _EXPERTS, _TOKENS, _PATCHES, _SIDE = 6, 8, 24, 4, 288, 4, 64
_WIDTH = _N_HEADS * _HEAD_WIDTH
_AT_MOST = {
    **dict.fromkeys(QUERY_HEAD_FIELDS, _N_HEADS),
    **dict.fromkeys([*HEAD_WIDTH_FIELDS, "d_head"], _HEAD_WIDTH),
    **dict.fromkeys(["linear_num_key_heads", "linear_num_value_heads", "linear_num_heads", "index_n_heads"], 2),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank", "o_lora_rank", "chunk_size", "mamba_chunk_size"], 16),
    **dict.fromkeys(["mamba_d_state", "state_size", "ssm_state_size"], 4),
    **dict.fromkeys(EXPERT_COUNTS, _EXPERTS),
    **dict.fromkeys([*EXPERTS_CHOSEN, *EXPERT_GROUPS], 2),
    **dict.fromkeys(["topk_group", "mamba_n_groups", "n_groups", "H_cycles", "L_cycles"], 1),
    "mamba_dt_rank": 16,
    "swa_num_attention_heads": _N_HEADS,
    "swa_num_key_value_heads": _N_HEADS // 2,
    "swa_head_dim": _HEAD_WIDTH,
    "block_size": 32,
    "local_radius": 15,
    "global_block_size": 4,
    "num_global_tokens": 4,
    "num_layers_per_stack": 2,
}
"""Fields of configs → what they are at most in a narrow model."""
_DEPTHS_OF_STAGES = ("depths", "block_sizes")
_LARGEST = 2**23  # The most parameters that a small model may have.


def small_model_like(model: PreTrainedModel) -> PreTrainedModel:
    """A small model in float64 that can be called, of a model's class; narrow, unless its class cannot be so.

    It has a layer of each kind that the model has, and one that follows: some of the model's, where the config lists
    what each of them is, or else the first ones.

    Raises:
        ValueError: if none can be built or called, or only large ones.
    """
    kinds = _kinds_of_layers(model)
    first = sorted({0, *(each.index(kind) for each in kinds.values() for kind in each)})
    some, all_before, why = [*first, first[-1] + 1], list(range(first[-1] + 2)), []
    for layers, narrow in itertools.product([some, all_before] if some != all_before else [some], (True, False)):
        try:
            small_config = shorten(model.config, layers, narrow=narrow)
            empty = build_empty(type(model), small_config)
            _require_small(empty)
            if layers != all_before:
                _require_kinds(_kinds_of_layers(empty), kinds, layers)
            small = random_model(type(model), small_config)
            call_exactly(copy.deepcopy(small))  # Some keep what they have computed, with its graph.
            return small
        except Exception as error:  # Configs and models check all kinds of things, each in its own way.
            why.append(f"{type(error).__name__}: {error}")
    narrow_with_all_before = why[-2]
    raise ValueError(f"no small {type(model).__name__} can be built and called ({narrow_with_all_before})")


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


def shorten(model_config: PretrainedConfig, layers: Sequence[int], *, narrow: bool) -> PretrainedConfig:
    """A config with some layers of another one and few tokens; maybe narrow, with few heads and experts."""
    small = copy.deepcopy(model_config)
    for each in _configs_in(small):
        vars(each).pop("quantization_config", None)  # What was recorded of other shapes is of no matter here.
        _drop_layers_(each, layers)
        _drop_tokens_(each)
        if narrow:
            _narrow_(each)
            _narrow_stages_(each)
    with silent():
        return type(small).from_dict(small.to_dict())  # As it is once it was saved: some correct what they read.


def _kinds_of_layers(model: PreTrainedModel) -> dict[str, list[str]]:
    """List of layers → their kinds."""
    return {
        path: [layer_kind(each) for each in layers] for path, layers in lists_of_layers_in(model.base_model).items()
    }


def _require_small(empty: PreTrainedModel) -> None:
    size = sum(parameter.numel() for parameter in empty.parameters())
    if size > _LARGEST:
        raise ValueError(f"it cannot be built narrower than with {size} parameters")


def _require_kinds(
    built: Mapping[str, Sequence[str]], kinds: Mapping[str, Sequence[str]], layers: Sequence[int]
) -> None:
    """Requires that the kinds of the layers that were built are those of the ones that were to stay."""
    for path, own in built.items():
        stay = _with_more(layers, len(own) - len(layers))
        if len(own) < len(kinds[path]) and list(own) != [kinds[path][i] for i in stay]:
            raise ValueError(f"the config cannot say which layers of {path!r} there are")


def _with_more(layers: Sequence[int], more: int) -> list[int]:
    """Some layers, and so many that follow on the last one."""
    return [*layers, *range(layers[-1] + 1, layers[-1] + 1 + more)]


def _configs_in(model_config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """A config, and those of the parts of a model that it holds."""
    yield model_config
    for name in model_config.sub_configs:
        if isinstance(inner := getattr(model_config, name, None), PretrainedConfig):
            yield from _configs_in(inner)


def _whole_numbers(model_config: PretrainedConfig) -> dict[str, int]:
    return {name: value for name, value in vars(model_config).items() if type(value) is int}


def _drop_layers_(model_config: PretrainedConfig, layers: Sequence[int]) -> None:
    """Leaves some layers; of a decoder one more than of an encoder, so that they can be told apart."""
    for name in _DEPTHS_OF_STAGES:
        if isinstance(depths := vars(model_config).get(name), (list, tuple)):
            setattr(model_config, name, [min(each, 2) for each in depths])
    fields = [name for name in (*LAYER_FIELDS, "num_blocks") if name in _whole_numbers(model_config)]
    for i, name in enumerate(fields):
        count, stay = getattr(model_config, name), _with_more(layers, i)
        if count > stay[-1]:
            write_layers_(model_config, StructureGroup("", "layer", count, (), fields=((name, 1),)), stay)


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
    if any(said.get(name, 1) > 1 for name in EXPERT_GROUPS):
        new |= {name: min(said[name], 2 * _EXPERTS) for name in EXPERT_COUNTS if name in said}
    for name in KEY_VALUE_HEAD_FIELDS:
        if name in said and heads is not None:
            few = min(heads, _N_HEADS)
            # Where one is alone, nobody could tell what belongs to it.
            fewer = min(said[name], _N_HEADS // 2) if said[name] > 1 else few // 2 if few % 2 == 0 else 1
            new[name] = few if said[name] == heads else fewer
    widest = _WIDTH // 2 if "depths" in vars(model_config) else _WIDTH  # Of stages, each is wider than the one before.
    for name in STREAM_WIDTH_FIELDS:
        if name in said:
            new[name] = widest if said[name] == width else min(said[name], _WIDTH // 2)
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


def _narrow_stages_(model_config: Any) -> None:
    """The same for what configs of images list: a number for each stage of layers, or for each side."""
    listed = {name: value for name, value in vars(model_config).items() if isinstance(value, (list, tuple))}
    if {"hidden_sizes", "num_attention_heads"} <= listed.keys():
        heads = listed["num_attention_heads"]
        widths = [_HEAD_WIDTH // 2 * each for each in heads]
        model_config.hidden_sizes = list(map(min, listed["hidden_sizes"], widths))
    for name, most in (("mlp_ratios", 2), ("key_dim", _HEAD_WIDTH), ("image_size", _SIDE)):
        if name in listed:
            setattr(model_config, name, [min(each, most) for each in listed[name]])
