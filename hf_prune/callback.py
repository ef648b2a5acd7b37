"""PruningTrainerCallback: tells the rounds when, between the events of a `transformers.Trainer`."""

import dataclasses
import functools
import logging
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from .calibration.contexts import keep_random_state
from .config import PruningConfig
from .criteria import Criterion
from .distributed.gathering import accessible
from .distributed.processes import gather_from_processes, require_agreement
from .distributed.shards import reshard_
from .distributed.zero import has_partitions
from .pruning import cut_, require_room
from .publishing.cards import TAGS
from .recovery.lora import has_adapters, mask_adapters_
from .reporting.history import HISTORY_NAME, PruningHistory
from .reporting.plots import PLOT_NAME, can_plot
from .reporting.reports import sparsity_report
from .reporting.savings import shrink_measured
from .resolving import (
    require_prunable_under_adapters,
    require_whole_where_needed,
    required_statistics,
    resolve_targets,
)
from .structures.finding import find_structures, held_zeros, require_prunable, zeros_of
from .structures.groups import StructureGroup, parameters_of
from .training.checkpoints import (
    BEST_NAME,
    MASKS_NAME,
    MOVEMENT_NAME,
    Progress,
    checkpoint_folder,
    load_renamed_weights_,
    progress_of,
    recover_,
    require_same,
)
from .training.events import Event
from .training.finished import FinishedRun
from .training.monitor import (
    Monitor,
    as_number,
    improves_as_it_rises,
    metric_name,
    require_evaluations,
    warn_of_few_evaluations,
)
from .training.optimizers import (
    cut_state_,
    require_not_retired,
    require_restartable,
    restart_lr_,
    retire,
    undo_restart_lr_,
)
from .training.pacing import Even, Patience
from .training.rounds import Rounds
from .weights.gradient_hooks import GradientHooks
from .weights.masks import MaskSet
from .weights.movement import Movement, require_gatherable
from .weights.targets import Target

logger = logging.getLogger(__name__)


class PruningTrainerCallback(TrainerCallback, ExportableState):
    """Prunes the model that a `transformers.Trainer` trains, round by round, to exactly the sparsity asked for.

    A cut happens between two optimizer steps (the first one before the first step, unless `begin` says otherwise): at
    planned steps, or, with `patience`, when the metric has stopped improving; the best weights of the round then come
    back before the next cut, and the training stops when the last round has converged. From a cut on the gradients of
    pruned weights are zeroed before they are clipped, and the weights after each optimizer step: to the last bit the
    training that `torch.nn.utils.prune` gives. Parameters keep their names and shapes, and the saved model is an
    ordinary one. It is final in `on_train_end` of this callback: put others that look at it, or upload it, behind.

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
        ValueError: from `trainer.train()`, if the config does not fit the model, the run or the checkpoint, if scores
            or what a calibration gathers are not finite, if the model carries adapters that cannot be masked, if its
            parameters are sharded otherwise than by FSDP2 or DeepSpeed's ZeRO, or if it was evaluated before `train()`
            and there are several processes.

    Example:
        >>> callback = PruningTrainerCallback(PruningConfig(sparsity=0.8))
        >>> # trainer = Trainer(..., callbacks=[callback]); trainer.train()
    """

    def __init__(self, config: PruningConfig, *, criterion: Criterion | None = None) -> None:
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
        self._start_clean()

    def _start_clean(self) -> None:
        self.masks = MaskSet()
        self._targets: dict[str, Target] = {}
        self._structures: dict[str, StructureGroup] = {}
        self._weights: dict[str, nn.Parameter] = {}
        self._hooks = GradientHooks()
        self._run_id = uuid.uuid4().hex
        self._rounds = Rounds(self.config, Even([], 0), PruningHistory())
        self._lr_start: int | None = None
        self._training = False
        self._finished: FinishedRun | None = None
        self._resumed_at: int | None = None
        self._monitor = Monitor()
        self._tokens_seen = 0
        self._movement: Movement | None = None

    @property
    def history(self) -> PruningHistory:
        """The rounds so far."""
        return self._rounds.history

    # What is resumed from: JSON in the trainer's state, tensors in files of their own.

    def state(self) -> dict[str, object]:
        """What Trainer stores in a checkpoint's `trainer_state.json`."""
        rounds = self._rounds
        progress: Progress = {
            "run": self._run_id,
            "config": self.config.to_dict(),
            "criterion": self._criterion_name,
            "pacing": dataclasses.asdict(rounds.pacing),
            "lr_start": self._lr_start,
            "masks": self.masks.digest() if self.masks else None,
            "best": rounds.best.digest() if rounds.best else None,
            "movement": self._movement.digest() if self._movement is not None else None,
            "history": rounds.history.to_dict(),
        }
        return {"args": {"config": self.config.to_dict()}, "attributes": {}, "progress": progress}

    @property
    def _criterion_name(self) -> str:
        if self.criterion is None:
            return self.config.criterion
        return getattr(self.criterion, "__qualname__", type(self.criterion).__qualname__)

    # Events, in the order in which Trainer sends them.

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Checks that the config fits the model and the run; starts, or goes on where a checkpoint was."""
        now = Event.of(args, state, kwargs)
        reshard_(now.model)  # Another callback may have called it.
        self._hooks.release_(self._weights.values())
        undo_restart_lr_(now.scheduler)
        self._start_clean()
        now.require_supported()
        if self.config.restart_lr:
            require_restartable(now.scheduler)
        if self.config.patience:
            require_evaluations(self.config, args, state)
        if isinstance(state.stateful_callbacks, dict) and state.global_step == 0:
            progress_of(state.stateful_callbacks)  # Raises if there is more than one.
        require_not_retired(now.optimizer)
        with accessible(now.model):
            self._resolve(now)
            if state.global_step > 0:
                self._resume(now)
            else:
                self._begin(now)
        self._training = True

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Cuts if a round begins here: after what Trainer evaluated and saved at the end of the step before."""
        if self.config.patience:  # Not as soon as an evaluation lacks it: another evaluation dataset may have it.
            self._monitor.require(self.history.metric)
        if not self._hooks.are_on(self._weights, self.masks):
            self._hooks.hold_(self._weights, self.masks)
        self._cut_if_due(Event.of(args, state, kwargs))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Adds the step to the movement, if the criterion reads it."""
        if self._movement is not None and self._finished is None:
            self._movement.add_step_(self._targets.values())

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Zeroes pruned weights after every step, so that no forward pass sees what others do to gradients."""
        self.masks.apply_(kwargs["model"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Counts what the round costs."""
        if self._finished is not None:
            self._finished.stay_over_(state, control)
            return
        tokens, self._tokens_seen = state.num_input_tokens_seen - self._tokens_seen, state.num_input_tokens_seen
        batch_size = state.train_batch_size or args.train_batch_size  # The former is what auto_find_batch_size found.
        self._rounds.count_step_(
            samples=batch_size * args.gradient_accumulation_steps * args.world_size,
            tokens=tokens if args.include_num_input_tokens_seen != "no" else None,
        )
        self._stop_if_over(state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Lets nothing happen in a run that was over when it was resumed."""
        if self._finished is not None:
            self._finished.stay_over_(state, control)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Notes the metric. A cut that is due waits for the next step, so that Trainer saves what it evaluated."""
        if not self._training:
            return
        metrics, metric = kwargs["metrics"], self.history.metric
        self._monitor.note_(metrics)
        # With `eval_on_start`, a resumed run evaluates where the run before it would not have.
        if metric in metrics and state.global_step != self._resumed_at:
            # That of the first process: with one of its own each would prune at another step.
            value = gather_from_processes(as_number(metric, metrics[metric]))[0]
            self._rounds.observe_(state.global_step, value, kwargs["model"])
            self._stop_if_over(state, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Puts masks, best weights, movement, config and history into the checkpoint."""
        folder = checkpoint_folder(args, state)
        write = args.should_save and folder.is_dir()
        if args.should_save and not write:
            logger.warning("%s is gone: was it rotated away by save_total_limit, among older ones?", folder)
        if self.masks:
            self.masks.save(folder / MASKS_NAME, write=write)
        if self._rounds.best is not None and self.history[-1].best_step != state.global_step:
            self._rounds.best.save(folder / BEST_NAME, write=write)
        if self._movement is not None:
            self._movement.save(folder / MOVEMENT_NAME, write=write)
        if write:
            self._save_reports(folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leaves an ordinary model with its zeros, and says loudly if they are fewer than asked for."""
        model = kwargs["model"]
        self._hooks.release_(self._weights.values())
        self._training = False
        undo_restart_lr_(kwargs["lr_scheduler"])
        with accessible(model):
            if args.load_best_model_at_end and state.best_model_checkpoint is not None:
                load_renamed_weights_(model, Path(state.best_model_checkpoint))
            elif self._finished is not None:
                self._finished.weights.restore_(model)
            self._say(self._rounds.finish_(state.global_step, model), state)
            self.masks.apply_(model)
        if shortfall := self.history.shortfall():
            logger.warning("%s", shortfall)
        if self._monitor.lacks(self.history.metric):
            logger.warning(
                "No evaluation gave the metric %r, so the history has no values. There were %s.",
                self.history.metric, ", ".join(sorted(self._monitor.seen)),
            )  # fmt: skip
        if self._structures and self.config.shrink_at_end and self.masks.masked:
            try:
                batches = Event.of(args, state, kwargs).batches(args.train_batch_size * args.world_size)
                self.history.costs = shrink_measured(model, self.masks, batches)
            except (RuntimeError, ValueError) as error:  # What was trained must not be lost for it.
                logger.error("The model was not shrunk, and its pruned structures stay as zeros: %s", error)
            else:
                self._weights = {}  # They are no longer the model's.
                retire(kwargs["optimizer"])
                self._say(self.history.savings(), state)
        folder = Path(str(args.output_dir))
        if args.should_save:
            self._save_reports(folder)
        if has_adapters(model) and self.masks:  # Beside adapters there are no base weights to read them from.
            self.masks.save(folder / MASKS_NAME, write=args.should_save)

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Has Trainer upload the rounds and their plot, and tags by which the model is found."""
        kwargs["model"].add_model_tags([*TAGS])
        if args.should_save:
            folder = Path(str(args.output_dir))
            self._save_reports(folder)
            if self.history and can_plot():
                self.history.plot(folder / PLOT_NAME)

    # Rounds.

    def _resolve(self, now: Event) -> None:
        self._targets = resolve_targets(now.model, self.config)
        require_whole_where_needed(self._targets.values(), self.config, self.criterion)
        self._structures = find_structures(now.model, self.config, self._targets)
        require_prunable(now.model, self.config, self._structures)
        if self._structures and self.config.shrink_at_end and has_partitions(now.model):
            raise ValueError(
                "DeepSpeed holds on to the shapes that parameters have, so that they cannot be shrunk at the end of "
                "training. Set shrink_at_end=False, and call shrink on the saved model."
            )
        if has_adapters(now.model):
            require_prunable_under_adapters(now.model, self.config, self._targets, self.criterion)
        self._weights = dict(now.model.named_parameters())
        self._hooks.release_(self._weights.values())  # What an interrupted run of another callback has left.
        self._tokens_seen = now.state.num_input_tokens_seen

    def _begin(self, now: Event) -> None:
        metric = metric_name(self.config, now.args)
        history = PruningHistory(
            metric,
            greater_is_better=improves_as_it_rises(metric, now.args),
            asked=self.config.round_sparsities,
            language_model=isinstance(now.model, PreTrainedModel) and now.model.can_generate(),
        )
        self._rounds = Rounds.plan(self.config, history, now.state.max_steps)
        if "movement" in required_statistics(self.config, self.criterion):
            require_gatherable(now.model, self._rounds.pacing.is_due(0))
            self._movement = Movement.zeros(self._targets.values(), self._run_id)
        if isinstance(self._rounds.pacing, Patience):
            warn_of_few_evaluations(self._rounds.pacing, now.args, now.state)
        if self.config.hold_zeros:
            self._adopt(held_zeros(now.model, self._targets, self._structures), None, now)
            if not self.masks.masked:
                logger.warning("hold_zeros found no zeros to hold.")
            require_room(self._targets, self.masks, self.config, self.criterion, self._structures)
        self._cut_if_due(now)

    def _resume(self, now: Event) -> None:
        args, state, model, scheduler = now.args, now.state, now.model, now.scheduler
        progress = progress_of(state.stateful_callbacks)
        require_same(progress, self.config.to_dict(), self._criterion_name)
        self._run_id = progress["run"]
        pacing = (Patience if self.config.patience else Even)(**progress["pacing"])  # type: ignore[arg-type]
        pacing.resize_(state.max_steps, state.global_step)
        self._rounds = Rounds(self.config, pacing, PruningHistory.from_dict(progress["history"]))
        self._resumed_at = state.global_step
        if progress["lr_start"] is not None:
            # Without the scheduler's file, as with `save_only_model`, Trainer begins its schedule anew, and so do we.
            lost = scheduler.last_epoch < progress["lr_start"]
            self._lr_start = scheduler.last_epoch if lost else progress["lr_start"]
            past = 0 if lost else state.global_step - self.history[-1].step
            left = max(1, past + pacing.steps_left(state.global_step))
            restart_lr_(scheduler, self._lr_start, left, state.max_steps)
        named = [Path(args.resume_from_checkpoint)] if args.resume_from_checkpoint else []
        folders = [*named, checkpoint_folder(args, state)]
        self.masks, self._rounds.best, movement = recover_(
            model,
            parameters_of(self._structures) or self._targets,
            functools.partial(zeros_of, model, self._targets, self._structures),
            progress,
            folders,
            state.global_step,
            str(args.output_dir),
        )
        if movement is not None:
            self._movement = movement.beside(self._targets)
        if self.masks:
            self.masks.settle_()
            self._hold(model)
        if pacing.is_run_over(state.global_step):
            self._finished = FinishedRun.of(state, model)

    def _cut_if_due(self, now: Event) -> None:
        if self._rounds.pacing.is_due(now.state.global_step):
            with accessible(now.model):
                self._cut(now)

    def _cut(self, now: Event) -> None:
        args, state, pacing = now.args, now.state, self._rounds.pacing
        if not self.history and self.evaluate is not None:  # Else Trainer may have measured it already.
            self.history.dense = self._measure("dense", args)
            if self.config.patience:
                self._monitor.require(self.history.metric)
        self._say(self._rounds.end_(pacing.why_round_ends(state.global_step), now.model), state)
        asked = self._rounds.next_sparsity
        masks = cut_(
            now.model,
            self._targets,
            self.masks,
            asked,
            self.config,
            batches=now.batches(self.config.calibration_samples),
            statistics=None if self._movement is None else {"movement": self._movement.statistic()},
            criterion=self.criterion,
            seed=args.seed,
            show_progress=state.is_world_process_zero and not args.disable_tqdm,
            structures=self._structures,
        )
        self._adopt(masks, asked, now)
        if pacing.round == len(self.config.round_sparsities):
            self._movement = None  # Nobody will ask for it again.
        if self.config.restart_lr:
            self._lr_start = now.scheduler.last_epoch
            restart_lr_(now.scheduler, self._lr_start, pacing.steps_left(state.global_step), state.max_steps)

    def _hold(self, model: nn.Module) -> None:
        """Has gradients, and adapters if there are any, leave what is masked at zero."""
        self._hooks.hold_(self._weights, self.masks)
        if has_adapters(model):
            mask_adapters_(model, self.masks)

    def _stop_if_over(self, state: TrainerState, control: TrainerControl) -> None:
        if self._rounds.pacing.is_run_over(state.global_step):
            control.should_training_stop = True

    def _adopt(self, masks: MaskSet, asked: float | None, now: Event) -> None:
        """Holds masks from here on, writes the round down and measures it."""
        model, state = now.model, now.state
        masks.settle_()  # Now that all processes are here: Trainer asks the first alone for its state.
        if now.args.world_size > 1 and not masks.are_sharded:
            require_agreement(masks.digests(), "a mask")
        self.masks = masks
        cut_state_(
            now.optimizer, self.config.optimizer_state, {w: masks.get(name) for name, w in self._weights.items()}
        )
        self._hold(model)
        # Metrics of a less sparse model must not keep a sparser one from becoming the best.
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None

        report = sparsity_report(model, self.config, masks)
        row = self._rounds.begin_(state.global_step, asked, report, self._criterion_name)
        self._say(
            f"Round {row.round} of {len(self.config.round_sparsities)} at step {row.step}: sparsity "
            f"{row.reached:.4f}, {row.masked:,} of {row.total:,} {report.units} pruned.",
            state,
        )
        entry = {"pruning_round": row.round, "sparsity": row.reached}
        if self.log is not None:
            self.log(entry)
        else:
            state.log_history.append({**entry, "epoch": state.epoch, "step": state.global_step})
        row.after_cut = self._measure("after_cut", now.args)

    @staticmethod
    def _say(sentence: str | None, state: TrainerState) -> None:
        """Says what every process knows, once."""
        if sentence is not None:
            logger.log(logging.INFO if state.is_world_process_zero else logging.DEBUG, "%s", sentence)

    def _measure(self, prefix: str, args: TrainingArguments) -> float | None:
        """The metric now; None if nobody measures it."""
        if self.evaluate is None:
            return None
        with keep_random_state(args.device):
            return self._monitor.measure_(self.history.metric, self.evaluate, prefix)

    def _save_reports(self, folder: Path) -> None:
        self.config.save_pretrained(folder)
        self.history.save(folder / HISTORY_NAME)
