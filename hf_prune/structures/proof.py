"""Proof: that what is said of a family's structures is so, on a small model of the class."""

import copy
import dataclasses
from collections.abc import Collection, Iterator, Sequence

import torch
from transformers import PreTrainedModel

from .comparing import Differs, Reference
from .discovery import stacks_in
from .families import Family, Heads, Neurons, Stack
from .groups import Structures
from .heads_and_neurons import instances, stacks_of, structures_of
from .removal import Removal
from .shrinking import apply_compared_
from .small_models import HEADS, INNER, KEY_VALUE_HEADS

_COUNTS = "num_attention_heads num_key_value_heads num_heads n_heads n_head num_kv_heads n_kv_heads heads num_head".split()
_PRODUCTS = "all_head_size inner_dim split_size attention_inner_dim attn_dim".split()
_WIDE = "embed_dim hidden_size d_model dim".split()
_INNER_ATTRIBUTES = "intermediate_size ffn_dim hidden_dim d_ff inner_dim".split()

Part = Heads | Neurons


def why_not_exact(model: PreTrainedModel, family: Family, kinds: Collection[str], *, uniform: bool) -> str | None:
    """Why structures of some kinds cannot be removed from a small model as a family describes them; None if so."""
    try:
        for kept in _trials(structures_of(stacks_of(model, family), kinds), uniform):
            tried = copy.deepcopy(model)
            removal = Removal(tried, tried, structures_of(stacks_of(tried, family), kinds), kept)
            removal.require_some_left()
            apply_compared_(removal, Reference(tried, removal.masks))
    except (Differs, ValueError) as error:
        return str(error)
    return None


def _trials(structures: Structures, uniform: bool) -> Iterator[dict[str, torch.Tensor]]:
    """Which structures are kept in each trial: some go of each group, or each layer alone."""
    layers = {name: group for name, group in structures.items() if group.kind == "layer"}
    whole = {name: torch.ones(group.count, dtype=torch.bool) for name, group in structures.items()}
    others = {name: group for name, group in structures.items() if name not in layers}
    kept = dict(whole)
    for i, (name, group) in enumerate(others.items()):
        levels = group.counts_that_may_go()
        gone = levels[min(1 if uniform else 1 + i % 2, len(levels) - 1)]
        each = gone // group.runs
        start = i % (group.count // group.runs - each + 1)
        kept[name] = whole[name].clone()
        kept[name].view(group.runs, -1)[:, start : start + each] = False
    if others:
        yield kept
    for name, group in layers.items():
        for i in range(group.count if group.count > 1 else 0):
            if i not in group.stay:
                yield {**whole, name: torch.arange(group.count) != i}


def find_family(model: PreTrainedModel) -> tuple[Family, dict[str, str]]:
    """The family of a small model, and why some kinds cannot be removed."""
    stacks = stacks_in(model)
    refused: dict[str, str] = {}
    found: dict[str, list[Part]] = {}
    for kind in ("head", "neuron"):
        own = [dataclasses.replace(s, parts=tuple(p for p in s.parts if p.kind == kind)) for s in stacks]
        own = [s for s in own if s.parts]
        if not own:
            refused[kind] = "none was found"
            continue
        for variant in _variants(model, own, kind):
            if (why := why_not_exact(model, variant, (kind,), uniform=False)) is None:
                break
            refused.setdefault(kind, why)
        else:
            continue
        refused.pop(kind, None)
        for said in _with_fields(model, variant):
            if why_not_exact(model, said, (kind,), uniform=True) is None:
                break
        else:
            said = variant
        for s in said:
            found.setdefault(s.layers, []).extend(s.parts)
    family = tuple(dataclasses.replace(s, parts=tuple(found.get(s.layers, ()))) for s in stacks)
    if why := why_not_exact(model, family, ("layer",), uniform=True):
        refused["layer"] = why
    return family, refused


def _variants(model: PreTrainedModel, stacks: Sequence[Stack], kind: str) -> Iterator[Family]:
    """Families of one kind with the attributes that may count it, the likeliest first."""
    ways = [_COUNTS + _PRODUCTS, _COUNTS + _PRODUCTS + _WIDE, []] if kind == "head" else [_INNER_ATTRIBUTES, []]
    for names in ways:
        yield _changed(stacks, lambda stack, part, names=names: _with_attributes(model, stack, part, names))
    for names in ways[:2] if any(part.tables for stack in stacks for part in stack.parts) else ():
        yield _changed(
            [_without_copies(stack) for stack in stacks],
            lambda stack, part, names=names: dataclasses.replace(
                _with_attributes(model, stack, part, names), is_shared=True
            ),
        )


def _with_fields(model: PreTrainedModel, family: Family) -> Iterator[Family]:
    """The same family with the fields of the config that may count its structures."""
    for fixed in ("head_dim", None):
        yield _changed(family, lambda stack, part, fixed=fixed: _with_own_fields(model, stack, part, fixed))


def _changed(stacks, change) -> Family:
    return tuple(
        dataclasses.replace(stack, parts=tuple(dict.fromkeys(change(stack, part) for part in stack.parts)))
        if False else dataclasses.replace(stack, parts=tuple(change(stack, part) for part in stack.parts))
        for stack in stacks
    )


def _without_copies(stack: Stack) -> Stack:
    """Of parts with and without tables, those with them: where a layer has none, they do without."""
    with_tables = {part.module for part in stack.parts if part.tables}
    parts = [part for part in stack.parts if part.tables or part.module not in with_tables]
    return dataclasses.replace(stack, parts=tuple(parts))


def _with_attributes(model: PreTrainedModel, stack: Stack, part: Part, names: Collection[str]) -> Part:
    found: dict[str, None] = {}
    for layer, own in instances(model, stack, part):
        module, count, width = layer.get(own.module), layer.count(own), layer.width(own)
        queries = _queries(layer, own)
        for path, inner in module.named_modules():
            for name in names:
                value = vars(inner).get(name)
                if type(value) is int and value in {count, queries, width}:
                    found[f"{path}.{name}" if path else name] = None
    return dataclasses.replace(part, attributes=tuple(found))


def _queries(layer, part: Part) -> int:
    size = layer.get(part.module, part.size) if isinstance(part, Heads) and part.size else 0
    return layer.width(part) // size if size else layer.count(part)


def _with_own_fields(model: PreTrainedModel, stack: Stack, part: Part, fixed: str | None) -> Part:
    config = vars(model.config)
    sides = [side for side in ("encoder", "decoder") if side in stack.layers]
    layer, own = next(iter(instances(model, stack, part)))
    count, queries = layer.count(own), _queries(layer, own)

    def named(names: Sequence[str], value: int) -> tuple[str, ...]:
        found = [n for n in names if config.get(n) == value]
        sided = [n for n in found if any(side in n for side in sides)]
        return tuple((sided or [n for n in found if "coder" not in n])[:1])

    if isinstance(part, Heads):
        heads, pairs = named(HEADS, queries), named(KEY_VALUE_HEADS, count)
        return dataclasses.replace(part, fields=heads + pairs if heads else (), fixed=fixed)
    return dataclasses.replace(part, fields=named(INNER, count))
