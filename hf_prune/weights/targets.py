"""Targets: which parameters of a model are pruned, and how each one is read as a matrix."""

import dataclasses
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers.pytorch_utils import Conv1D

from ..distributed.shards import has_shards, is_sharded, own, require_by_rows, rows_held, whole
from .body import in_body

logger = logging.getLogger(__name__)

# Order of the axes that puts a weight's output before its input, and whatever is independent of both in front.
_AXES: dict[type[nn.Module], tuple[int, ...]] = {
    nn.Linear: (0, 1),
    Conv1D: (1, 0),  # GPT-2's layer stores [in, out].
    nn.Conv2d: (2, 3, 0, 1),
}
_TYPES = "the weights of Linear, Conv1D, Conv2d and fused (3-D) experts"
# Names that peft gives: to the layer inside one of its own; to a module that it trains whole, and to the copies of it.
_WRAPPED, _REPLACED, _COPIES = "base_layer", "original_module", "modules_to_save"
_INSERTED = re.compile(rf"\.(?:{_WRAPPED}|{_REPLACED}|{_COPIES}\.[^.]+)(?=\.|$)")
_NOT_A_NAME = re.compile(r"[*+?|()\[\]{}^$\\]")


class Adapter(NamedTuple):
    """What LoRA adds to a weight that reads `[out, in]`: `s B A`.

    Attributes:
        a: `[r, in]`, all of it.
        b: `[out, r]`, all of it.
        scaling: `s`.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


@dataclass(frozen=True)
class Target:
    """One parameter that is pruned.

    Attributes:
        name: The parameter's name in the model.
        weight: The parameter itself, or what `own` or `whole` has made of it.
        axes: The permutation of its axes under which it reads `[…, out, in]`.
        parts: The number of equal parts of its rows that have inputs of their own: fused experts, or the groups of a
            convolution.
        rows: Which rows of the parameter the weight holds, if they are the process's own; None if all.
        adapters: What is added to the parameter where it is not zero; those that are not masked add to zeros too.
    """

    name: str
    weight: torch.Tensor
    axes: tuple[int, ...]
    parts: int = 1
    rows: slice | None = None
    adapters: tuple[Adapter, ...] = ()

    @property
    def module(self) -> str:
        """The name of the module that holds the parameter, or of the parameter where a module holds several.

        Without what peft has put in between.
        """
        return plain_name(self.name).removesuffix(".weight")

    def own(self) -> "Target":
        """The rows of a sharded parameter that this process holds, as one part; a whole one as it is."""
        if not is_sharded(self.weight):
            return self
        return dataclasses.replace(self, weight=own(self.weight.detach()), parts=1, rows=rows_held(self.weight))

    def whole(self) -> "Target":
        """All rows of a sharded parameter, gathered by all processes; a whole one as it is."""
        return dataclasses.replace(self, weight=whole(self.weight.detach())) if is_sharded(self.weight) else self

    def fit(self, values: torch.Tensor) -> torch.Tensor:
        """`values` that broadcast with the parameter → those that go with the rows which the weight holds."""
        if self.rows is None:
            return whole(values)
        return own(values) if is_sharded(values) or len(values) == 1 else values[self.rows]

    @property
    def merged(self) -> torch.Tensor:
        """The weight with what adapters add to it where it is not zero, which makes a new tensor, if there are any."""
        weight = self.weight.detach()
        if not self.adapters:
            return weight
        added = torch.stack([adapter.scaling * (adapter.b @ adapter.a) for adapter in self.adapters]).sum(0)
        added = added.permute(self._inverse)[self.rows or slice(None)]
        return torch.where(weight != 0, weight + added, 0).to(weight.dtype)

    @property
    def offset(self) -> int:
        """Where in its storage the parameter begins."""
        return int(self.weight.storage_offset())

    @property
    def out_features(self) -> int:
        """Width of the output dimension (of one expert, one kernel position)."""
        return self.weight.shape[self.axes[-2]]

    @property
    def in_features(self) -> int:
        """Width of the input dimension (channels of one group for a convolution)."""
        return self.weight.shape[self.axes[-1]]

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """The weight's shape, for fused experts that of one expert."""
        return tuple(self.weight.shape[-2:] if self.weight.ndim == 3 else self.weight.shape)

    def to_matrix(self, values: torch.Tensor) -> torch.Tensor:
        """`values` of the weight's shape → `[rows, in]`, output by output, the input dimension last."""
        return values.permute(self.axes).reshape(-1, self.in_features)

    def from_matrix(self, matrix: torch.Tensor) -> torch.Tensor:
        """The inverse of `to_matrix`."""
        return matrix.reshape([self.weight.shape[axis] for axis in self.axes]).permute(self._inverse)

    def to_rows(self, values: torch.Tensor) -> torch.Tensor:
        """`values` of the weight's shape → `[parts, rows of a part, fan_in]`: each row is one dot product."""
        rows = values.flatten(1) if values.ndim == 4 else self.to_matrix(values)
        return rows.reshape(self.parts, -1, rows.shape[-1])

    def from_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """The inverse of `to_rows`."""
        return rows.reshape(self.weight.shape) if self.weight.ndim == 4 else self.from_matrix(rows)

    def per_input(self, values: torch.Tensor) -> torch.Tensor:
        """`values [parts, fan_in]` → the same for each row, of a shape that broadcasts with the weight."""
        if self.weight.ndim == 4:
            rows = len(self.weight) // self.parts if self.parts > 1 else 1
            return values.repeat_interleave(rows, 0).reshape(-1, *self.weight.shape[1:])
        return values.unsqueeze(1).reshape([*values.shape[: self.weight.ndim - 2], 1, -1]).permute(self._inverse)

    @property
    def fan_in(self) -> int:
        """Number of inputs of a row, positions of a kernel included."""
        return self.weight[0].numel() if self.weight.ndim == 4 else self.in_features

    @property
    def _inverse(self) -> list[int]:
        return sorted(range(len(self.axes)), key=self.axes.__getitem__)


def find_targets(
    model: nn.Module,
    target_modules: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
) -> dict[str, Target]:
    r"""Finds the parameters to prune.

    By default these are the weights of Linear, Conv1D and Conv2d in the body of the model and the 3-D weights of
    fused experts. Not among them: embeddings (the convolutions that embed patches or pixels included), heads
    (whatever lies outside the base model, classifier, `lm_head`, pooler and others by name, projections that a dual
    encoder gives, and what a model of timm calls its classifier), expert routers, norms, biases, and any weight that
    is tied to one that is left out; nor peft's adapters, whereas the layers that they wrap are, and its copies of
    modules that it trains whole (`modules_to_save`), in place of what they replace.

    The words are PEFT's: a string is a regular expression that has to match the whole module name; a list holds
    exact names or their last components. An entry of a list that cannot be a name, because it holds one of
    `*+?|()[]{}^$\`, is read as a regular expression, so that one works on the command line too.

    Args:
        model: The model, unwrapped.
        target_modules: The modules to prune instead of the default ones, heads and embedding convolutions included
            if they are named. Fused experts are named by their module or, one by one, by the parameter.
        exclude_modules: Modules to leave out of what was found.

    Returns:
        Parameter name → target, in the model's own order.

    Raises:
        ValueError: if the model is wrapped for several processes, a pattern matches nothing, nothing is left to prune,
            or a weight cannot be pruned because it is quantized, offloaded, or computed from other parameters.
    """
    if isinstance(model, (nn.DataParallel, DistributedDataParallel)) or type(model).__name__ == "DeepSpeedEngine":
        raise ValueError(
            f"this {type(model).__name__} wraps a model, whose processes would wait for each other in its passes. "
            "Give the model inside: accelerator.unwrap_model(model), or model.module."
        )
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            f"the weights of this {type(model).__name__} are quantized; pruning needs floating-point weights. "
            "Load the model without quantization_config, prune it, and quantize the result."
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"weights of this {type(model).__name__} are not in memory (meta device): were they offloaded by a "
            "device_map? Load the model whole, on one device."
        )
    candidates = list(_candidates(model))
    included, excluded = _expressions(target_modules), _expressions(exclude_modules)
    for option, expressions in (("target_modules", included), ("exclude_modules", excluded)):
        for entry, expression in expressions.items():
            if not any(_matches(target, [expression]) for target in candidates):
                ends = dict.fromkeys(target.module.rpartition(".")[2] for target in candidates)
                raise ValueError(
                    f"{option}={entry!r} matches no prunable module of {type(model).__name__}. Prunable are {_TYPES}; "
                    f"their names end in {', '.join(ends) or '(there is none)'}."
                )
    chosen = [
        target
        for target in candidates
        if (
            in_body(model, target.module, fused=target.weight.ndim == 3)
            if target_modules is None
            else _matches(target, included.values())
        )
        and not _matches(target, excluded.values())
    ]
    targets = _without_tied(model, chosen)
    if not targets:
        raise ValueError(
            f"no parameter of {type(model).__name__} is left to prune. Prunable are {_TYPES}; "
            "name their modules in target_modules."
        )
    for target in targets.values():
        _require_prunable(target)
    for name, parameter in model.named_parameters():  # All of them: the best weights of a round are not targets alone.
        require_by_rows(name, parameter)
    if has_shards(model) and (odd := [name for name, target in targets.items() if not is_sharded(target.weight)]):
        raise ValueError(
            f"{odd[0]!r} is whole on each process, and other weights are sharded. Shard all, or exclude it."
        )
    return targets


def _candidates(model: nn.Module) -> Iterator[Target]:
    """Every weight of a prunable kind, once for each of its names, in the model's order.

    Of what peft has wrapped only the part that the model is, and would be after a merge.
    """
    beside: tuple[str, ...] = ()
    for prefix, module in model.named_modules(remove_duplicate=False):
        beside += tuple(f"{prefix}.{name}.".removeprefix(".") for name in _beside(module))
        if f"{prefix}.".startswith(beside):
            continue
        axes = next((axes for kind, axes in _AXES.items() if isinstance(module, kind)), None)
        if axes is not None:
            parts = getattr(module, "groups", 1)
            yield Target(f"{prefix}.weight" if prefix else "weight", module.weight, axes, parts)
        elif type(module).__name__.endswith("Experts"):
            # Llama 4 stores its experts as [expert, in, out] without the attribute that says so. Where FSDP2 has
            # sharded them by themselves, they are of a class derived from theirs.
            is_llama4 = any(kind.__name__ == "Llama4TextExperts" for kind in type(module).__mro__)
            transposed = getattr(module, "is_transposed", is_llama4)
            for name, parameter in module.named_parameters(prefix, recurse=False):
                if parameter.ndim == 3:
                    yield Target(name, parameter, (0, 2, 1) if transposed else (0, 1, 2), len(parameter))


def _beside(module: nn.Module) -> Iterator[str]:
    """The children of a module, by name, that are no part of the model as peft computes it.

    Those are adapters, encoders of prompts, copies that are not in use, and a module that a copy replaces.
    """
    copies = getattr(module, _COPIES, None)
    if isinstance(getattr(module, _WRAPPED, None), nn.Module) and hasattr(module, "active_adapters"):
        yield from (name for name, _ in module.named_children() if name != _WRAPPED)
    elif hasattr(module, "peft_config") and hasattr(module, "prompt_encoder"):
        yield "prompt_encoder"
    elif isinstance(getattr(module, _REPLACED, None), nn.Module) and isinstance(copies, nn.ModuleDict):
        wrapper: Any = module
        used = [] if wrapper.disable_adapters else [name for name in wrapper.active_adapters if name in copies]
        yield from (f"{_COPIES}.{name}" for name in copies if name not in used)
        if used:
            yield _REPLACED


def are_sharded(targets: Iterable[Target]) -> bool:
    """Whether each process holds a part of each target."""
    return any(is_sharded(target.weight) for target in targets)


def plain_name(name: str) -> str:
    """A name without what peft has put in between."""
    return _INSERTED.sub("", name)


def is_regex(entry: str) -> bool:
    """Whether an entry of a list of modules is read as a regular expression."""
    return _NOT_A_NAME.search(entry) is not None


def _expressions(patterns: str | Sequence[str] | None) -> dict[str, re.Pattern[str]]:
    """Each entry → what the whole name of a module has to match: see `find_targets`."""
    if isinstance(patterns, str):
        return {patterns: re.compile(patterns)}
    return {e: re.compile(e if is_regex(e) else rf"(.*\.)?{re.escape(e)}") for e in patterns or ()}


def _matches(target: Target, expressions: Iterable[re.Pattern[str]]) -> bool:
    names = (target.module, plain_name(target.name).rpartition(".")[0])
    return any(expression.fullmatch(name) for expression in expressions for name in names)


def _without_tied(model: nn.Module, chosen: Sequence[Target]) -> dict[str, Target]:
    """One target for each parameter, less those that go by another name which was not chosen."""
    names_of: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name)
    chosen_names = {target.name for target in chosen}
    targets: dict[str, Target] = {}
    for target in chosen:
        names = names_of.get(id(target.weight), [target.name])
        left_out = [name for name in names if name not in chosen_names]
        if left_out:
            logger.warning("%s is not pruned: it is tied to %s, which is not a target.", target.name, left_out[0])
        elif target.name == names[0]:
            targets[target.name] = target
    return targets


def _require_prunable(target: Target) -> None:
    if not isinstance(target.weight, nn.Parameter):
        raise ValueError(
            f"the weight of {target.module!r} is computed from other parameters (a parametrization, or "
            "torch.nn.utils.prune). Make it permanent first, for example with torch.nn.utils.prune.remove."
        )
    if not target.weight.is_floating_point() or target.weight.dtype.itemsize == 1:
        raise ValueError(
            f"the weight of {target.module!r} is quantized (dtype {target.weight.dtype}); pruning needs "
            "floating-point weights. Load the model without quantization, or add the module to exclude_modules."
        )


def bias_of(model: nn.Module, target: Target) -> nn.Parameter | None:
    """The bias of a projection; None if it has none, or is one of several experts."""
    path, _, attribute = target.name.rpartition(".")
    bias = getattr(model.get_submodule(path), "bias", None) if attribute == "weight" and target.parts == 1 else None
    return bias if isinstance(bias, nn.Parameter) else None
