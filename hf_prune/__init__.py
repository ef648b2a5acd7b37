"""hf_prune: pruning for Hugging Face Transformers, as a callback of `transformers.Trainer`."""

from .callback import PruningTrainerCallback
from .config import PruningConfig
from .criteria import ScoreInputs
from .inference.semi_structured import to_sparse_semi_structured
from .pruning import prune
from .publishing.hub import push_to_hub, save_pretrained
from .recovery.lora import keep_sparsity
from .reporting.history import PruningHistory
from .reporting.reports import SparsityReport, sparsity_report
from .structures.families import Heads, Neurons, Stack, describe_family
from .structures.shrinking import shrink
from .weights.masks import MaskSet

__version__ = "0.1.0"

__all__ = [
    "Heads",
    "MaskSet",
    "Neurons",
    "PruningConfig",
    "PruningHistory",
    "PruningTrainerCallback",
    "ScoreInputs",
    "SparsityReport",
    "Stack",
    "describe_family",
    "keep_sparsity",
    "prune",
    "push_to_hub",
    "save_pretrained",
    "shrink",
    "sparsity_report",
    "to_sparse_semi_structured",
]
