"""Proof: that structures can be removed where a family is said to have them, on a small model of the class."""

import copy
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from ..calibration.contexts import rolled_back, unpartitioned
from .comparing import Reference
from .discovery import of_the_same_side, stacks_in
from .families import Family, Heads, Neurons, Part, Stack
from .groups import Structures, masks_of
from .layer import Layer, layer_kind
from .names import KEY_VALUE_HEAD_FIELDS, NEURON_FIELDS, QUERY_HEAD_FIELDS, SIZES_OF_HEADS, SIZES_OF_NEURONS
from .small_models import class_and_config, small_model_like
from .stacks import stacks_of, structures_of
from .trial import some_of_each, why_differs

NOTHING_FOUND = "none were found in its layers"
"""Why structures that a model may not even have cannot be removed from it."""

_KINDS_OF_PARTS = ("head", "neuron")


@dataclass(frozen=True)
class Proved:
    """A family, and what cannot be removed from its models.

    Attributes:
        family: Where the structures are; empty if none were found.
        refused: Kind → why structures of it cannot be removed.
    """

    family: Family
    refused: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class _Trials:
    """Removals from one small model, which is as it was after each."""

    model: PreTrainedModel
    _references: dict[object, Reference] = field(default_factory=dict)
    _known: dict[object, str | None] = field(default_factory=dict)

    def why_not_exact(self, family: Family, kind: str, *, uniform: bool = False) -> str | None:
        """Why heads or neurons cannot be removed where a family has them; None if they can."""
        try:
            structures = structures_of(stacks_of(self.model, family), (kind,))
        except ValueError as error:
            return str(error)
        return self.why_differs(structures, some_of_each(structures, uniform=uniform), is_said=uniform)

    def why_differs(
        self, structures: Structures, kept: Mapping[str, torch.Tensor], *, is_said: bool = False
    ) -> str | None:
        """As the function of this name; what was tried before, if under another description, is known."""
        masks = masks_of(structures, kept)
        gone = tuple((name, mask.numpy().tobytes()) for name, mask in sorted(masks.items()))
        counted = tuple((g.attributes, g.run_attributes, g.fields, g.run_fields, g.fixed) for g in structures.values())
        key = (gone, counted, is_said)
        if key not in self._known:
            try:
                if gone not in self._references:
                    self._references[gone] = Reference(self.model, masks)
            except ValueError as error:
                return str(error)
            with rolled_back(self.model):
                self._known[key] = why_differs(
                    self.model, structures, kept, is_said=is_said, reference=self._references[gone]
                )
        return self._known[key]


_proved: dict[tuple[type[PreTrainedModel], str, str], Proved] = {}


def prove(model: PreTrainedModel, described: Family | None) -> Proved:
    """Finds the family of a model, or takes the one that was described, and tries it on a small model of the class.

    The result is kept for models of the same class and config.

    Args:
        model: The model, unwrapped; only its class, its config and the kinds of its layers are looked at.
        described: What a user has described; None to find it.
    """
    key = *class_and_config(model), repr(described)
    if key not in _proved:
        with unpartitioned():
            try:
                small = small_model_like(model)
            except ValueError as error:
                # A description that cannot be tried here is tried when something is removed.
                _proved[key] = Proved(described or (), {} if described else {"layer": str(error)})
            else:
                trials = _Trials(small)
                _proved[key] = _find(trials) if described is None else _tried(trials, described)
    return _proved[key]


def _tried(trials: _Trials, described: Family) -> Proved:
    """What was described, and which kinds of it cannot be removed from a small model."""
    kinds = {part.kind for stack in described for part in stack.parts}
    wrong = {kind: trials.why_not_exact(described, kind) for kind in sorted(kinds)}
    return _with_others(trials, described, {kind: why for kind, why in wrong.items() if why is not None})


def _find(trials: _Trials) -> Proved:
    """The family of a small model, as far as it is proved."""
    stacks, refused = stacks_in(copy.deepcopy(trials.model)), {}
    found: dict[str, list[Part]] = {stack.layers: [] for stack in stacks}
    for kind in _KINDS_OF_PARTS:
        own = tuple(dataclasses.replace(s, parts=tuple(p for p in s.parts if p.kind == kind)) for s in stacks)
        proved, why = _prove_parts(trials, tuple(stack for stack in own if stack.parts))
        for stack in proved:
            found[stack.layers] += stack.parts
        if why is not None:
            refused[kind] = why
    if not any(found.values()):
        return Proved((), {**refused, "layer": refused["head"]})
    family = tuple(dataclasses.replace(stack, parts=tuple(found[stack.layers])) for stack in stacks)
    return _with_others(trials, family, refused)


def _with_others(trials: _Trials, family: Family, refused: dict[str, str]) -> Proved:
    """A family whose heads and neurons are tried; its queries, which are those of heads, and its layers are too."""
    family, why_layers = _try_layers(trials, family)
    others = {"query": refused.get("head") or _why_queries_differ(trials, family), "layer": why_layers}
    return Proved(family, {**refused, **{kind: why for kind, why in others.items() if why is not None}})


def _why_queries_differ(trials: _Trials, family: Family) -> str | None:
    """As `_Trials.why_differs`; None too if there are none, which a model says best by itself."""
    try:
        structures = structures_of(stacks_of(trials.model, family), ("query",))
    except ValueError:
        return None
    for uniform in (False, True):
        if (why := trials.why_differs(structures, some_of_each(structures, uniform=uniform))) is not None:
            return why
    return None


def _prove_parts(trials: _Trials, stacks: Family) -> tuple[Family, str | None]:
    """Some parts of one kind with the attributes and fields that count them; of several maybe only some.

    Returns:
        The stacks with the parts that are proved, and why there are none.
    """
    if not stacks:
        return (), NOTHING_FOUND
    found, why = _prove_together(trials, stacks)
    if found is None and sum(len(stack.parts) for stack in stacks) > 1:
        alone = [dataclasses.replace(stack, parts=(part,)) for stack in stacks for part in stack.parts]
        found = tuple(one for each in alone for one in _prove_together(trials, (each,))[0] or ())
    return found or (), None if found else why


def _prove_together(trials: _Trials, stacks: Family) -> tuple[Family | None, str | None]:
    """The same parts with what counts them, and why nothing that was tried does."""
    why, kind = None, stacks[0].parts[0].kind
    try:
        for family in _with_attributes(trials.model, stacks):
            if (its := trials.why_not_exact(family, kind)) is None:
                said = _with_fields(trials.model, family)
                exact = (each for each in said if trials.why_not_exact(each, kind, uniform=True) is None)
                return next(exact, family), None
            why = why or its
    except ValueError as error:  # Something is no number of heads that looks like one.
        why = str(error)
    return None, why


def _try_layers(trials: _Trials, family: Family) -> tuple[Family, str | None]:
    """The family with the kinds of layers that have to stay, and why, if all have to."""
    stays: dict[str, set[str]] = {stack.layers: set() for stack in family}
    why: str | None = None
    may_go = False
    for stack in family:
        try:
            groups = structures_of(stacks_of(trials.model, (stack,)), ("layer",))
        except ValueError as error:
            return family, str(error)
        for name, group in groups.items():
            kinds = [layer_kind(layer) for layer in trials.model.get_submodule(name).children()]
            # The first of each kind: those of Jamba come in periods, and behind it all others are of another kind.
            tried = {*map(kinds.index, kinds), group.count - 1}
            for i in sorted(tried) if group.count > 1 else ():
                kept = {name: torch.arange(group.count) != i}
                if kinds[i] in stays[stack.layers] or i in group.stay:
                    continue
                if its := trials.why_differs(groups, kept):
                    stays[stack.layers].add(kinds[i])
                    why = why or its
            may_go = may_go or not set(kinds) <= stays[stack.layers]
    if not may_go:
        return family, why or "there is one alone"
    return tuple(dataclasses.replace(s, stay=tuple(sorted(stays[s.layers]))) for s in family), None


def _with_attributes(small: PreTrainedModel, stacks: Family) -> Iterator[Family]:
    """The stacks with the attributes of modules that may count their structures, the likeliest first."""
    is_heads = stacks[0].parts[0].kind == "head"
    names = SIZES_OF_HEADS if is_heads else SIZES_OF_NEURONS
    flat = [[name for some in names[:n] for name in some] for n in range(1, len(names) + 1)]

    def by_each(some: Sequence[str]) -> Callable[[Stack, Part], Part]:
        return lambda stack, part: _counted_by(small, stack, part, some)

    def by_all(some: Sequence[str]) -> Callable[[Stack, Part], Part]:
        # What all layers share, as a position bias or what is read from the config, has to be said at once.
        def change(stack: Stack, part: Part) -> Part:
            said = _said_by(small, stack, _counted_by(small, stack, part, some), "head_dim")
            return dataclasses.replace(said, is_shared=True) if isinstance(said, Heads) else said

        return change

    without = [_without_copies(stack) for stack in stacks]
    for some in (*flat, []) if without == list(stacks) else ():  # Else a layer reads the table of another one.
        yield _change_parts(stacks, by_each(some))
    for some in flat if is_heads else ():
        yield _change_parts(without, by_all(some))


def _with_fields(small: PreTrainedModel, family: Family) -> Iterator[Family]:
    """The family with the fields of the config that may count its structures, the likeliest first."""
    for fixed in ("head_dim", None):
        yield _change_parts(family, functools.partial(_said_by, small, fixed=fixed))


def _change_parts(stacks: Sequence[Stack], change: Callable[[Stack, Part], Part]) -> Family:
    """The stacks with each of their parts replaced."""
    return tuple(
        dataclasses.replace(stack, parts=tuple(change(stack, part) for part in stack.parts)) for stack in stacks
    )


def _without_copies(stack: Stack) -> Stack:
    """Of heads with and without tables, those with them: a layer that has none does without."""
    with_tables = {part.module for part in stack.parts if part.tables}
    parts = tuple(part for part in stack.parts if part.tables or part.module not in with_tables)
    return dataclasses.replace(stack, parts=parts)


def _counted_by(small: PreTrainedModel, stack: Stack, part: Part, names: Collection[str]) -> Part:
    """A part with its attributes of some names that are as many as its structures, or as wide as all of them."""
    found: dict[str, None] = {}
    for layer, own in _instances(small, stack, part):
        sizes = {layer.count(own), _queries(layer, own), layer.width(own)}
        for path, module in layer.get(own.module).named_modules():
            for name in names:
                if type(vars(module).get(name)) is int and vars(module)[name] in sizes:
                    found[f"{path}.{name}" if path else name] = None
    return dataclasses.replace(part, attributes=tuple(found))


def _said_by(small: PreTrainedModel, stack: Stack, part: Part, fixed: str | None = None) -> Part:
    """A part with the fields of the config that say how many structures it has."""
    said = vars(small.config)
    layer, own = next(iter(_instances(small, stack, part)))

    def named(names: Sequence[str], value: int) -> tuple[str, ...]:
        return of_the_same_side(stack.layers, [name for name in names if said.get(name) == value])[:1]

    if isinstance(part, Neurons):
        return dataclasses.replace(part, fields=named(NEURON_FIELDS, layer.count(own)))
    heads, pairs = named(QUERY_HEAD_FIELDS, _queries(layer, own)), named(KEY_VALUE_HEAD_FIELDS, layer.count(own))
    return dataclasses.replace(part, fields=heads + pairs if heads else (), fixed=fixed)


def _queries(layer: Layer, part: Part) -> int:
    """How many heads of queries a layer has; of neurons their number."""
    size = layer.get(part.module, part.size) if isinstance(part, Heads) and part.size else 0
    return layer.width(part) // size if size else layer.count(part)


def _instances(model: PreTrainedModel, stack: Stack, part: Part) -> Iterator[tuple[Layer, Part]]:
    """The layers of a model that have a part of a stack, and the part as they have it."""
    for layers in stacks_of(model, (dataclasses.replace(stack, parts=(part,)),)):
        for layer in layers.layers:
            for own in layer.parts_of(layers.stack):
                yield layer, own
