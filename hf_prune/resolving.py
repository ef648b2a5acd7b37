"""Resolving: what a config means once "auto", a criterion in place of its own, and a model's modules are filled in."""

from collections.abc import Iterable, Mapping

from torch import nn

from . import granularities
from .config import PruningConfig
from .criteria import CRITERIA, Criterion, fisher, needs_of, scope_of, wanda
from .granularities import Pattern, Structural
from .reconstruction.sparsegpt import RECONSTRUCTIONS
from .recovery.lora import require_maskable_adapters
from .weights.targets import Target, are_sharded, find_targets


def resolve_targets(model: nn.Module, config: PruningConfig) -> dict[str, Target]:
    """Finds the targets of a config in a model and checks that the config can prune them.

    Args:
        model: The model, unwrapped.
        config: The pruning config.

    Returns:
        Parameter name → target.

    Raises:
        ValueError: as `find_targets` does, if the granularity does not fit a shape, or if a pattern of
            `layer_sparsity` matches no target.
    """
    targets = find_targets(model, config.target_modules, config.exclude_modules)
    granularity = granularities.parse(config.granularity)
    granularity.check(targets.values())
    if not isinstance(granularity, Structural):
        config.require_layer_sparsity_matches([target.module for target in targets.values()], "targeted modules")
    return targets


def sparsities_of_targets(targets: Mapping[str, Target], sparsity: float, config: PruningConfig) -> dict[str, float]:
    """The sparsity in this round of each target that `layer_sparsity` names, by parameter name."""
    of_modules = config.sparsities_of({target.module for target in targets.values()}, sparsity)
    return {name: of_modules[target.module] for name, target in targets.items() if target.module in of_modules}


def effective_scope(config: PruningConfig, criterion: Criterion | None = None) -> str:
    """The scope of a config, or what "auto" means for its criterion, or for another one in place of it."""
    if config.scope != "auto":
        return config.scope
    granularity = granularities.parse(config.granularity)
    if isinstance(granularity, Structural):
        return "layer" if config.uniform else "global"
    if is_reconstruction(config, criterion):
        return "layer" if isinstance(granularity, Pattern) else "global"  # A pattern says how sparse each layer is.
    return scope_of(criterion or CRITERIA[config.criterion])


def required_statistics(config: PruningConfig, criterion: Criterion | None = None) -> tuple[str, ...]:
    """What has to be gathered for a cut by a config, or by another criterion in place of its own."""
    scope = effective_scope(config, criterion)
    names: list[str] = []
    if not is_reconstruction(config, criterion):
        names += needs_of(criterion or CRITERIA[config.criterion])
    elif scope == "global":
        names += needs_of(fisher)
    if scope == "owl":
        names += needs_of(wanda)
    return tuple(dict.fromkeys(names))


def looks_at_data(config: PruningConfig, criterion: Criterion | None = None) -> bool:
    """Whether a cut needs calibration samples."""
    return bool(required_statistics(config, criterion)) or is_reconstruction(config, criterion)


def require_whole_where_needed(
    targets: Iterable[Target], config: PruningConfig, criterion: Criterion | None = None
) -> None:
    """Requires whole weights for what cannot be computed of sharded ones.

    Raises:
        ValueError: if the targets are sharded, and the config prunes structures or reconstructs.
    """
    if not are_sharded(targets):
        return
    if isinstance(granularities.parse(config.granularity), Structural):
        what = f"granularity {config.granularity!r}"
    elif is_reconstruction(config, criterion):
        what = f"criterion {config.criterion!r}"
    else:
        return
    raise ValueError(
        f"{what} needs whole weights, and FSDP has sharded them. Prune unstructured, N:M or in blocks by another "
        "criterion, or train with DistributedDataParallel."
    )


def require_prunable_under_adapters(
    model: nn.Module, config: PruningConfig, targets: Mapping[str, Target], criterion: Criterion | None = None
) -> None:
    """Requires a config by which base weights can be pruned while adapters are trained.

    Args:
        model: The model with its adapters.
        config: The pruning config.
        targets: What is to be pruned.
        criterion: A criterion in place of the config's.

    Raises:
        ValueError: if the criterion changes the weights that it keeps, or reads how weights move; or as
            `require_maskable_adapters` does.
    """
    if is_reconstruction(config, criterion):
        raise ValueError(
            f"criterion {config.criterion!r} changes base weights, which checkpoints of adapters do not hold. Prune "
            "first (hf_prune.prune), and add adapters then."
        )
    if "movement" in required_statistics(config, criterion):
        raise ValueError(
            "base weights under adapters do not move, so that criterion 'movement' says nothing of them. Take another "
            "one, or prune before adapters are added."
        )
    require_maskable_adapters(model, targets)


def is_reconstruction(config: PruningConfig, criterion: Criterion | None = None) -> bool:
    """Whether a cut is by a method of `RECONSTRUCTIONS`, which also changes the weights that it keeps."""
    return criterion is None and config.criterion in RECONSTRUCTIONS
