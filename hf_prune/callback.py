"""PruningTrainerCallback: the events of a `transformers.Trainer`, handed to the run that prunes."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from .config import PruningConfig
from .distributed.gathering import accessible
from .distributed.shards import reshard_
from .plan import Plan, resolve
from .reporting.history import HISTORY_NAME, PruningHistory
from .reporting.plots import PLOT_NAME, can_plot
from .selection.scoring import AnyCriterion
from .training.checkpoints import blank_progress, checkpoint_folder, progress_of
from .training.endings import logged_on_error
from .training.events import Event
from .training.monitor import require_evaluations
from .training.optimizers import require_not_retired, require_restartable, undo_restart_lr_
from .training.run import Run
from .weights.masks import MaskSet

logger = logging.getLogger(__name__)

TAGS = ("hf_prune", "pruning")
"""By which pruned models are found on the Hub."""


class PruningTrainerCallback(TrainerCallback, ExportableState):
    """Prunes the model that a `transformers.Trainer` trains, round by round, to exactly the sparsity asked for.

    A cut happens between two optimizer steps (the first one before the first step, unless `begin` says otherwise): at
    planned steps, or, with `patience`, when the metric has stopped improving; the best weights of the round then come
    back before the next cut, and the training stops when the last round has converged. From a cut on the gradients of
    pruned weights are zeroed before they are clipped, and the weights after each optimizer step: to the last bit the
    training that `torch.nn.utils.prune` gives. Parameters keep their names and shapes, and the saved model is an
    ordinary one. It is final after this callback's `on_train_end`: list callbacks that write weights, such as
    averages, before it, and those that read or upload the model after it. What others write into pruned weights later
    is set back to zero, with a warning, before the model is saved or used.

    `pruning_config.json` and `pruning_history.json` are written beside the model, into each checkpoint and into
    `output_dir` at the end. `trainer.train(resume_from_checkpoint=…)` goes on bit for bit. Each `train()` that is
    not a resumption starts clean. With `load_best_model_at_end`, only evaluations at the final sparsity compete.
    Of a `PeftModel` the base weights are pruned while its LoRA adapters are trained, which are masked as
    `keep_sparsity` does it. Trainer saves adapters alone; `pruning_masks.safetensors` beside them says what is zero.

    Evaluate and save by the same strategy: where Trainer saves in steps and evaluates in epochs, the evaluation at an
    epoch's end comes after the checkpoint, and a run that is resumed there does not make it up.

    Args:
        config: What to prune, how far, and when.
        criterion: A function from `ScoreInputs` to scores (higher = keep), in place of the config's criterion.

    Attributes:
        config: The config.
        criterion: The function in place of the config's criterion; None if there is none.
        masks: The masks so far, by parameter name.
        history: The rounds so far.
        evaluate: Set it to `trainer.evaluate` to have the metric measured before the first cut and right after each
            cut; a callback cannot evaluate by itself. It counts for nothing else: neither for the best model nor
            for early stopping (`EarlyStoppingCallback` will say that it did not find its metric), and it leaves the
            random state of torch (CPU and CUDA), NumPy and Python as it was.
        log: Set it to `trainer.log` to have `sparsity` and `pruning_round` in TensorBoard, W&B and whatever else
            `report_to` names. Without it they are in `trainer.state.log_history` alone.

    Raises:
        TypeError: if `config` is not a `PruningConfig`, or `criterion` not a function.
        ValueError: if the criterion has declared a scope that there is not; from `trainer.train()`, if the config does
            not fit the model, the run or the checkpoint, if scores or what a calibration gathers are not finite, if
            the model carries adapters that cannot be masked, if its parameters are sharded otherwise than by FSDP2 or
            DeepSpeed's ZeRO, or if it was evaluated before `train()` and there are several processes.

    Example:
        >>> callback = PruningTrainerCallback(PruningConfig(sparsity=0.8))
        >>> # trainer = Trainer(..., callbacks=[callback]); trainer.train()
    """

    def __init__(self, config: PruningConfig, *, criterion: AnyCriterion | None = None) -> None:
        if isinstance(config, Mapping):  # Trainer rebuilds callbacks from the JSON of `state()` if it is told to.
            config = PruningConfig.from_dict(config)
        if not isinstance(config, PruningConfig):
            raise TypeError(f"config must be a PruningConfig, got {type(config).__name__}.")
        if criterion is not None and not callable(criterion):
            raise TypeError(
                f"criterion must be a function of ScoreInputs, got {criterion!r}. Names go into the config."
            )
        self.config = config
        self.criterion = criterion
        self.evaluate: Callable[..., Mapping[str, float]] | None = None
        self.log: Callable[[dict[str, float]], None] | None = None
        resolve(config, criterion)  # Raises if the criterion has declared what there is not.
        self._last_run: Run | None = None
        self._run: Run | None = None  # While it is under way.

    @property
    def masks(self) -> MaskSet:
        """The masks so far, by parameter name."""
        return MaskSet() if self._last_run is None else self._last_run.masks

    @property
    def history(self) -> PruningHistory:
        """The rounds so far."""
        return PruningHistory() if self._last_run is None else self._last_run.history

    def state(self) -> dict[str, object]:
        """What Trainer stores in a checkpoint's `trainer_state.json`; tensors are in files of their own."""
        progress = (
            blank_progress(resolve(self.config, self.criterion))
            if self._last_run is None
            else self._last_run.progress()
        )
        return {"args": {"config": self.config.to_dict()}, "attributes": {}, "progress": progress}

    # Events, in the order in which Trainer sends them.

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Checks that the config fits the model and the run; starts, or goes on where a checkpoint was."""
        event = self._event(args, state, control, kwargs)
        reshard_(event.model)  # Another callback may have called it.
        if self._last_run is not None:
            self._last_run.release_()
        undo_restart_lr_(event.scheduler)
        self._last_run = self._run = None
        event.require_supported()
        if self.config.restart_lr:
            require_restartable(event.scheduler)
        if self.config.patience:
            require_evaluations(resolve(self.config, self.criterion), args, state)
        if isinstance(state.stateful_callbacks, dict) and state.global_step == 0:
            progress_of(state.stateful_callbacks)  # Raises if there is more than one.
        require_not_retired(event.optimizer)
        with accessible(event.model):
            plan = Plan.of(event.model, self.config, self.criterion, seed=args.seed)
            plan.require_trainable(event.model)
            self._last_run = run = Run(plan, event)
            if state.global_step > 0:
                run.resume_(event)
            else:
                run.begin_(event)
        self._run = run

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Cuts if a round begins here: after what Trainer evaluated and saved at the end of the step before."""
        if self._run is not None:
            self._run.begin_step_(self._event(args, state, control, kwargs))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Adds the step to the movement, if the criterion reads it."""
        if self._run is not None:
            self._run.add_movement_()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Zeroes pruned weights after every step, so that no forward pass sees what others do to gradients."""
        self.masks.apply_(kwargs["model"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Counts what the round costs."""
        if self._run is not None:
            self._run.end_step_(self._event(args, state, control, kwargs))

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Lets nothing happen in a run that was over when it was resumed."""
        if self._run is not None:
            self._run.stay_over_(self._event(args, state, control, kwargs))

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Notes the metric. A cut that is due waits for the next step, so that Trainer saves what it evaluated."""
        if self._run is not None:
            self._run.observe_(self._event(args, state, control, kwargs), kwargs["metrics"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Puts masks, best weights, movement, config and history into the checkpoint."""
        folder = checkpoint_folder(args, state)
        write = args.should_save and folder.is_dir()
        if args.should_save and not write:
            logger.warning("%s is gone: was it rotated away by save_total_limit, among older ones?", folder)
        if self._last_run is not None:
            self._last_run.save(folder, state.global_step, kwargs["model"], write=write)
        if write:
            self._save_reports(folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leaves an ordinary model with its zeros, and says loudly if they are fewer than asked for."""
        undo_restart_lr_(kwargs["lr_scheduler"])
        run, self._run = self._run, None
        if run is not None:
            run.release_()
            run.end_(self._event(args, state, control, kwargs))
        if args.should_save:
            with logged_on_error("Config and history of the pruning were not written."):
                self._save_reports(Path(str(args.output_dir)))

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Has Trainer upload the rounds and their plot, and tags by which the model is found."""
        with logged_on_error("The tags, the history of the pruning or its plot are not among what is uploaded."):
            kwargs["model"].add_model_tags([*TAGS])
            if args.should_save:
                folder = Path(str(args.output_dir))
                self._save_reports(folder)
                if self.history and can_plot():
                    self.history.plot(folder / PLOT_NAME)

    def _event(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, given: Mapping[str, Any]
    ) -> Event:
        return Event.of(args, state, control, given)._replace(evaluate=self.evaluate, log=self.log)

    def _save_reports(self, folder: Path) -> None:
        self.config.save_pretrained(folder)
        self.history.save(folder / HISTORY_NAME)
