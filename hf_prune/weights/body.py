"""The body of a model: what is left of it without embeddings, heads and routers, and is pruned by default."""

from torch import nn
from transformers import PreTrainedModel

from .timm import ends_of_timm

_HEADS = {"classifier", "score", "qa_outputs", "pooler", "head", "class_predictor", "output_projection", "class_embed"}
_PROJECTIONS = {f"{what}_projection" for what in ("audio", "image", "text", "vision", "visual")}


def in_body(model: nn.Module, name: str, *, fused: bool = False) -> bool:
    """Whether a module belongs to the body of a model.

    Args:
        model: The model.
        name: Name of the module, without what peft has put in between; of the parameter, for fused experts.
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
        if is_module and "gate" in part and any("expert" in child for child, _ in parent.named_children()):
            return False  # A router: it stands beside the experts between which it chooses.
        if any(f"{'.'.join(parts[i:])}.".startswith(f"{end}.") for end in ends_of_timm(parent)):
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
