"""hf_prune: pruning for Hugging Face Transformers, as a callback of `transformers.Trainer`."""

import importlib
import threading
from typing import TYPE_CHECKING

from .structures.registration import register_with_transformers

if TYPE_CHECKING:
    from .analysis.report import SensitivityReport
    from .analysis.sensitivity import sensitivity
    from .calibration.saved_statistics import CalibrationStatistics
    from .callback import PruningTrainerCallback
    from .config import PruningConfig
    from .criteria import ScoreInputs
    from .inference.semi_structured import to_sparse_semi_structured
    from .pruning import collect_statistics, prune
    from .publishing.hub import push_to_hub, save_pretrained
    from .recovery.lora import keep_sparsity
    from .reporting.history import PruningHistory
    from .reporting.reports import SparsityReport, sparsity_report
    from .structures.families import Heads, Neurons, Stack, describe_family
    from .structures.shrinking import shrink
    from .weights.masks import MaskSet

__version__ = "0.1.0"

__all__ = [
    "CalibrationStatistics",
    "Heads",
    "MaskSet",
    "Neurons",
    "PruningConfig",
    "PruningHistory",
    "PruningTrainerCallback",
    "ScoreInputs",
    "SensitivityReport",
    "SparsityReport",
    "Stack",
    "collect_statistics",
    "describe_family",
    "keep_sparsity",
    "prune",
    "push_to_hub",
    "save_pretrained",
    "sensitivity",
    "shrink",
    "sparsity_report",
    "to_sparse_semi_structured",
]

# Imported when they are asked for: torch and Transformers take seconds.
_MODULES = {
    "CalibrationStatistics": "calibration.saved_statistics",
    "Heads": "structures.families",
    "MaskSet": "weights.masks",
    "Neurons": "structures.families",
    "PruningConfig": "config",
    "PruningHistory": "reporting.history",
    "PruningTrainerCallback": "callback",
    "ScoreInputs": "criteria",
    "SensitivityReport": "analysis.report",
    "SparsityReport": "reporting.reports",
    "Stack": "structures.families",
    "collect_statistics": "pruning",
    "describe_family": "structures.families",
    "keep_sparsity": "recovery.lora",
    "prune": "pruning",
    "push_to_hub": "publishing.hub",
    "save_pretrained": "publishing.hub",
    "sensitivity": "analysis.sensitivity",
    "shrink": "structures.shrinking",
    "sparsity_report": "reporting.reports",
    "to_sparse_semi_structured": "inference.semi_structured",
}
_LOCK = threading.RLock()
_MOVED = {"checkpoints": "training.checkpoints"}


def _find(name: str) -> object:
    """A public name, or a module of the package, such as `hf_prune.metrics`; one at a time, whatever thread asks."""
    path = f"{__name__}.{_MODULES.get(name) or _MOVED.get(name, name)}"
    with _LOCK:
        try:
            module = None if name.startswith("_") else importlib.import_module(path)
        except ModuleNotFoundError as error:
            if error.name != path:
                raise
            module = None
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(module, name) if name in _MODULES else module
    globals()[name] = found
    return found


if not TYPE_CHECKING:  # Type checkers would believe in names that are misspelt.
    __getattr__ = _find


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


register_with_transformers()
