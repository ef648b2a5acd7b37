"""The body of a model: what is left of it without embeddings, heads and routers, and is pruned by default."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

_HEADS = {"classifier", "score", "qa_outputs", "pooler", "head", "class_predictor", "output_projection", "class_embed"}
_PROJECTIONS = {f"{what}_projection" for what in ("audio", "image", "text", "vision", "visual")}
_STEMS = ("conv", "stem", "embed", "proj")
_NUMBERS = re.compile(r"(\.\d+)+$")


def in_body(model: nn.Module, name: str, *, fused: bool = False) -> bool:
    """Whether a module belongs to the body of a model.

    Args:
        model: The model.
        name: The module, by what peft has not put in between; or a parameter, where a module holds several.
        fused: Whether it is such a parameter: one of fused experts.
    """
    parts, parent = name.split("."), model
    for i, part in enumerate(parts):
        if i > 0:
            parent = getattr(parent, parts[i - 1])
        has_body = isinstance(parent, PreTrainedModel) and parent.base_model is not parent
        if has_body and part != parent.base_model_prefix:
            return False  # A head: it stands beside the base model.
        # The weights of fused experts have no module of their own, and are named "gate" for another reason.
        is_module = i + 1 < len(parts) or not fused
        if is_module and "gate" in part and any("expert" in name for name, _ in parent.named_children()):
            return False  # A router: it stands beside the experts between which it chooses.
        if any(f"{'.'.join(parts[i:])}.".startswith(f"{end}.") for end in _ends_of_timm(parent)):
            return False
        if part in _PROJECTIONS and _gives_projections(parent):
            return False
    if any(_is_head(part) or "router" in part for part in parts) or parts[0] == "fc":
        return False
    # Only near the end: what embeds audio or images may be an encoder with layers of its own.
    return not any("embed" in part or part.endswith(("stem", "patch_conv")) for part in parts[-3:])


def _is_head(name: str) -> bool:
    """Whether heads are called so; those of detectors that find boxes are called embeddings."""
    return name in _HEADS or name.endswith(("_head", "bbox_embed")) or name.startswith("predict_")


def _gives_projections(module: nn.Module) -> bool:
    """Whether projections are what a model gives, as CLIP and ALIGN do, and not what another part of it reads."""
    is_pair = len(_PROJECTIONS.intersection(name for name, _ in module.named_children())) > 1
    return is_pair or hasattr(module, "temperature") or type(module).__name__.endswith("WithProjection")


def config_of_timm(module: nn.Module) -> Mapping[str, Any] | None:
    """What a model of timm says of itself: the size of its images, its first convolution, and its classifier."""
    found = [getattr(module, name, None) for name in ("pretrained_cfg", "default_cfg")]
    return next((each for each in found if isinstance(each, Mapping) and "first_conv" in each), None)


def _ends_of_timm(module: nn.Module) -> Iterator[str]:
    """The names of the first convolutions and the classifiers in a model of timm."""
    config = config_of_timm(module) or {}
    for names in (config.get("first_conv"), config.get("classifier")):
        for name in [names] if isinstance(names, str) else names or ():
            # A stem of several convolutions is named by its first, as conv1.0; so is all of a VGG, by features.0.
            stem = _NUMBERS.sub("", name)
            name = stem if any(part in stem.rpartition(".")[2] for part in _STEMS) else name
            yield from (name, name.replace(".", "_", 1))  # The latter where it gives features alone.
