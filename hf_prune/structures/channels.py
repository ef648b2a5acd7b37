"""Channels of convolutional networks, by the dependency graph of torch-pruning.

Source: Fang et al. 2023, "DepGraph: Towards Any Structural Pruning", arXiv 2301.12900.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from ..calibration.contexts import undisturbed
from ..weights.targets import Target
from .example_inputs import first_convolution, image_shape
from .families import FAMILIES
from .groups import NOBODY, WITHOUT_STRUCTURES, Member, StructureGroup, advice_for_wrappers


def find_channels(model: nn.Module, targets: Mapping[str, Target], multiple_of: int) -> dict[str, StructureGroup]:
    """Finds the channels of a convolutional network that can be removed with equal outputs.

    A channel goes through all layers that add up what they compute, or multiply it; what produces it and what reads it
    are its members, normalizations included. Channels that a LayerNorm or GroupNorm reads across are left alone, and
    so are those that a weight produces which may not be pruned.

    Args:
        model: The model, unwrapped.
        targets: The weights that may be pruned.
        multiple_of: The number of channels that remain is a multiple of this.

    Returns:
        The module that produces the channels, the first if there are several → channels.

    Raises:
        ModuleNotFoundError: if torch-pruning is not installed.
        ValueError: if the model is no such network, or no channel can be removed.
    """
    if why := _why_not(model):
        raise ValueError(
            f"{type(model).__name__} is no convolutional network of images, and has no channels to remove: {why}"
        )
    try:
        from torch_pruning import DependencyGraph
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('channels need torch-pruning: pip install "hf_prune[cnn]".') from error
    names = {module: name for name, module in model.named_modules()}
    weight = next(model.parameters())
    image = torch.zeros(image_shape(model), dtype=weight.dtype, device=weight.device)
    found: dict[str, StructureGroup] = {}
    with (
        # The graph is read off gradients, and what is frozen has none.
        undisturbed(model, [parameter for parameter in model.parameters() if parameter.is_floating_point()]),
        torch.enable_grad(),
        _calls_of(model) as called,
    ):
        try:
            graph = DependencyGraph().build_dependency(
                model, {"pixel_values": image}, output_transform=_outputs, verbose=False
            )
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"channels of {type(model).__name__} cannot be followed ({error}). {WITHOUT_STRUCTURES}"
            ) from error
        if strangers := [names[module] for module in called if module not in graph.module2node]:
            raise ValueError(
                f"channels of {type(model).__name__} cannot be followed: {strangers[0]!r} computes what is in none of "
                f"its outputs. {WITHOUT_STRUCTURES}"
            )
        for group in graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]):
            structures = _structures(graph, group, names, targets, multiple_of)
            if structures is not None:
                found[structures.name] = structures
    if not found:
        raise ValueError(
            f"no channel of {type(model).__name__} can be removed: all are read across by a norm, or computed by "
            f"weights that are not targets. Name these in target_modules. {WITHOUT_STRUCTURES}"
        )
    return found


def is_convolutional(model: nn.Module) -> bool:
    """Whether a model is a convolutional network that takes images, and attends to nothing."""
    return _why_not(model) is None


def _why_not(model: nn.Module) -> str | None:
    """Why a model is no convolutional network that takes images, and what to do; None if it is."""
    if not isinstance(model, PreTrainedModel):
        return f"it is not a Transformers model. {advice_for_wrappers(model)}"
    is_known = model.config.model_type in FAMILIES
    others = "Choose granularity head, neuron, head+neuron or layer." if is_known else WITHOUT_STRUCTURES
    attention = next((name for name, module in model.named_modules() if "Attention" in type(module).__name__), None)
    if attention is not None:
        return f"{attention!r} is an attention layer. {others}"
    if model.main_input_name != "pixel_values" or first_convolution(model) is None:
        return f"it takes no images, or has no Conv2d. {others}"
    return None


@contextlib.contextmanager
def _calls_of(model: nn.Module) -> Iterator[set[nn.Module]]:
    """Notes which layers are called that read channels."""
    called: set[nn.Module] = set()
    readers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d))]
    hooks = [module.register_forward_hook(lambda module, *_: called.add(module)) for module in readers]
    try:
        yield called
    finally:
        for hook in hooks:
            hook.remove()


def _outputs(output: Any) -> list[torch.Tensor]:
    """All outputs, times one, so that what ends in them can be told from what another layer reads."""
    return [value * 1 for value in tree_leaves(dict(output)) if torch.is_tensor(value) and value.requires_grad]


def _structures(
    graph: Any, group: Any, names: Mapping[nn.Module, str], targets: Mapping[str, Target], multiple_of: int
) -> StructureGroup | None:
    """The channels of a group; None if they cannot be removed."""
    members: list[Member] = []
    for item in group:
        module = item.dep.target.module
        if isinstance(module, nn.Parameter) or item.dep.target.type.name == "OUTPUT":
            return None
        if module not in names:
            continue  # An operation, which owns nothing.
        produces = graph.is_out_channel_pruning_fn(item.dep.handler)
        owned = list(_members(module, names[module], produces, item.idxs, item.root_idxs))
        if not owned or any(produces and m.parameter.ndim > 1 and m.name not in targets for m in owned):
            return None
        members += owned
    root = group[0].dep.target.module
    return StructureGroup(names[root], "channel", len(group[0].idxs), tuple(members), multiple=multiple_of)


def _members(
    module: nn.Module, name: str, produces: bool, positions: list[int], owners: list[int]
) -> Iterator[Member]:
    """What a module has for each channel; nothing if it is of a kind that cannot lose channels."""
    axis = 0
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        # A convolution that is depthwise has one kernel for each channel, whichever side is asked for.
        depthwise = isinstance(module, nn.Conv2d) and module.groups == module.in_channels == module.out_channels > 1
        if getattr(module, "groups", 1) > 1 and not depthwise:
            return
        axis = 0 if produces or depthwise else 1
    elif not (isinstance(module, nn.BatchNorm2d) and module.affine):
        return
    for attribute in ("weight", "bias") if axis == 0 else ("weight",):
        if (parameter := getattr(module, attribute)) is not None:
            owner = torch.full((parameter.shape[axis],), NOBODY)
            owner[positions] = torch.tensor(owners)
            yield Member(f"{name}.{attribute}", parameter, (axis,), owner)
