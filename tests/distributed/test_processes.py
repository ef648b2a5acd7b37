"""Several processes: what one process prunes, two prune."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from accelerate.state import PartialState
from torch import nn

from hf_prune import MaskSet, PruningConfig, PruningTrainerCallback, ScoreInputs, prune, sparsity_report
from hf_prune.criteria import CRITERIA, RECONSTRUCTIONS
from hf_prune.distributed.gathering import accessible
from hf_prune.distributed.shards import whole
from hf_prune.distributed.zero import has_partitions, master_of, shape_of
from hf_prune.weights.snapshot import Snapshot
from tests.processes import in_turn, launch_function, on_two_processes
from tests.structures.mixtures import build_mixture
from tests.structures.models import DECODER, perturbed
from tests.structures.models import build as build_of_structures
from tests.tiny import batch, build
from tests.trainers import FSDP, trainer_factory, zero

CONFIGS = {
    "even": PruningConfig(sparsity=0.8, schedule="geometric", rounds=3, end=6),
    "patience": PruningConfig(
        sparsity=0.8, schedule="geometric", rounds=3, patience=1, min_round_steps=1, restart_lr=True, end=0.99
    ),
    # Of 11 samples the first process has one more than the second.
    **{
        name: PruningConfig(
            sparsity=0.8, schedule="geometric", rounds=3, end=6, criterion=name, scope="global", calibration_samples=11
        )
        for name in ("taylor", "fisher", "wanda", "sparsegpt")
    },
    "movement": PruningConfig(sparsity=0.8, schedule="geometric", rounds=3, begin=2, end=6, criterion="movement"),
    "structures": PruningConfig(
        sparsity=0.5, schedule="geometric", rounds=3, end=6, criterion="fisher", granularity="head+neuron",
        multiple_of=4, calibration_samples=11,
    ),
    # Of a family in no table, which is found on a small model that each process has to itself.
    "found": PruningConfig(
        keep_parameters=0.7, schedule="geometric", rounds=3, end=6, granularity="head+neuron", multiple_of=4,
        criterion="activation",
    ),
    "solved anew": PruningConfig(
        sparsity=0.5, schedule="geometric", rounds=3, end=6, criterion="activation", granularity="head+neuron",
        multiple_of=4, reconstruct=True, calibration_samples=11,
    ),
    "a budget": PruningConfig(
        keep_parameters=0.7, schedule="geometric", rounds=3, end=6, criterion="gate_fisher",
        granularity="query+neuron", multiple_of=4, calibration_samples=11,
    ),
    "experts": PruningConfig(
        sparsity=0.375, schedule="geometric", rounds=3, end=6, criterion="reap", granularity="expert",
        calibration_samples=11,
    ),
}  # fmt: skip
STRUCTURES = ("structures", "found", "solved anew", "a budget", "experts")
WHOLE = ("sparsegpt", *STRUCTURES)  # With FSDP2 these are errors.
# How one process and how two are told to train. DeepSpeed trains in float32.
FLOAT32 = {"float32": True}
SGD = {"optim": "sgd", "learning_rate": 1.0}  # Which shows whether gradients were masked before they were clipped.
KINDS: dict[str, tuple[dict, dict]] = {
    "ddp": ({}, {}),
    "fsdp": ({}, FSDP),
    "fsdp-one-group": ({}, {"fsdp": True, "fsdp_config": {"fsdp_version": 2, "auto_wrap_policy": "NO_WRAP"}}),
    "native": ({"save_strategy": "no"}, {"save_strategy": "no", "native": True}),  # Trainer does not resume these.
    "zero-1": ({**FLOAT32, **SGD}, {**FLOAT32, **SGD, **zero(1)}),
    "zero-2": (FLOAT32, {**FLOAT32, **zero(2)}),
    "zero-3": (FLOAT32, {**FLOAT32, **zero(3)}),
}
CELLS = [
    *(("ddp", name) for name in CONFIGS),
    *(("fsdp", name) for name in CONFIGS if name not in WHOLE),
    *((kind, name) for kind in ("fsdp-one-group", "native") for name in ("even", "fisher")),
    ("zero-1", "even"),
    *(("zero-2", name) for name in CONFIGS if name != "movement"),
    # Stage 3 has a backward pass of its own, and hides the gradients that gate_fisher reads.
    *(("zero-3", name) for name in CONFIGS if name not in ("movement", "a budget")),
]
SAVING = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps"}
EVEN = {"eval_steps": 3}
OPTIONS = {
    "patience": {"eval_steps": 1, "learning_rate": 0.3, "max_steps": 30},  # so large that it soon gets worse
}


def train(folder: Path, pacing: str, options: dict) -> None:
    """Trains on whatever processes there are, and notes what came out of it."""
    from transformers import TrainerCallback

    options = {**SAVING, **EVEN, **options, **OPTIONS.get(pacing, {})}
    if pacing == "experts":
        model = build_mixture("mixtral")
        model.config._experts_implementation = "eager"  # No kernel knows float64.
    elif pacing == "found":
        model = perturbed(transformers.GraniteForCausalLM(transformers.GraniteConfig(**DECODER))).double()
    else:
        model = (build_of_structures if pacing in ("structures", "solved anew", "a budget") else build)(
            "llama"
        ).double()
    if options.pop("native", False):  # Each process reads its part of the files.
        state = PartialState(cpu=True)  # Else each process takes itself for the only one.
        with state.main_process_first():
            if state.is_main_process:
                model.save_pretrained(folder / "dense")
        sharding = {"fsdp_size": int(os.environ["WORLD_SIZE"])}
        model = type(model).from_pretrained(folder / "dense", distributed_config=sharding)
    config = CONFIGS[pacing]
    if options.pop("float32", False):
        model = model.float()
        if pacing in STRUCTURES:  # With DeepSpeed shrinking is an error.
            config = dataclasses.replace(config, shrink_at_end=False)
    norms: list[float] = []

    class Norm(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            if not trainer.is_deepspeed_enabled:  # It has stepped already.
                norms.append(sum(float(whole(p.grad).square().sum()) for p in model.parameters()) ** 0.5)

    class Look(TrainerCallback):
        """Calls the model, as callbacks do that show what it says."""

        def on_train_begin(self, args, state, control, model, **kwargs):
            with torch.no_grad():
                model(input_ids=torch.ones(1, 4, dtype=torch.long))

        on_step_begin = on_step_end = on_train_end = on_train_begin

    pruning = PruningTrainerCallback(config)
    trainer = trainer_factory(folder)(
        model, Look(), pruning, Norm(), train_dataset=batch(model, 24), eval_dataset=batch(model, 8, seed=1),
        per_device_train_batch_size=4 // int(os.environ["WORLD_SIZE"]), max_grad_norm=1e-2, **options,
    )  # fmt: skip
    pruning.evaluate, pruning.log = trainer.evaluate, trainer.log
    trainer.train()
    if trainer.is_world_process_zero():  # By itself.
        assert f"sparsity {pruning.masks.masked / pruning.masks.total:.4f}" in repr(pruning.masks)
    result = {
        "world_size": trainer.args.world_size,
        "backend": torch.distributed.get_backend(),
        "sharded": {type(parameter).__name__ for parameter in model.parameters()} == {"DTensor"},
        "partitioned": has_partitions(model),
        "masks": pruning.masks.digest(),
        "read": MaskSet.from_zeros(model, pruning.masks).digest(),
        "zeros": sparsity_report(model).model_zeros,
        "pruned": pruning.history[-1].masked,
        "parameters": sum(shape_of(parameter).numel() for parameter in model.parameters()),
        "norms": norms,
        "samples": [row.samples for row in pruning.history],
        "rounds": [(row.step, row.best_step, row.ended) for row in pruning.history],
        "after_cut": [row.after_cut for row in pruning.history],
        "weights": sum(float(whole(master_of(parameter)).abs().sum()) for parameter in model.parameters()),
    }
    (folder / f"rank-{trainer.args.process_index}.json").write_text(json.dumps(result))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What comes of each cell on one process and on two."""

    def of_size(size: int) -> dict[tuple[str, str], list[dict]]:
        folder = tmp_path_factory.mktemp(f"outcomes-{size}")
        launch_function(train_cells, size, folder, timeout=600)
        return {
            (kind, name): [json.loads(path.read_text()) for path in sorted((folder / kind / name).glob("rank-*.json"))]
            for kind, name in CELLS
        }

    return of_size(1), of_size(2)


@pytest.mark.multiprocess
@pytest.mark.parametrize(("kind", "name"), CELLS)
def test_two_processes_prune_what_one_does(kind, name, outcomes):
    (one,), (first, second) = (of_size[kind, name] for of_size in outcomes)
    assert (one.pop("world_size"), one.pop("backend"), one.pop("sharded")) == (1, "gloo", False)
    for outcome in (first, second):
        assert (outcome["world_size"], outcome["backend"]) == (2, "gloo")
        assert outcome["sharded"] == (kind in ("fsdp", "fsdp-one-group", "native"))
        assert outcome["partitioned"] == kind.startswith("zero")
    assert first == second
    # Of 9 or 12 heads of keys and values and 72 neurons, or of 16 experts.
    pruned = {"structures": 4 + 36, "solved anew": 6 + 36, "found": 30, "experts": 6, "a budget": 47}.get(
        name, round(0.8 * 4608)
    )
    assert first["pruned"] == one["pruned"] == pruned
    assert first["parameters"] == one["parameters"]
    assert first["masks"] == one["masks"]
    if not (name in STRUCTURES and kind == "ddp"):  # whose pruned structures are gone
        assert first["read"] == first["masks"]
    assert first["zeros"] == one["zeros"]
    assert first["samples"] == one["samples"]
    assert first["rounds"] == one["rounds"]
    if name == "patience":  # Each round ends after its best, and the best comes back.
        assert "patience" in [ended for *_, ended in one["rounds"]]
    else:
        assert one["samples"] == ([4, 4, 8] if name == "movement" else [8, 8, 8])
        assert one["norms"] == pytest.approx([1e-2] * 6, rel=1e-3)
    if not first["partitioned"]:
        # Masked before the reduction and clipped after it: the norm is that of the masked mean gradient.
        assert first["norms"] == pytest.approx(one["norms"], rel=1e-9)
    # DeepSpeed trains in float32, whose rounding grows with learning rates as large as that of "patience".
    assert first["weights"] == pytest.approx(one["weights"], rel=1e-5 if first["partitioned"] else 1e-12)
    assert first["after_cut"] == pytest.approx(one["after_cut"], rel=1e-6)


class Routed(nn.Module):
    """Experts in modules, each called only if a sample of the batch goes to it, in the order in which they come up."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6)) for _ in range(5))

    def forward(self, x, route, labels):
        x = self.first(x)
        outputs = torch.zeros_like(x)
        for i in dict.fromkeys(route.tolist()):
            outputs[route == i] = self.experts[i](x[route == i])
        outputs = self.last(outputs + x)
        return {"loss": F.mse_loss(outputs, labels), "logits": outputs}


ROUTES = [(0, 1, 0, 1), (1, 0)], [(3, 2, 1), (1, 2, 2)]  # Nothing goes to the last one.


def batches_of(rank: int) -> list[dict[str, torch.Tensor]]:
    """Those of one process."""
    generator = torch.Generator().manual_seed(rank)

    def numbers(size: int) -> torch.Tensor:
        return torch.randn(size, 6, generator=generator, dtype=torch.float64)

    return [
        {"x": numbers(len(route)), "route": torch.tensor(route), "labels": numbers(len(route))}
        for route in ROUTES[rank]
    ]


CONFIGS_OF_ROUTED = [
    PruningConfig(sparsity=0.6, criterion=criterion, calibration_samples=12)
    for criterion in (*CRITERIA, *RECONSTRUCTIONS)
    if criterion != "movement"  # which is gathered in training
] + [
    PruningConfig(sparsity=0.6, criterion="sparsegpt", scope="layer", calibration_samples=12),
    PruningConfig(sparsity=0.6, criterion="sparsegpt", calibration_samples=1),  # of which the second process has none
]


def prune_routed(rank: int | None) -> list[dict[str, torch.Tensor]]:
    """What each config leaves, on one of two processes or on a single one with what both have."""
    left = []
    for config in CONFIGS_OF_ROUTED:
        torch.manual_seed(0)
        model = Routed().double()
        prune(model, config, batches_of(0) + batches_of(1) if rank is None else batches_of(rank))
        left.append(model.state_dict())
    return left


@pytest.mark.multiprocess
def test_processes_whose_samples_go_to_other_experts_prune_what_one_does(tmp_path):
    results = zip(prune_routed(None), *on_two_processes(prune_routed, tmp_path), CONFIGS_OF_ROUTED, strict=True)
    for one, first, second, config in results:
        for name, weights in one.items():
            assert torch.equal(first[name], second[name]), config
            assert torch.equal(first[name] == 0, weights == 0), config
            assert torch.allclose(first[name], weights, rtol=1e-9, atol=1e-12), config


def train_apart(rank: int, folder: Path) -> str:
    """What is said if a criterion scores one tensor otherwise on the second process."""
    model = build("llama")
    odd = [name for name, _ in model.named_parameters() if name.endswith("up_proj.weight")][-1]

    def criterion(inputs: ScoreInputs) -> torch.Tensor:
        scores = inputs.weight.abs()
        return -scores if rank == 1 and inputs.name == odd else scores

    pruning = PruningTrainerCallback(PruningConfig(sparsity=0.5, scope="layer"), criterion=criterion)
    trainer = trainer_factory(folder)(model, pruning, train_dataset=batch(model, 8), max_steps=1)
    assert trainer.args.world_size == 2
    assert torch.distributed.get_backend() == "gloo"
    with pytest.raises(ValueError, match="process 1 has a mask of") as caught:
        trainer.train()
    return str(caught.value)


@pytest.mark.multiprocess
def test_masks_that_differ_are_an_error_on_every_process(tmp_path):
    first, second = on_two_processes(train_apart, tmp_path, tmp_path)
    assert first == second
    assert "'model.layers.1.mlp.up_proj.weight' other than process 0" in first


def train_by_metrics_of_ones_own(rank: int, folder: Path) -> list[tuple[int, str | None]]:
    """When rounds end if each process measures something else."""
    model = build("llama")
    pruning = PruningTrainerCallback(
        PruningConfig(sparsity=0.5, rounds=2, patience=1, min_round_steps=1, metric="score", end=0.9)
    )
    trainer = trainer_factory(folder)(
        model, pruning, train_dataset=batch(model, 24), eval_dataset=batch(model, 8, seed=1), max_steps=12,
        per_device_train_batch_size=2, eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    assert trainer.args.world_size == 2
    assert torch.distributed.get_backend() == "gloo"
    trainer.compute_metrics = lambda _: {"score": trainer.state.global_step * (1 if rank else -1)}
    trainer.train()
    return [(row.step, row.ended) for row in pruning.history]


@pytest.mark.multiprocess
def test_processes_that_measure_something_else_prune_at_the_same_steps(tmp_path):
    first, second = on_two_processes(train_by_metrics_of_ones_own, tmp_path, tmp_path)
    assert first == second
    assert [ended for _, ended in first] == ["patience", "patience"]


def fail_apart(rank: int, folder: Path) -> None:
    signal.alarm(100)  # Instead of waiting for ever.

    def criterion(inputs: ScoreInputs) -> torch.Tensor:
        if rank == 1:
            raise ValueError(f"only on one of {torch.distributed.get_world_size()}, {has_partitions(trainer.model)}")
        return inputs.weight.abs()

    model = build("llama")
    pruning = PruningTrainerCallback(PruningConfig(sparsity=0.5, scope="layer"), criterion=criterion)
    trainer = trainer_factory(folder)(model, pruning, train_dataset=batch(model, 8), max_steps=1, **zero(3))
    trainer.train()


@pytest.mark.multiprocess
def test_an_error_on_one_process_while_parameters_are_gathered_ends_it(tmp_path):
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="only on one of 2, True"):
        on_two_processes(fail_apart, tmp_path, tmp_path)


def fail_in_the_second_step(rank: int, folder: Path, stage: int) -> tuple[str, str]:
    """Digests of weights and masters before a cut that fails when it has pruned some of them, and after it."""

    def criterion(inputs: ScoreInputs) -> torch.Tensor:
        if not inputs.weight.all():
            raise ValueError("some are zero")
        return inputs.weight.abs()

    model = build("llama")
    before = Snapshot.of(model).digest()
    pruning = PruningTrainerCallback(PruningConfig(sparsity=0.5, score_steps=2), criterion=criterion)
    trainer = trainer_factory(folder)(model, pruning, train_dataset=batch(model, 8), max_steps=1, **zero(stage))
    with pytest.raises(ValueError, match="some are zero"):
        trainer.train()
    assert has_partitions(model)
    with accessible(model):
        assert all(torch.equal(master_of(parameter), parameter) for parameter in model.parameters())
    return before, Snapshot.of(model).digest()


@pytest.mark.multiprocess
@pytest.mark.parametrize("stage", [2, 3])
def test_a_cut_that_fails_half_way_leaves_masters_and_parts_as_they_were(stage, tmp_path):
    for before, after in on_two_processes(fail_in_the_second_step, tmp_path, tmp_path, stage):
        assert before == after


def train_cells(folder: Path) -> None:
    def train_cell(cell: tuple[str, str]) -> None:
        kind, name = cell
        here = folder / kind / name
        here.mkdir(parents=True, exist_ok=True)
        train(here, name, KINDS[kind][int(os.environ["WORLD_SIZE"]) - 1])

    in_turn(CELLS, train_cell)
