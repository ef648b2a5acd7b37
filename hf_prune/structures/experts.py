"""Experts: where a mixture of experts has them, what chooses among them, and what belongs to one.

They are found from the modules and their shapes, whatever the family: weights whose first axis goes by experts, or a
list of networks that are alike; and beside them a router, which gives a logit for each.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ..weights.targets import Target
from .entries import LISTS, entries_of
from .groups import NOBODY, WITHOUT_STRUCTURES, Member, StructureGroup, Structures, advice_for_wrappers, kinds_of
from .names import EXPERT_COUNTS, EXPERT_GROUPS, EXPERTS_CHOSEN
from .routing import Router, bar_

# How routers, and what is in them, are called; of several modules with a row for each expert these are meant.
_IS_ROUTER = re.compile(r"(^|\.)(\w*router\w*|gate|gating|wg|router_gate)(\.|$)")
_IS_NO_ROUTER = re.compile(r"shared|_proj$|(^|\.)(self_attn|attention|attn)(\.|$)")
_GROUPS_CHOSEN = ("topk_group",)
_IN_A_GROUP = 2  # A group counts by the sum of its two best experts.


@dataclass(frozen=True)
class Mixture:
    """One mixture of experts.

    Attributes:
        name: The module that holds the experts, or their list.
        count: How many there are.
        parameters: The names of the parameters that they own; the first axis of each goes by experts, if they are in
            no list.
        entries: The list that they are in, if they are.
        router: What chooses among them.
        rows: How many logits the router gives; what is behind those of the experts belongs to none.
        extras: Other parameters and buffers with an entry for each expert, by name.
    """

    name: str
    count: int
    parameters: tuple[str, ...]
    entries: str | None
    router: Router
    rows: int
    extras: tuple[str, ...]


def find_mixtures(model: nn.Module) -> list[Mixture]:
    """Finds the mixtures of experts in the layers of a model.

    Raises:
        ValueError: if there are experts in a layer whose router is not found.
    """
    found: dict[str, Mixture] = {}
    lost = []
    for name, count, parameters, entries in _candidates(model):
        # Weights of three axes may be something else, and lists of networks often are.
        are_called_experts = "expert" in f"{name} {type(model.get_submodule(name)).__name__}".lower()
        chosen = _router_of(model, name, count, by_shape=are_called_experts)
        if chosen is None:
            lost += [name] if are_called_experts else []
            continue
        router, rows, block = chosen
        key = f"{block}:{router}"
        if key in found:  # Experts whose matrices are in modules of their own, side by side.
            before = found[key]
            found[key] = Mixture(
                block, count, before.parameters + parameters, None, before.router, rows, before.extras
            )
            continue
        extras = _extras_of(model, block, router, name, rows, count)
        corrections = tuple(each.removeprefix(f"{block}.") for each in extras if "bias" in each.rpartition(".")[2])
        found[key] = Mixture(name, count, parameters, entries, Router(router, block, corrections), rows, extras)
    if lost:
        raise ValueError(
            f"the router of the experts {lost[0]!r} is not found: no one module beside them has a weight with a row "
            f"for each of them. {WITHOUT_STRUCTURES}"
        )
    return list(found.values())


def find_experts(model: nn.Module, targets: Mapping[str, Target]) -> dict[str, StructureGroup]:
    """Finds the experts of a model that can be removed, by the module that they are in.

    Args:
        model: The model, unwrapped.
        targets: The weights that may be pruned; experts stay of which a matrix is none of them.

    Raises:
        ValueError: if there are none, or if a router is not found.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"experts are those of a Transformers model, got {type(model).__name__}. {advice_for_wrappers(model)}"
        )
    mixtures = find_mixtures(model)
    if not mixtures:
        raise ValueError(
            f"{type(model).__name__} has no experts between which a router chooses. Choose another granularity."
        )
    found = {}
    for mixture in mixtures:
        matrices = [name for name in mixture.parameters if model.get_parameter(name).ndim > 1]
        matrices = [name for name in matrices if not name.endswith("bias")]
        if all(name in targets for name in matrices) and not _is_table(model, mixture):
            found[mixture.name] = _group_of(model, mixture)
    if not found:
        raise ValueError(
            f"no expert of {type(model).__name__} is left to prune. Experts stay if one of their matrices is no "
            "target, or if a table says which tokens they get. Name all of them in target_modules."
        )
    return found


def bar_pruned_(model: nn.Module, structures: Structures) -> None:
    """Keeps routers from choosing experts that are pruned, from now on, if experts are among the structures."""
    if "expert" in kinds_of(structures):
        bar_(model, [mixture.router for mixture in find_mixtures(model)])


def _candidates(model: nn.Module) -> Iterator[tuple[str, int, tuple[str, ...], str | None]]:
    """What may be experts of a layer: name, number, parameters, and the list that they are in."""
    for name, module in model.named_modules():
        if not any(part.isdecimal() for part in name.split(".")):
            continue  # It is in no layer.
        own = dict(module.named_parameters(prefix=name, recurse=False))
        fused = [parameter for parameter in own.values() if parameter.ndim == 3 and len(parameter) > 1]
        if fused and not isinstance(module, nn.modules.conv._ConvNd) and len({len(each) for each in fused}) == 1:
            count = len(fused[0])
            yield name, count, tuple(n for n, p in own.items() if p.ndim > 1 and len(p) == count), None
        elif isinstance(module, LISTS):
            entries = entries_of(module).values()
            shapes = {(type(entry), *((n, p.shape) for n, p in entry.named_parameters())) for entry in entries}
            if len(entries) > 1 and len(shapes) == 1:
                yield name, len(entries), tuple(n for n, _ in module.named_parameters(prefix=name)), name


def _router_of(model: nn.Module, experts: str, count: int, *, by_shape: bool) -> tuple[str, int, str] | None:
    """The router of experts: its name, how many logits it gives, and the module that holds both; None if none is.

    It is called so, or, `by_shape`, the only module beside them with a row for each.
    """
    path = experts.rpartition(".")[0]
    while path:
        block = model.get_submodule(path)
        rows = {}
        for name, module in block.named_modules():
            full = f"{path}.{name}" if name else path
            weight = module._parameters.get("weight")
            if full == experts or full.startswith(f"{experts}.") or weight is None or weight.ndim != 2:
                continue
            if not _IS_NO_ROUTER.search(name) and (_IS_ROUTER.search(name) or len(weight) == count):
                rows[full] = len(weight)
        exact = [name for name, length in rows.items() if length == count]
        called = [name for name in rows if _IS_ROUTER.search(name.removeprefix(f"{path}."))]
        named = [name for name in called if rows[name] == count]
        longer = [name for name in called if count < rows[name] <= 2 * count]
        for those in (named, exact if by_shape else [], longer):
            if len(those) == 1:
                return those[0], rows[those[0]], path
            if those:
                return None
        if path.rpartition(".")[2].isdecimal():
            return None  # It would be in another layer.
        path = path.rpartition(".")[0]
    return None


def _extras_of(model: nn.Module, block: str, router: str, experts: str, rows: int, count: int) -> tuple[str, ...]:
    """Parameters and buffers with an entry for each expert, in the router or beside it."""
    holder = model.get_submodule(block)
    inside = router.removeprefix(f"{block}.").partition(".")[0]
    found = []
    for name, tensor in (*holder.named_parameters(), *holder.named_buffers()):
        path, _, attribute = name.rpartition(".")
        full = f"{block}.{name}"
        is_near = not path and re.search("expert|correction|balanc", attribute)
        is_inside = name.startswith(f"{inside}.") and attribute != "weight" and full != f"{router}.bias"
        is_one_each = tensor.numel() in (rows, count) and max(tensor.shape, default=0) == tensor.numel()
        if (is_near or is_inside) and is_one_each and not full.startswith(f"{experts}."):
            found.append(full)
    return tuple(found)


def _is_table(model: nn.Module, mixture: Mixture) -> bool:
    """Whether a table says by token which experts are chosen, as in the first layers of DeepSeek V4."""
    router = model.get_submodule(mixture.router.module)
    return any(buffer.ndim > 1 and not buffer.is_floating_point() for buffer in router.buffers())


def _group_of(model: PreTrainedModel, mixture: Mixture) -> StructureGroup:
    count, block = mixture.count, model.get_submodule(mixture.router.block)
    members = list(_own_members(model, mixture))
    buffers: list[Member] = []
    owners = torch.full((mixture.rows,), NOBODY)
    owners[:count] = torch.arange(count)
    router = model.get_submodule(mixture.router.module)
    bias = f"{mixture.router.module}.bias"
    biases = (bias,) if getattr(router, "bias", None) is not None else ()
    for name in (f"{mixture.router.module}.weight", *biases, *mixture.extras):
        path, _, attribute = name.rpartition(".")
        tensor = getattr(model.get_submodule(path), attribute)
        axis = 0 if attribute == "weight" else tensor.shape.index(tensor.numel())
        (members if isinstance(tensor, nn.Parameter) else buffers).append(
            Member(name, tensor, (axis,), owners[: tensor.shape[axis]])
        )
    inside = {f"{mixture.router.block}.{path}".removesuffix("."): each for path, each in block.named_modules()}
    around = {path: each for path, each in model.named_modules() if f"{mixture.router.block}.".startswith(f"{path}.")}
    holders = {"": model, **around, **inside}
    attributes = [
        (path, name, 1)
        for path, module in holders.items()
        for name in EXPERT_COUNTS
        if vars(module).get(name) == count
    ]
    runs, least = _limits(model, block, count)
    return StructureGroup(
        mixture.name,
        "expert",
        count,
        tuple(members),
        attributes=tuple(attributes),
        fields=tuple((name, 1) for name in EXPERT_COUNTS if _counts(model, name, count)),
        runs=runs,
        least=least,
        buffers=tuple(buffers),
        entries=mixture.entries,
    )


def _counts(model: PreTrainedModel, field: str, count: int) -> bool:
    config = model.config.get_text_config()
    return field not in config.attribute_map and getattr(config, field, None) == count


def _own_members(model: nn.Module, mixture: Mixture) -> Iterator[Member]:
    """The matrices and biases of experts."""
    numbers: dict[str, int] = {}
    for name in mixture.parameters:
        parameter, owners = model.get_parameter(name), torch.arange(mixture.count)
        if mixture.entries is not None:
            key = name.removeprefix(f"{mixture.entries}.").partition(".")[0]
            owners = torch.full((len(parameter),), numbers.setdefault(key, len(numbers)))
        yield Member(name, parameter, (0,), owners)


def _limits(model: PreTrainedModel, block: nn.Module, count: int) -> tuple[int, int]:
    """Into how many equal runs experts are divided, and how many have to stay."""
    places = [block, *block.children(), model.config.get_text_config()]
    chosen = _first(places, EXPERTS_CHOSEN) or 1
    if found := re.search(r"Top(\d)", " ".join(type(each).__name__ for each in block.modules())):
        chosen = max(chosen, int(found[1]))
    groups, groups_chosen = _first(places, EXPERT_GROUPS), _first(places, _GROUPS_CHOSEN) or 1
    if not groups:
        return 1, chosen
    in_each = max(math.ceil(chosen / min(groups_chosen, groups)), min(_IN_A_GROUP, count // groups))
    return groups, groups * in_each


def _first(places: list[object], names: tuple[str, ...]) -> int | None:
    values = (getattr(place, name, None) for place in places for name in names)
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool)), None)
