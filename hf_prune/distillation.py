"""Distillation, by the path of earlier versions: see `hf_prune.recovery.distillation`."""

from .recovery.distillation import DistillationMixin, DistillationTrainer

__all__ = ["DistillationMixin", "DistillationTrainer"]
