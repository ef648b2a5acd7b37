"""Entries: what a list of modules has several of, such as experts that are modules of their own."""

from collections.abc import Sequence

from torch import nn

LISTS = (nn.ModuleList, nn.ModuleDict)
"""The modules that hold others, by numbers or names."""


def entries_of(modules: nn.Module) -> dict[str, nn.Module]:
    """The modules with parameters of a list, or of a dict whose keys count them."""
    return {key: module for key, module in modules.named_children() if next(module.parameters(), None) is not None}


def lengths_of(model: nn.Module) -> dict[str, int]:
    """List of modules → how many of these have parameters."""
    return {name: len(entries_of(module)) for name, module in model.named_modules() if isinstance(module, LISTS)}


def keep_entries_(modules: nn.Module, stay: Sequence[int]) -> None:
    """Keeps some entries of a list, by their numbers, which are then counted anew."""
    entries = entries_of(modules)
    keys, kept = list(entries), [list(entries.values())[i] for i in stay]
    for key in keys[len(kept) :]:
        del modules._modules[key]
    modules._modules.update(zip(keys, kept, strict=False))
