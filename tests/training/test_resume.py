"""train(2k) ≡ train(k) + resume(k), bit for bit: weights, masks, history, what is best."""

import dataclasses
import json
import math
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, ViTConfig, ViTForImageClassification

from hf_prune import MaskSet, PruningConfig, PruningTrainerCallback, sparsity_report
from hf_prune.training.checkpoints import newest_complete
from hf_prune.training.renamed_weights import load_renamed_weights_
from hf_prune.weights.snapshot import Snapshot
from tests.processes import forkserver, launch_function
from tests.resuming import KINDS, PATIENT, train_kinds
from tests.tiny import FAMILIES, build
from tests.trainers import Rates, trainer_factory

CONFIG = PruningConfig(sparsity=0.8, schedule="geometric", rounds=3, begin=1, end=8)
STEPS = 10
OPTIONS = dict(
    max_steps=STEPS, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
    gradient_accumulation_steps=2, lr_scheduler_type="linear", warmup_steps=3, load_best_model_at_end=True,
    # Each step: the mean loss since the last log is the one thing that Trainer does not keep in a checkpoint.
    logging_strategy="steps", logging_steps=1,
)  # fmt: skip


def start(
    make_trainer, config: PruningConfig = CONFIG, family: str = "gpt2", **options
) -> tuple[Trainer, PruningTrainerCallback]:
    """A trainer and its callback; GPT-2 has dropout, so that the random state counts."""
    pruning = PruningTrainerCallback(config)
    trainer = make_trainer(build(family), pruning, **{**OPTIONS, "metric_for_best_model": config.metric, **options})
    pruning.evaluate, pruning.log = trainer.evaluate, trainer.log

    def compute_metrics(_) -> dict[str, float]:
        """Best two steps after the cut, and worse from there."""
        since = trainer.state.global_step - (pruning.history[-1].step if pruning.history else 0)
        return {"score": -abs(since - 2)}

    trainer.compute_metrics = compute_metrics
    return trainer, pruning


def outcome(trainer: Trainer, pruning: PruningTrainerCallback) -> dict:
    """All that has to be equal; clocks are the only thing that may differ."""
    history = pruning.history.to_dict()
    for row in history["rounds"]:
        del row["seconds"]
    clocks = ("runtime", "per_second", "total_flos", "train_loss")
    logs = [{k: v for k, v in log.items() if not k.endswith(clocks)} for log in trainer.state.log_history]
    return {
        "weights": {name: value.tolist() for name, value in trainer.model.state_dict().items()},
        "masks": pruning.masks.digest(),
        "history": history,
        "best": (trainer.state.best_metric, trainer.state.best_global_step),
        "logs": logs,
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Path, dict]:
    """A run from beginning to end, with a checkpoint at every step."""
    folder = tmp_path_factory.mktemp("undisturbed")
    trainer, pruning = start(trainer_factory(folder))
    trainer.train()
    assert sparsity_report(trainer.model).zeros == round(0.8 * pruning.masks.total)
    return folder / "out", outcome(trainer, pruning)


@pytest.fixture
def checkpoints(undisturbed, tmp_path) -> Path:
    """A copy of its checkpoints in the folder that `make_trainer` trains into."""
    shutil.copytree(undisturbed[0], tmp_path / "out")
    return tmp_path / "out"


def forget_after(folder: Path, step: int) -> None:
    """Removes the checkpoints of later steps."""
    for checkpoint in folder.glob("checkpoint-*"):
        if int(checkpoint.name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(checkpoint)


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_resuming_at_every_step(step, undisturbed, checkpoints, make_trainer):
    forget_after(checkpoints, step)
    trainer, pruning = start(make_trainer)
    # The path may be told to train() alone, or stand in the arguments, or be found.
    how = {0: True, 1: str(checkpoints / f"checkpoint-{step}")}[step % 2]
    trainer.train(resume_from_checkpoint=how)
    assert outcome(trainer, pruning) == undisturbed[1]


@pytest.fixture(scope="module", params=["best", "last"])
def patient(request, tmp_path_factory) -> tuple[PruningConfig, Path, dict]:
    """A run whose rounds end on patience, from beginning to end."""
    config = dataclasses.replace(PATIENT, restore=request.param)
    folder = tmp_path_factory.mktemp("patient")
    trainer, pruning = start(trainer_factory(folder), config, load_best_model_at_end=False)
    trainer.train()
    assert [(row.step, row.best_step, row.ended) for row in pruning.history] == [
        (1, 3, "patience"),
        (4, 6, "patience"),
    ]
    assert trainer.state.global_step == 7
    return config, folder / "out", outcome(trainer, pruning)


@pytest.mark.parametrize("step", range(1, 8))
def test_resuming_at_every_step_of_rounds_that_end_on_patience(step, patient, tmp_path):
    """Cuts at 1 and 4; 3 and 6 are the best; at 4 and 7, patience is over and the cut, or the end, is pending."""
    config, whole, expected = patient
    shutil.copytree(whole, tmp_path / "out")
    forget_after(tmp_path / "out", step)
    trainer, pruning = start(trainer_factory(tmp_path), config, load_best_model_at_end=False)
    trainer.train(resume_from_checkpoint=True)
    assert outcome(trainer, pruning) == expected
    best = tmp_path / "out" / f"checkpoint-{step}" / "pruning_best.safetensors"
    assert best.exists() == (config.restore == "best" and step in (4, 7))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt2"])
def test_resuming_every_family(family, tmp_path):
    """Some have other names for their weights in files than in memory."""
    trainer, pruning = start(trainer_factory(tmp_path / "whole"), family=family)
    trainer.train()
    for step in (1, 4, 9):  # before the first cut, in a round, in the last one
        folder = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole" / "out", folder / "out")
        forget_after(folder / "out", step)
        resumed, resumed_pruning = start(trainer_factory(folder), family=family)
        resumed.train(resume_from_checkpoint=True)
        assert outcome(resumed, resumed_pruning) == outcome(trainer, pruning)


def test_the_step_that_trainer_takes_after_the_end_is_not_counted(tmp_path):
    options = dict(include_num_input_tokens_seen="all", logging_strategy="steps", logging_steps=1)
    whole, _ = start(trainer_factory(tmp_path), **options)
    whole.train()
    resumed, _ = start(trainer_factory(tmp_path), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{STEPS}"))
    assert whole.state.num_input_tokens_seen > 0
    for name in ("global_step", "epoch", "num_input_tokens_seen"):
        assert getattr(resumed.state, name) == getattr(whole.state, name)


def test_the_folder_may_be_moved(undisturbed, checkpoints, make_trainer, tmp_path):
    moved = checkpoints.rename(tmp_path / "moved") / "checkpoint-6"
    (moved / "pruning_masks.safetensors").rename(moved / "elsewhere")  # then the zeros of the weights tell
    trainer, pruning = start(make_trainer)
    trainer.train(resume_from_checkpoint=str(moved))
    assert outcome(trainer, pruning)["weights"] == undisturbed[1]["weights"]


class KillInStep(TrainerCallback):
    """Kills the process when the weights have taken a step, unless that is 0."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class KillSometime(TrainerCallback):
    """Kills the process some seconds after so many steps, unless they are 0."""

    def __init__(self, steps: int, delay: float) -> None:
        self.steps, self.delay = steps, delay

    def on_step_begin(self, args, state, control, **kwargs):
        if 0 < self.steps <= state.global_step:
            threading.Timer(self.delay, os.kill, (os.getpid(), signal.SIGKILL)).start()


def exit_code_of(function: Callable[..., None], *args: object) -> int | None:
    process = forkserver().Process(target=function, args=args)
    process.start()
    process.join()
    return process.exitcode


def train_in_rounds(folder: Path, kill_at: int, how: str) -> None:
    trainer, pruning = start(trainer_factory(folder), save_steps=2)
    trainer.add_callback(KillInStep(kill_at))
    trainer.train(resume_from_checkpoint=how == "resume")
    (folder / "outcome.json").write_text(json.dumps(outcome(trainer, pruning)))


@pytest.mark.slow
def test_kill_9_in_mid_round(tmp_path):
    def run(folder: str, kill_at: int, how: str) -> int | None:
        return exit_code_of(train_in_rounds, tmp_path / folder, kill_at, how)

    assert run("whole", 0, "fresh") == 0
    assert run("killed", 6, "fresh") == -signal.SIGKILL  # the rounds begin at steps 1, 3 and 5
    assert sorted(p.name for p in (tmp_path / "killed" / "out").iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert run("killed", 9, "resume") == -signal.SIGKILL
    assert run("killed", 0, "resume") == 0
    outcomes = [json.loads((tmp_path / folder / "outcome.json").read_text()) for folder in ("whole", "killed")]
    assert outcomes[0] == outcomes[1]


def outcomes_in(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """A folder with runs of each kind: "whole", and killed and resumed, by as many processes or by four "others"."""
    folder = tmp_path_factory.mktemp("killed")

    def run(name: str, size: int, kill_at: int, how: str, *kinds: str) -> None:
        launch_function(train_kinds, size, folder / name, kill_at, how, *kinds, timeout=300)

    run("whole", 2, 0, "fresh", *KINDS)
    for kind in KINDS:
        with pytest.raises(ChildFailedError, match=r"SIGKILL|Connection"):
            run("killed", 2, 7, "fresh", kind)
        assert outcomes_in(folder / "killed" / kind) == []
        if "deepspeed" not in KINDS[kind]:  # Its checkpoints are for as many processes as before.
            shutil.copytree(folder / "killed" / kind, folder / "others" / kind)
    run("killed", 2, 0, "resume", *KINDS)
    run("others", 4, 0, "resume", *(path.name for path in (folder / "others").iterdir()))
    return folder


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("kind", KINDS)
def test_kill_9_of_one_process(kind, killed):
    first, second = outcomes_in(killed / "whole" / kind)
    assert first == second
    assert (first["world_size"], first["backend"], first["sharded"] > 0) == (2, "gloo", "fsdp" in KINDS[kind])
    assert first["partitioned"] == ("deepspeed" in KINDS[kind])
    assert [row["ended"] for row in first["history"]["rounds"]] == ["patience", "patience"]
    assert outcomes_in(killed / "killed" / kind) == [first, second]
    # What is saved is an ordinary model.
    saved = LlamaForCausalLM.from_pretrained(killed / "killed" / kind / "saved")
    assert saved.config.architectures == ["LlamaForCausalLM"]
    assert Snapshot.of(saved).digest() == first["weights"]
    assert MaskSet.from_zeros(saved).digest() == first["masks"]
    if "deepspeed" not in KINDS[kind]:  # On four processes sums are in another order.
        four = outcomes_in(killed / "others" / kind)
        assert len(four) == 4
        assert four[0]["masks"] == first["masks"]
        assert four[0]["sums"] == pytest.approx(first["sums"], rel=1e-9)


def train_for_long(folder: Path, kill_at: int, delay: float) -> None:
    config = dataclasses.replace(PATIENT, rounds=12, patience=[6], max_round_steps=8, end=120)
    trainer, pruning = start(trainer_factory(folder), config, max_steps=120, save_steps=2)
    trainer.add_callback(KillSometime(kill_at, delay))
    newest = newest_complete(folder / "out")
    with (folder / "began_from").open("a") as file:
        file.write(f"{newest}\n")
    trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    (folder / "outcome.json").write_text(json.dumps([trainer.state.global_step, outcome(trainer, pruning)]))


@pytest.mark.slow
def test_killed_at_random_moments_ten_times_in_a_row(tmp_path):
    """In a step, in an evaluation, in the middle of saving: wherever it happens to be."""

    def run(folder: str, kill_at: int = 0, delay: float = 0) -> int | None:
        (tmp_path / folder).mkdir(exist_ok=True)
        return exit_code_of(train_for_long, tmp_path / folder, kill_at, delay)

    def outcome_of(folder: str) -> list:
        return json.loads((tmp_path / folder / "outcome.json").read_text())

    assert run("whole") == 0
    part = outcome_of("whole")[0] // 12
    rng = random.Random(0)
    for kill in range(10):
        step = rng.randrange(kill * part, (kill + 1) * part) + 1
        assert run("killed", step, delay=rng.uniform(0, 0.03)) == -signal.SIGKILL
    began_from = (tmp_path / "killed" / "began_from").read_text().splitlines()
    assert (len(began_from), len(set(began_from)) >= 4) == (10, True)  # It did get on in between.
    assert run("killed") == 0
    assert outcome_of("killed") == outcome_of("whole")


def test_weights_with_other_names_in_a_folder_that_is_not_told(tmp_path):
    trainer, _ = start(trainer_factory(tmp_path), family="vit")
    trainer.train()
    moved = str((tmp_path / "out").rename(tmp_path / "moved") / "checkpoint-6")
    with pytest.raises(ValueError, match=r"name it in TrainingArguments\(resume_from_checkpoint=\.\.\.\) too"):
        start(trainer_factory(tmp_path), family="vit")[0].train(resume_from_checkpoint=moved)
    again, pruning = start(trainer_factory(tmp_path), family="vit", resume_from_checkpoint=moved)
    again.train(resume_from_checkpoint=moved)
    assert sparsity_report(again.model).zeros == round(0.8 * pruning.masks.total)


def test_masks_that_a_kill_left_out_come_back_from_the_zeros(undisturbed, checkpoints, make_trainer):
    (checkpoints / "checkpoint-6" / "pruning_masks.safetensors").unlink()
    trainer, pruning = start(make_trainer)
    trainer.train(resume_from_checkpoint=str(checkpoints / "checkpoint-6"))
    assert outcome(trainer, pruning)["weights"] == undisturbed[1]["weights"]


def damage_by_zero(folder: Path) -> None:
    """A natural zero: the masks can no longer be read from the weights."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["transformer.h.0.mlp.c_fc.weight"].view(-1)[
        weights["transformer.h.0.mlp.c_fc.weight"].view(-1).argmax()
    ] = 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def delete(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def of_another_model(path: Path) -> None:
    MaskSet({"transformer.h.0.mlp.c_fc.weight": torch.ones(3, 3, dtype=torch.bool)}).save(path)


@pytest.mark.parametrize("harm", [delete, truncate, of_another_model])
def test_masks_that_cannot_be_found_are_an_error(harm, checkpoints, make_trainer):
    folder = checkpoints / "checkpoint-6"
    damage_by_zero(folder)
    harm(folder / "pruning_masks.safetensors")
    for later in range(7, STEPS + 1):
        delete(checkpoints / f"checkpoint-{later}" / "pruning_masks.safetensors")
    before = {path: path.read_bytes() for path in checkpoints.rglob("*") if path.is_file()}
    trainer, _ = start(make_trainer)
    with pytest.raises(
        ValueError,
        match=r"masks of the checkpoint are missing or damaged: .* newest complete checkpoint here: .*checkpoint-5\.",
    ):
        trainer.train(resume_from_checkpoint=str(folder))
    assert before == {path: path.read_bytes() for path in checkpoints.rglob("*") if path.is_file()}


@pytest.mark.parametrize("harm", [delete, truncate, of_another_model])
def test_best_weights_that_cannot_be_found_are_an_error(harm, tmp_path):
    folder = tmp_path / "out" / "checkpoint-4"
    start(trainer_factory(tmp_path), PATIENT)[0].train()
    harm(folder / "pruning_best.safetensors")
    harm(tmp_path / "out" / "checkpoint-7" / "pruning_best.safetensors")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    message = r"best weights of the round are missing or damaged: .* newest complete checkpoint here: .*checkpoint-6\."
    with pytest.raises(ValueError, match=message):
        start(trainer_factory(tmp_path), PATIENT)[0].train(resume_from_checkpoint=str(folder))
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


RESTARTING = PruningConfig(sparsity=0.8, schedule="geometric", rounds=2, end=10, restart_lr=True)  # cuts at 0 and 5


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_restarted_learning_rate_in_a_run_that_goes_on_for_longer(kind, tmp_path):
    """The last round may take more steps now, and its schedule covers them."""
    options = dict(lr_scheduler_type=kind, warmup_steps=0, load_best_model_at_end=False)
    start(trainer_factory(tmp_path), RESTARTING, **options)[0].train()
    trainer, _ = start(trainer_factory(tmp_path), RESTARTING, **{**options, "max_steps": 20})
    trainer.add_callback(rates := Rates())
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-8"))
    done = [(step - 5) / 15 for step in range(8, 20)]
    shape = {"linear": lambda x: 1 - x, "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x))}[kind]
    assert rates.rates == pytest.approx([1e-2 * shape(x) for x in done])


def test_a_restarted_learning_rate_without_the_schedulers_file(tmp_path):
    """Trainer begins its schedule anew then: so does the round, with the steps that it has left."""
    options = dict(warmup_steps=0, load_best_model_at_end=False, save_only_model=True)
    start(trainer_factory(tmp_path), RESTARTING, **options)[0].train()
    trainer, _ = start(trainer_factory(tmp_path), RESTARTING, **options)
    trainer.add_callback(rates := Rates())
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-7"))
    assert rates.rates == pytest.approx([1e-2, 2e-2 / 3, 1e-2 / 3])


@pytest.mark.parametrize("step", [2, 3, 4, 5])
def test_an_evaluation_before_a_resumed_run_begins_does_not_count(step, tmp_path):
    config = dataclasses.replace(PATIENT, begin=0, restart_lr=False)
    options = dict(eval_on_start=True, load_best_model_at_end=False)
    trainer, pruning = start(trainer_factory(tmp_path), config, **options)
    trainer.train()
    resumed, resumed_pruning = start(trainer_factory(tmp_path), config, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{step}"))
    whole, again = outcome(trainer, pruning), outcome(resumed, resumed_pruning)
    assert {**again, "logs": None} == {**whole, "logs": None}  # Trainer logs that evaluation.


def test_a_run_too_short_for_the_rounds_that_are_left_is_an_error(tmp_path):
    start(trainer_factory(tmp_path), PATIENT)[0].train()
    trainer, _ = start(trainer_factory(tmp_path), PATIENT, max_steps=4)
    with pytest.raises(ValueError, match="the run has 4 steps, too few after step 3 for 1 more rounds of 2 steps"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))


def test_weights_that_do_not_fit_the_masks_are_an_error(checkpoints, make_trainer):
    shutil.copy(checkpoints / "checkpoint-2" / "model.safetensors", checkpoints / "checkpoint-9")
    trainer, _ = start(make_trainer)
    with pytest.raises(ValueError, match="masks of the checkpoint are missing or damaged: no pruning_masks"):
        trainer.train(resume_from_checkpoint=str(checkpoints / "checkpoint-9"))


def test_another_config_is_an_error(checkpoints, make_trainer):
    trainer, _ = start(make_trainer, PruningConfig(sparsity=0.9, schedule="geometric", rounds=3, begin=1, end=8))
    with pytest.raises(ValueError, match=r"pruned with another config: sparsity=0\.8 \(now 0\.9\)"):
        trainer.train(resume_from_checkpoint=True)


def test_another_criterion_is_an_error(checkpoints, make_trainer):
    trainer, pruning = start(make_trainer)
    pruning.criterion = lambda inputs: inputs.weight.abs()
    with pytest.raises(ValueError, match=r"pruned with another config: criterion='magnitude' \(now '.*lambda.*'\)"):
        trainer.train(resume_from_checkpoint=True)


def test_a_run_too_short_for_the_cuts_is_an_error(checkpoints, make_trainer):
    trainer, _ = start(make_trainer, max_steps=5)
    with pytest.raises(ValueError, match="the run has 5 steps, but the checkpoint's last cut comes after step 5"):
        trainer.train(resume_from_checkpoint=str(checkpoints / "checkpoint-2"))


def test_a_checkpoint_of_a_dense_run_is_an_error(make_trainer):
    make_trainer(build("gpt2"), **OPTIONS).train()
    trainer, _ = start(make_trainer)
    with pytest.raises(
        ValueError, match="holds no state of a PruningTrainerCallback: it was not saved by a pruning run"
    ):
        trainer.train(resume_from_checkpoint=True)


def test_callbacks_that_trainer_rebuilds_from_their_state(undisturbed, checkpoints, make_trainer):
    trainer, pruning = start(make_trainer, restore_callback_states_from_checkpoint=True)
    trainer.train(resume_from_checkpoint=str(checkpoints / "checkpoint-6"))
    rebuilt = next(c for c in trainer.callback_handler.callbacks if isinstance(c, PruningTrainerCallback))
    assert rebuilt is not pruning
    assert rebuilt.config == CONFIG
    assert outcome(trainer, rebuilt)["weights"] == undisturbed[1]["weights"]


def test_training_on_for_longer_keeps_the_cuts(checkpoints, make_trainer):
    trainer, pruning = start(make_trainer, max_steps=14)
    trainer.train(resume_from_checkpoint=str(checkpoints / "checkpoint-4"))
    assert [row.step for row in pruning.history] == [1, 3, 5]
    assert trainer.state.global_step == 14
    assert sparsity_report(trainer.model).zeros == round(0.8 * pruning.masks.total)


@pytest.mark.parametrize("begin", [1, 7])
def test_weights_with_other_names_that_are_not_told_are_an_error(begin, tmp_path):
    """Before the first cut no mask could tell that nothing was loaded."""
    config = PruningConfig(sparsity=0.8, schedule="one_shot", begin=begin)
    start(trainer_factory(tmp_path / "a"), config, family="mixtral")[0].train()
    with pytest.raises(ValueError, match=r"name it in TrainingArguments\(resume_from_checkpoint=\.\.\.\) too"):
        start(trainer_factory(tmp_path / "b"), config, family="mixtral")[0].train(
            resume_from_checkpoint=str(tmp_path / "a" / "out" / "checkpoint-3")
        )


def test_renamed_weights_load_into_any_model(tmp_path):
    """Of a class of its own, with a module more than the file has, and in two precisions."""

    class Own(ViTForImageClassification):
        def __init__(self, config: ViTConfig, more: int) -> None:
            super().__init__(config)
            self.more = torch.nn.Linear(more, more)

    plain = build("vit").to(torch.bfloat16)
    plain.classifier.float()
    torch.nn.init.normal_(plain.classifier.weight)
    plain.save_pretrained(tmp_path)
    own = Own(plain.config, 3).to(torch.bfloat16)
    own.classifier.float()
    more, parameters = own.more.weight.clone(), list(own.parameters())
    load_renamed_weights_(own, tmp_path)
    assert all(torch.equal(own.state_dict()[name], value) for name, value in plain.state_dict().items())
    assert torch.equal(own.more.weight, more)
    assert all(a is b for a, b in zip(own.parameters(), parameters, strict=True))
