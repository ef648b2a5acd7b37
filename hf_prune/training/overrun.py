"""A run that was over when it was resumed, and stays so."""

from dataclasses import dataclass

from torch import nn
from transformers import TrainerControl, TrainerState

from ..weights.snapshot import Snapshot


@dataclass(frozen=True)
class Overrun:
    """Where a run ended. When it is resumed, Trainer takes one more step, which is neither counted nor kept.

    Attributes:
        step: Number of finished steps.
        epoch: Number of finished epochs, in fractions; None if Trainer does not know.
        tokens: Number of input tokens seen.
        weights: The weights at the end.
    """

    step: int
    epoch: float | None
    tokens: int
    weights: Snapshot

    @classmethod
    def of(cls, state: TrainerState, model: nn.Module) -> "Overrun":
        """Notes where a run is that is over, and copies its weights."""
        return cls(state.global_step, state.epoch, state.num_input_tokens_seen, Snapshot.of(model))

    def stay_over_(self, state: TrainerState, control: TrainerControl) -> None:
        """Takes back what Trainer has counted, and lets nothing more happen."""
        state.global_step, state.epoch = self.step, self.epoch  # type: ignore[assignment]
        state.num_input_tokens_seen = self.tokens
        control.should_log = control.should_evaluate = control.should_save = False
        control.should_training_stop = True
