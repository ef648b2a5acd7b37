"""Configs: what they say of a model's structures, rewritten when some of these go."""

import contextlib
import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..calibration.contexts import silent
from .groups import StructureGroup, Structures, fields_of, kinds_of
from .loading import build_empty, can_say, recorded_in


def own_configs_(model: PreTrainedModel) -> None:
    """Gives a model configs of its own: others may have been built from the same ones, and stay as they are."""
    copies: dict[int, Any] = {}  # What one config holds of another, as of its text part, it goes on holding.
    for module in model.modules():
        if isinstance(config := getattr(module, "config", None), PretrainedConfig):
            setattr(module, "config", copy.deepcopy(config, copies))  # noqa: B010


def write_widths_(model: PreTrainedModel, parts: Structures, kept: Mapping[str, torch.Tensor]) -> None:
    """Writes into the config how many heads and neurons there are, as far as it can say it."""
    by_kind: list[dict[str, int]] = []
    for kind in kinds_of(parts):
        structures = {name: group for name, group in parts.items() if group.kind == kind}
        if any(not kept[name].all() for name in structures):
            by_kind.append(fields_of(structures, {name: int(kept[name].sum()) for name in structures}))
    together = {field: value for fields in by_kind for field, value in fields.items()}
    # A width may be one that fewer heads divide, and those that there were do not.
    for fields in [together] if can_say(model.config, together) else by_kind:
        if can_say(model.config, fields):
            for config in configs_of(model, model):
                set_fields_(config, fields)


def write_each_layer_(model: PreTrainedModel, groups: Structures, kept: Mapping[str, torch.Tensor]) -> None:
    """Writes into the config what each layer has where layers differ, in Transformers' own words, if it takes them.

    Today's classes build all layers alike, and what is recorded makes up for it. Where the config is read, the numbers
    for all layers have to stay readable.
    """
    model_config: Any = model.config
    stacks: set[str] = set()
    layers: dict[int, dict[str, int]] = {}
    for name, group in groups.items():
        if (found := re.match(r"(.+?)\.(\d+)\.", f"{name}.")) is None or not group.fields:
            continue
        stacks.add(found[1])
        before = kept[found[1]][: int(found[2])] if found[1] in groups else torch.ones(int(found[2]))
        own = layers.setdefault(int(before.sum()), {})  # Its number, once others have gone.
        own.update({field: each * int(kept[name].sum()) for field, each in group.fields})
    values: dict[str, set[int]] = {}
    for own in layers.values():
        for field, value in own.items():
            values.setdefault(field, set()).add(value)
    each_layer = {i: {f: value for f, value in own.items() if len(values[f]) > 1} for i, own in layers.items()}
    is_known = hasattr(type(model_config), "per_layer_config") and not model_config.is_heterogeneous
    if not is_known or len(stacks) != 1 or not any(each_layer.values()):
        return
    tried = copy.deepcopy(model_config)
    try:
        _set_each_layer_(tried, each_layer)
        with silent():
            build_empty(type(model), type(tried).from_dict(tried.to_dict()))
    except (RuntimeError, TypeError, ValueError, StrictDataclassError):  # It checks more than it builds.
        return
    _set_each_layer_(model_config, each_layer)


def _set_each_layer_(model_config: Any, each_layer: Mapping[int, Mapping[str, int]]) -> None:
    model_config.allow_global_per_layer_attribute_access = True
    model_config.per_layer_config = copy.deepcopy(each_layer)


def forget_each_layer_(model_config: Any) -> None:
    """Takes back what `write_each_layer_` has written before."""
    if recorded_in(model_config) and getattr(model_config, "is_heterogeneous", False):
        model_config.per_layer_config = None
        del vars(model_config)["allow_global_per_layer_attribute_access"]


def write_layers_(model_config: PretrainedConfig, group: StructureGroup, stay: Sequence[int]) -> None:
    """Writes into a config which layers there are."""
    for field, entries in lists_of_layers(model_config, group).items():
        if len(entries) == group.count:
            said = [entries[i] for i in stay]
            if field == "attention_layers":  # Of GPT-Neo, which derives them.
                model_config.attention_types = [[[entries[i]], 1] for i in stay]
        else:
            said = [stay.index(i) for i in entries if i in stay]
        setattr(model_config, field, said)
    if hasattr(model_config, "stage_names"):  # Of a backbone, which gives the outputs of its last layer by default.
        model_config.stage_names = model_config.stage_names[: len(stay) + 1]
        model_config.set_output_features_output_indices(out_features=None, out_indices=None)
    own = model_config.to_dict().get("per_layer_config") or {}
    set_fields_(model_config, {field: len(stay) for field, _ in group.fields})
    if own:  # Of a family whose layers differ by themselves.
        model_config.per_layer_config = {stay.index(int(i)): each for i, each in own.items() if int(i) in stay}


def lists_of_layers(model_config: PretrainedConfig, group: StructureGroup) -> dict[str, list[Any]]:
    """The lists of a config that go by layers: with an entry for each, or of numbers of some, which names tell.

    Lists without such a name count too if a config with fewer layers has a shorter one by default.
    """
    lists = {name: list(value) for name, value in vars(model_config).items() if isinstance(value, (list, tuple))}
    make: Any = type(model_config)
    shorter: dict[str, Any] = {}
    # It may need more than that, or check what does not go with it.
    with contextlib.suppress(AttributeError, LookupError, TypeError, ValueError, StrictDataclassError):
        shorter = vars(make(**{field: group.count - 1 for field, _ in group.fields}))
    found = {}
    for name, entries in lists.items():
        by_default = shorter.get(name)
        is_named = "layer" in name and not name.startswith("_")
        is_derived = isinstance(by_default, (list, tuple)) and len(by_default) == group.count - 1
        are_numbers = all(type(each) is int and 0 <= each < group.count for each in entries)
        if (len(entries) == group.count and (is_named or is_derived)) or (is_named and are_numbers):
            found[name] = entries
    return found


def set_fields_(model_config: PretrainedConfig, fields: Mapping[str, int]) -> None:
    """Sets fields that belong together in a config that has some of them: of several parts, each has its own."""
    if any(hasattr(model_config, field) for field in fields):
        for field, value in fields.items():
            setattr(model_config, field, value)


def configs_of(model: PreTrainedModel, module: nn.Module) -> list[PretrainedConfig]:
    """The config of a model, and the copies of it that modules below another one have."""
    configs = [model.config, *(getattr(each, "config", None) for each in module.modules())]
    return list({id(config): config for config in configs if isinstance(config, PretrainedConfig)}.values())
