"""Shrinking: what is pruned as a whole is removed, and the model gets smaller."""

import logging
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..calibration.contexts import rolled_back, whole_on_error
from ..weights.targets import find_targets
from .by_kind import find_by_kind, require_no_adapters
from .channels import find_channels, is_convolutional
from .comparing import Differs, Reference, why_not_generated
from .experts import bar_pruned_
from .groups import KINDS, StructureGroup, Structures, count_gone, kept_in, nonzeros
from .loading import build_empty
from .removal import Removal, whole_of
from .routing import unbar_
from .trial import apply_compared_

logger = logging.getLogger(__name__)

_KINDS = ("head", "query", "neuron", "expert", "layer", "width")


def shrink(
    model: PreTrainedModel,
    masks: Mapping[str, torch.Tensor] | None = None,
    *,
    batch: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Removes the structures that are pruned as a whole: heads, neurons, channels, layers and others of `KINDS`.

    The outputs stay what they are, up to rounding: on a small batch they are compared, also with those of the model
    that its config would build. The weights that remain are new tensors; an optimizer that was made before holds the
    old ones. The model's config says what the model is now, as far as a config of its family can. Everything else is
    recorded in it, and `from_pretrained` reads it where hf_prune has been imported. Of a model that is a part of
    another one, such as the language model of a LLaVA, the config of the whole says or records it too.

    Args:
        model: The model, unwrapped; changed in place.
        masks: Parameter → bool mask, True = kept, such as `PruningTrainerCallback.masks`; if None, what is not zero
            is kept.
        batch: What the model is called with to compare outputs, where none can be made from its config.

    Returns:
        The model.

    Raises:
        ValueError: if no structure is pruned as a whole, if all in one group are, if the family is unknown, if the
            model carries adapters, or if the outputs would be others, because the family is described wrongly. The
            model is then as it was.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from hf_prune import PruningConfig, prune
        >>> config = LlamaConfig(
        ...     vocab_size=8, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> model = LlamaForCausalLM(config)
        >>> prune(model, PruningConfig(sparsity=0.5, granularity="head+neuron")).units
        'heads and neurons'
        >>> shrink(model).model.layers[0].mlp.down_proj.in_features
        8
    """
    require_no_adapters(model)
    structures = find_removable(model, [kind for kind in _KINDS if kind != "width" or _may_be_narrowed(model, masks)])
    kept = kept_in(structures, nonzeros(structures) if masks is None else masks)
    for name, group in structures.items():
        if group.kind == "query":  # With heads go all of their queries, whatever goes of the others.
            heads = next((n for n, g in structures.items() if g.kind == "head" and name.startswith(f"{n}.")), None)
            if heads is not None:
                kept[name] &= kept[heads].repeat_interleave(group.count // group.runs)
    if count_gone(structures, kept)[0] == 0:
        raise ValueError(
            f"there is nothing to remove: nothing of the kinds {', '.join(KINDS)} is pruned as a whole. Prune with "
            "one of them as granularity first."
        )
    remove_(model, structures, kept, batch)
    return model


def _may_be_narrowed(model: nn.Module, masks: Mapping[str, torch.Tensor] | None) -> bool:
    """Whether a channel of the embeddings is pruned for all tokens, as each that goes is; this is quickly seen."""
    if not isinstance(model, PreTrainedModel):
        return True
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:
        return True
    config: Any = model.config.get_text_config()
    if not isinstance(embeddings, nn.Embedding) or embeddings.embedding_dim != getattr(config, "hidden_size", None):
        return True  # They are projected to the residual stream, or there are none.
    kept: torch.Tensor | None = embeddings.weight.detach()
    if masks is not None:
        kept = next((masks.get(n) for n, p in model.named_parameters() if p is embeddings.weight), None)
    return kept is not None and not bool(kept.any(0).all())


def find_removable(model: nn.Module, kinds: Collection[str] = _KINDS) -> dict[str, StructureGroup]:
    """Finds all structures that `shrink` can remove from a model, of those kinds that can be removed from it.

    If there is no such kind, it raises what `find_by_kind` and `find_channels` do.
    """
    if is_convolutional(model):
        return find_channels(model, find_targets(model, ".*"), multiple_of=1)
    targets, errors = find_targets(model), []
    structures: dict[str, StructureGroup] = {}
    for kind in kinds:
        try:
            structures |= find_by_kind(model, (kind,), targets, multiple_of=1)
        except ValueError as error:  # What cannot be removed cannot have been pruned, and the other kinds can.
            logger.debug("No %s is removed: %s", kind, error)
            errors.append(error)
    if not structures:
        raise errors[0]
    return structures


def remove_(
    model: PreTrainedModel,
    structures: Structures,
    kept: Mapping[str, torch.Tensor],
    batch: Mapping[str, Any] | None = None,
) -> None:
    """Removes structures from a model, in place, and requires that it computes what it did with them at zero.

    Args:
        model: The model, unwrapped.
        structures: Every group of each kind of which something goes: the fields of a config count them all.
        kept: Group → `[count]` bools, False for what goes.
        batch: As in `shrink`.

    Raises:
        ValueError: if nothing is left of a group, or the outputs are others. The model is then as it was.
    """
    removal = Removal(model, whole_of(model), structures, kept)
    removal.require_some_left()
    build_empty(type(model), model.config)  # Else nothing could be recorded.
    bar_pruned_(model, structures)
    reference = None
    try:
        reference = Reference(model, removal.masks, batch, removal.channels)
    except ValueError as error:
        logger.warning(
            "The shrunk model could not be compared with the masked one: %s. Pass shrink(..., batch=...).", error
        )
    layers_go = any(structures[name].kind == "layer" for name in removal.gone)
    could_generate = layers_go and why_not_generated(model) is None
    try:
        with whole_on_error(removal.whole):
            apply_compared_(removal, reference)
    except Differs as error:
        if reference is None or reference.is_what_its_config_builds(model, removal.whole, removal.masks):
            raise _changes_outputs(removal, batch, error) from error
        logger.warning(
            "%s has hooks or modules that its config does not build: from_pretrained gives another model, as it did "
            "before shrinking.",
            type(model).__name__,
        )
        _remove_without_loading_(removal, reference, batch)
    unbar_(model)  # Nothing is left to bar.
    if len({int(kept[name].sum()) for name, group in structures.items() if group.kind == "expert"}) > 1:
        _unbalance_(model)
    if could_generate and (why := why_not_generated(model)):
        _warn_of_generation(model, why)
    removal.forget_alignment_()


def _unbalance_(model: PreTrainedModel) -> None:
    """Turns off a loss that adds up experts over layers, if these have several numbers of them."""
    if getattr(model.config, "output_router_logits", False):
        model.config.output_router_logits = False
        logger.warning(
            "The layers of %s have different numbers of experts, and the loss that balances experts needs as many in "
            "each layer: output_router_logits is False now. Prune with uniform=True to go on with it.",
            type(model).__name__,
        )


def _remove_without_loading_(removal: Removal, reference: Reference, batch: Mapping[str, Any] | None) -> None:
    try:
        with whole_on_error(removal.whole):
            apply_compared_(removal, reference, load=False)
    except Differs as error:
        raise _changes_outputs(removal, batch, error) from error


def _changes_outputs(removal: Removal, batch: Mapping[str, Any] | None, error: Differs) -> ValueError:
    """The error that names the first group without which, by itself, the model has other outputs."""
    model, structures = removal.model, removal.structures
    culprit = removal.gone[0]
    for name in removal.gone:
        alone = removal.of(name)
        try:
            with rolled_back(removal.whole):
                apply_compared_(alone, Reference(model, alone.masks, batch, alone.channels))
        except Differs as its:
            culprit, error = name, its
            break
        except ValueError:  # It cannot be called by itself, and so not compared.
            continue
    kinds = KINDS[structures[culprit].kind]
    advice = (
        "The network relies on a width that cannot be traced."
        if is_convolutional(model) or structures[culprit].kind == "width"
        else "Its routing depends on the number of experts in a way that is not known. Choose another granularity."
        if structures[culprit].kind == "expert"
        else f"Check how the family {model.config.model_type!r} is described: it must name every projection, norm and "
        f"attribute that depends on the number of {kinds} (see describe_family)."
    )
    return ValueError(
        f"removing {kinds} of {culprit!r} changes what {type(model).__name__} computes: {error}. {advice} The model "
        "is as it was."
    )


def _warn_of_generation(model: PreTrainedModel, why: str) -> None:
    advice = ""
    if why_not_generated(model, use_cache=False) is None:
        advice = (
            " generate(..., use_cache=False) works: Transformers sizes a cache by the number of the encoder's layers, "
            "see https://github.com/huggingface/transformers/issues/30508."
        )
    logger.warning(
        "%s can be called, but generate fails with the layers that are left: %s.%s", type(model).__name__, why, advice
    )
