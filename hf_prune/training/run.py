"""A run: what is pruned, how far it is, and what each event of the Trainer does to it."""

import dataclasses
import logging
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from torch import nn
from transformers import PreTrainedModel

from ..calibration.contexts import keep_random_state, whole_on_error
from ..calibration.samples import CalibrationData
from ..distributed.gathering import accessible
from ..distributed.processes import failing_together, gather_from_processes, rank_and_size, require_agreement
from ..pacing.even import Even
from ..pacing.patience import Patience
from ..plan import Plan
from ..pruning import cut_, for_samples, statistics_for
from ..recovery.lora import has_adapters, mask_adapters_
from ..reporting.history import PruningHistory
from ..reporting.reports import count_zeros
from ..reporting.savings import shrink_measured
from ..structures.budgets import MEASURES, Budget
from ..structures.experts import bar_pruned_
from ..structures.groups import kept_in
from ..structures.routing import SAVED_UNBARRED, bars_any
from ..weights.gradient_hooks import GradientHooks
from ..weights.masks import MaskSet
from ..weights.movement import Movement, require_gatherable
from ..weights.zero_checks import ZeroCheck
from .checkpoints import (
    BEST_NAME,
    MASKS_NAME,
    MOVEMENT_NAME,
    Progress,
    blank_progress,
    progress_of,
    recover_,
    require_same,
)  # fmt: skip
from .endings import logged_on_error
from .events import Event
from .monitor import Monitor, as_number, improves_as_it_rises, metric_name, warn_of_few_evaluations
from .optimizers import cut_state_, restart_lr_, retire
from .overrun import Overrun
from .renamed_weights import load_renamed_weights_
from .rounds import Rounds

logger = logging.getLogger(__name__)


class Run:
    """A training that prunes.

    Args:
        plan: What is pruned, and how.
        event: The training's beginning.

    Attributes:
        plan: As given.
        id: A name that no other run has.
        masks: The masks so far, by parameter name.
        rounds: The rounds so far, and the one that it is in.
        monitor: Which metrics evaluations have given.
        movement: What training does to the weights, while a criterion reads it.
        lr_start: `start` of `restart_lr_` at the last cut, None if the learning rate goes on.
        resumed_at: The step at which it was resumed; None if it was not.
        overrun: Where it ended, if it was over when it was resumed.
    """

    def __init__(self, plan: Plan, event: Event) -> None:
        self.plan = plan
        self.id = uuid.uuid4().hex
        self.masks = MaskSet()
        self.rounds = Rounds(plan, Even([], 0), PruningHistory())
        self.monitor = Monitor()
        self.movement: Movement | None = None
        self.lr_start: int | None = None
        self.resumed_at: int | None = None
        self.overrun: Overrun | None = None
        self._weights = dict(event.model.named_parameters())
        self._zero_check = ZeroCheck()
        self._zero_check.watch_(event.model, self.masks)
        bar_pruned_(event.model, plan.structures)
        self._hooks = GradientHooks()
        self._hooks.release_(self._weights.values())  # What an interrupted run of another callback has left.
        self._tokens_seen = event.state.num_input_tokens_seen

    @property
    def history(self) -> PruningHistory:
        """The rounds so far."""
        return self.rounds.history

    def progress(self) -> Progress:
        """What it is resumed from, as JSON; tensors are in files of their own."""
        return {
            **blank_progress(self.plan),
            "run": self.id,
            "pacing": dataclasses.asdict(self.rounds.pacing),
            "lr_start": self.lr_start,
            "masks": self.masks.digest() if self.masks else None,
            "best": self.rounds.best.digest() if self.rounds.best else None,
            "movement": self.movement.digest() if self.movement is not None else None,
            "history": self.history.to_dict(),
        }

    def begin_(self, event: Event) -> None:
        """Plans the rounds, holds the zeros that are there, and cuts if the first round begins here."""
        plan, metric = self.plan, metric_name(self.plan, event.args)
        history = PruningHistory(
            metric,
            greater_is_better=improves_as_it_rises(metric, event.args),
            asked=plan.config.round_sparsities,
            measure=plan.config.keep and MEASURES[plan.config.keep[0]],
            language_model=isinstance(event.model, PreTrainedModel) and event.model.can_generate(),
        )
        self.rounds = Rounds.plan(plan, history, event.state.max_steps)
        if "movement" in plan.needs:
            require_gatherable(event.model, self.rounds.pacing.is_due(0))
            self.movement = Movement.zeros(plan.targets.values(), self.id)
        if isinstance(self.rounds.pacing, Patience):
            warn_of_few_evaluations(self.rounds.pacing, event.args, event.state)
        if plan.config.hold_zeros:
            self._adopt_(plan.held_zeros(event.model), None, event, plan, None)
            if not self.masks.masked:
                logger.warning("hold_zeros found no zeros to hold.")
            plan.require_room(self.masks)
        self._cut_if_due_(event)

    def resume_(self, event: Event) -> None:
        """Goes on where its checkpoint was; raises if it was begun otherwise, does not fit, or is not whole."""
        state, scheduler, plan = event.state, event.scheduler, self.plan
        progress = progress_of(state.stateful_callbacks)
        require_same(progress, plan)
        pacing = (Patience if plan.config.patience else Even)(**progress["pacing"])  # type: ignore[arg-type]
        pacing.resize_(state.max_steps, state.global_step)
        self.id, self.resumed_at = progress["run"], state.global_step
        self.rounds = Rounds(plan, pacing, PruningHistory.from_dict(progress["history"]))
        if progress["lr_start"] is not None:
            # Without the scheduler's file, as with `save_only_model`, Trainer begins its schedule anew, and so do we.
            lost = scheduler.last_epoch < progress["lr_start"]
            self.lr_start = scheduler.last_epoch if lost else progress["lr_start"]
            past = 0 if lost else state.global_step - self.history[-1].step
            left = max(1, past + pacing.steps_left(state.global_step))
            restart_lr_(scheduler, self.lr_start, left, state.max_steps)
        self.masks, self.rounds.best, movement = recover_(plan, event, progress)
        if movement is not None:
            self.movement = movement.beside(plan.targets)
        if self.masks:
            self.masks.settle_()
            self._hold_(event)
        if pacing.is_run_over(state.global_step):
            self.overrun = Overrun.of(state, event.model)

    def begin_step_(self, event: Event) -> None:
        """Cuts if a round begins here: after what Trainer evaluated and saved at the end of the step before."""
        if self.plan.config.patience:  # Not as soon as an evaluation lacks it: another dataset may have it.
            self.monitor.require(self.history.metric)
        if not self._hooks.are_on(self._weights, self.masks):
            self._hooks.hold_(self._weights, self.masks)
        self._cut_if_due_(event)

    def add_movement_(self) -> None:
        """Adds the step to the movement, if the criterion reads it."""
        if self.movement is not None and self.overrun is None:
            self.movement.add_step_(self.plan.targets.values())

    def end_step_(self, event: Event) -> None:
        """Counts what the round costs, and ends the training with the last one."""
        if self.overrun is not None:
            self.stay_over_(event)
            return
        args, state = event.args, event.state
        tokens, self._tokens_seen = state.num_input_tokens_seen - self._tokens_seen, state.num_input_tokens_seen
        batch_size = state.train_batch_size or args.train_batch_size  # The former is what auto_find_batch_size found.
        self.rounds.count_step_(
            samples=batch_size * args.gradient_accumulation_steps * args.world_size,
            tokens=tokens if args.include_num_input_tokens_seen != "no" else None,
        )
        self._stop_if_over(event)

    def stay_over_(self, event: Event) -> None:
        """Lets nothing happen in a run that was over when it was resumed."""
        if self.overrun is not None:
            self.overrun.stay_over_(event.state, event.control)

    def observe_(self, event: Event, metrics: Mapping[str, object]) -> None:
        """Notes what an evaluation has given. A cut that is due waits for the next step."""
        metric, step = self.history.metric, event.state.global_step
        self.monitor.note_(metrics)
        # With `eval_on_start`, a resumed run evaluates where the run before it would not have.
        if metric in metrics and step != self.resumed_at:
            # That of the first process: with one of its own each would prune at another step.
            value = gather_from_processes(as_number(metric, metrics[metric]))[0]
            self.rounds.observe_(step, value, event.model)
            self._stop_if_over(event)

    def _stop_if_over(self, event: Event) -> None:
        if self.rounds.pacing.is_run_over(event.state.global_step):
            event.control.should_training_stop = True

    def save(self, folder: Path, step: int, model: nn.Module, *, write: bool) -> None:
        """Puts masks, best weights and movement into a checkpoint; all processes call this, and some write."""
        self._zero_check.check_(model)
        if self.masks:
            self.masks.save(folder / MASKS_NAME, write=write)
        if self.rounds.best is not None and self.history[-1].best_step != step:
            self.rounds.best.save(folder / BEST_NAME, write=write)
        if self.movement is not None:
            self.movement.save(folder / MOVEMENT_NAME, write=write)

    def end_(self, event: Event) -> None:
        """Leaves an ordinary model with its zeros, and says loudly if they are fewer than asked for."""
        args, state, model = event.args, event.state, event.model
        with accessible(model):
            with logged_on_error("The best weights were not brought back, and the model has those of the last step."):
                if args.load_best_model_at_end and state.best_model_checkpoint is not None:
                    load_renamed_weights_(model, Path(state.best_model_checkpoint))
                elif self.overrun is not None:
                    self.overrun.weights.restore_(model)
            with logged_on_error("The last round was not closed, and the model has the weights of the last step."):
                event.say(self.rounds.finish_(state.global_step, model))
            self.masks.apply_(model)
            are_barred = bars_any(model)
        if shortfall := self.history.shortfall():
            logger.warning("%s", shortfall)
        if self.monitor.lacks(self.history.metric):
            logger.warning(
                "No evaluation gave the metric %r, so the history has no values. There were %s.",
                self.history.metric, ", ".join(sorted(self.monitor.seen)),
            )  # fmt: skip
        if self.plan.structures and self.plan.config.shrink_at_end and self.masks.masked:
            self._shrink_(event)
        if are_barred and self._weights:
            logger.warning("%s", SAVED_UNBARRED)
        if self._weights:  # Else it is shrunk, and has nothing that is masked.
            self._zero_check.watch_until_used_(model, self.masks)
        if has_adapters(model) and self.masks:  # Beside adapters there are no base weights to read them from.
            with logged_on_error("The masks were not written beside the adapters."):
                self.masks.save(Path(str(args.output_dir)) / MASKS_NAME, write=args.should_save)

    def _hold_(self, event: Event) -> None:
        """Has gradients, and adapters if there are any, leave what is masked at zero."""
        self._hooks.hold_(self._weights, self.masks)
        self._zero_check.watch_(event.model, self.masks)
        if has_adapters(event.model):
            mask_adapters_(event.model, self.masks)

    def release_(self) -> None:
        """Takes the hooks from the model and its weights."""
        self._hooks.release_(self._weights.values())
        self._zero_check.stop_()

    def _cut_if_due_(self, event: Event) -> None:
        """Cuts if a round begins here."""
        if self.rounds.pacing.is_due(event.state.global_step):
            with accessible(event.model):
                self._cut_(event)

    def _cut_(self, event: Event) -> None:
        args, state, plan, pacing = event.args, event.state, self.plan, self.rounds.pacing
        if not self.history and event.evaluate is not None:  # Else Trainer may have measured it already.
            self.history.dense = self._measure("dense", event)
            if plan.config.patience:
                self.monitor.require(self.history.metric)
        event.say(self.rounds.end_(pacing.why_round_ends(state.global_step), event.model))
        asked = self.rounds.next_sparsity
        data = CalibrationData(
            event.batches(plan.config.calibration_samples),
            {} if self.movement is None else {"movement": self.movement.statistic()},
            show_progress=state.is_world_process_zero and not args.disable_tqdm,
        )
        plan = for_samples(event.model, plan, data)
        if plan.uses_default_criterion and rank_and_size()[1] == 1:  # Of several processes one alone may fail.
            plan, data = self._calibrated(plan, data, event)
        budget = plan.budget(event.model, data.batches)
        self._adopt_(cut_(event.model, plan, self.masks, asked, data, budget), asked, event, plan, budget)
        if pacing.round == len(plan.config.round_sparsities):
            self.movement = None  # Nobody will ask for it again.
        if plan.config.restart_lr:
            self.lr_start = event.scheduler.last_epoch
            restart_lr_(event.scheduler, self.lr_start, pacing.steps_left(state.global_step), state.max_steps)

    def _calibrated(self, plan: Plan, data: CalibrationData, event: Event) -> tuple[Plan, CalibrationData]:
        """The plan and what its default criterion has to know; with another criterion, if that cannot be found out."""
        try:
            known = statistics_for(event.model, plan, data)
        except ValueError as error:
            other = plan.without_labels() if plan.reads_labels else plan.with_magnitude()
            logger.warning(
                "Falling back to criterion %s, since the calibration failed: %s. Set a criterion to choose one "
                "yourself.",
                other.criterion_name, str(error).rstrip("."),
            )  # fmt: skip
            return self._calibrated(other, data, event) if plan.reads_labels else (other, data)
        return plan, data if plan.config.score_steps > 1 else dataclasses.replace(data, known=known)

    def _adopt_(self, masks: MaskSet, asked: float | None, event: Event, plan: Plan, budget: Budget | None) -> None:
        """Holds masks from here on, writes the round down and measures it."""
        model, state, config = event.model, event.state, plan.config
        masks.settle_()  # Now that all processes are here: Trainer asks the first alone for its state.
        if event.args.world_size > 1 and not masks.are_sharded:
            require_agreement(masks.digests(), "a mask")
        self.masks = masks
        cut_state_(event.optimizer, config.optimizer_state, {w: masks.get(name) for name, w in self._weights.items()})
        self._hold_(event)
        # Metrics of a less sparse model must not keep a sparser one from becoming the best.
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None

        report = count_zeros(model, masks, plan.structures, masks)
        row = self.rounds.begin_(state.global_step, asked, report, plan.criterion_name)
        row.left = None if budget is None else budget.left(kept_in(plan.structures, masks))
        event.say(
            f"Round {row.round} of {len(config.round_sparsities)} at step {row.step}: sparsity {row.reached:.4f}, "
            f"{row.masked:,} of {row.total:,} {report.units} pruned."
            f"{'' if row.left is None else f' {row.left:.4f} of the {self.history.measure} are left.'}"
        )
        is_last = row.round == len(config.round_sparsities)  # Others may round to less on their way.
        if is_last and asked is not None and (shortfall := plan.shortfall(masks, asked, budget)):
            row.shortfall = shortfall
            logger.log(logging.WARNING if state.is_world_process_zero else logging.DEBUG, "%s", shortfall)
        event.note({"pruning_round": row.round, "sparsity": row.reached})
        row.after_cut = self._measure("after_cut", event)

    def _measure(self, prefix: str, event: Event) -> float | None:
        """The metric now; None if nobody measures it."""
        if event.evaluate is None:
            return None
        with keep_random_state(event.args.device):
            return self.monitor.measure_(self.history.metric, event.evaluate, prefix)

    def _shrink_(self, event: Event) -> None:
        model, batches = event.model, event.batches(event.args.train_batch_size * event.args.world_size)
        is_shrunk = False
        with logged_on_error("The model was not shrunk, and its pruned structures stay in it as zeros."):
            with whole_on_error(model), failing_together():  # On all processes or on none.
                costs = shrink_measured(cast(PreTrainedModel, model), self.masks, batches)
            is_shrunk = True
        if is_shrunk:
            self.history.costs = costs
            self._weights = {}  # They are no longer the model's.
            retire(event.optimizer)
            event.say(self.history.savings())
