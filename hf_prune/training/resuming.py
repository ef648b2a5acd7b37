"""Resuming: a run goes on where a checkpoint was, to the last bit."""

from ..pacing.even import Even
from ..pacing.patience import Patience
from ..reporting.history import PruningHistory
from .checkpoints import progress_of, recover_, require_same
from .events import Event
from .optimizers import restart_lr_
from .overrun import Overrun
from .rounds import Rounds
from .run import Run


def resume_(run: Run, event: Event) -> None:
    """Brings a run to where its checkpoint was.

    Args:
        run: A run that has not begun.
        event: The training's beginning, with what Trainer has loaded.

    Raises:
        ValueError: if the run was begun otherwise, does not fit the training any more, or what it has left is missing
            or damaged.
    """
    state, scheduler, plan = event.state, event.scheduler, run.plan
    progress = progress_of(state.stateful_callbacks)
    require_same(progress, plan)
    pacing = (Patience if plan.config.patience else Even)(**progress["pacing"])  # type: ignore[arg-type]
    pacing.resize_(state.max_steps, state.global_step)
    run.id, run.resumed_at = progress["run"], state.global_step
    run.rounds = Rounds(plan, pacing, PruningHistory.from_dict(progress["history"]))
    if progress["lr_start"] is not None:
        # Without the scheduler's file, as with `save_only_model`, Trainer begins its schedule anew, and so do we.
        lost = scheduler.last_epoch < progress["lr_start"]
        run.lr_start = scheduler.last_epoch if lost else progress["lr_start"]
        past = 0 if lost else state.global_step - run.history[-1].step
        left = max(1, past + pacing.steps_left(state.global_step))
        restart_lr_(scheduler, run.lr_start, left, state.max_steps)
    run.masks, run.rounds.best, movement = recover_(plan, event, progress)
    if movement is not None:
        run.movement = movement.beside(plan.targets)
    if run.masks:
        run.masks.settle_()
        run.hold_(event)
    if pacing.is_run_over(state.global_step):
        run.overrun = Overrun.of(state, event.model)
