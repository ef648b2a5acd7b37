"""Several processes: what one process prunes, two prune."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from torch import nn

from hf_prune import PruningConfig, PruningTrainerCallback, ScoreInputs, prune
from hf_prune.criteria import CRITERIA
from hf_prune.reconstruction import RECONSTRUCTIONS
from hf_prune.shards import whole
from tests.processes import end_processes, on_two_processes
from tests.structures.models import build as build_of_structures
from tests.tiny import batch, build
from tests.training import FSDP, trainer_factory

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
}  # fmt: skip
WHOLE = ("sparsegpt", "structures")  # These need whole weights.
EVEN = {"eval_steps": 3}
OPTIONS = {
    "patience": {"eval_steps": 1, "learning_rate": 0.3, "max_steps": 30},  # so large that it soon gets worse
}


def train(folder: Path, batch_size: int, pacing: str, options: dict) -> None:
    """Trains on whatever processes there are, and notes what came out of it."""
    from transformers import TrainerCallback

    model = (build_of_structures if pacing == "structures" else build)("llama").double()
    norms: list[float] = []

    class Norm(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            norms.append(sum(float(whole(p.grad).square().sum()) for p in model.parameters()) ** 0.5)

    pruning = PruningTrainerCallback(CONFIGS[pacing])
    trainer = trainer_factory(folder)(
        model, pruning, Norm(), train_dataset=batch(model, 24), eval_dataset=batch(model, 8, seed=1),
        per_device_train_batch_size=batch_size, max_grad_norm=1e-2, save_strategy="steps", save_steps=3,
        eval_strategy="steps", **OPTIONS.get(pacing, EVEN), **options,
    )  # fmt: skip
    pruning.evaluate, pruning.log = trainer.evaluate, trainer.log
    trainer.train()
    result = {
        "world_size": trainer.args.world_size,
        "backend": torch.distributed.get_backend() if torch.distributed.is_initialized() else None,
        "masks": pruning.masks.digest(),
        "pruned": pruning.history[-1].masked,
        "parameters": model.num_parameters(),
        "norms": norms,
        "samples": [row.samples for row in pruning.history],
        "rounds": [(row.step, row.best_step, row.ended) for row in pruning.history],
        "after_cut": [row.after_cut for row in pruning.history],
        "weights": sum(float(whole(parameter.detach()).abs().sum()) for parameter in model.parameters()),
        "sharded": {type(parameter).__name__ for parameter in model.parameters()} == {"DTensor"},
    }
    (folder / f"rank-{trainer.args.process_index}.json").write_text(json.dumps(result))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What comes of each config on one process, on two, and on two with FSDP2."""

    def launch(processes: int, batch_size: int, names: Iterable[str], options: dict) -> dict[str, list[dict]]:
        folder = tmp_path_factory.mktemp("outcomes")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        script = ["-m", "tests.test_processes", str(folder), str(batch_size), json.dumps(options), *names]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, *script], check=True, env=environment, timeout=240, cwd=Path(__file__).parents[1])
        return {n: [json.loads(path.read_text()) for path in sorted((folder / n).glob("rank-*.json"))] for n in names}

    sharded = [name for name in CONFIGS if name not in WHOLE]
    return launch(1, 4, CONFIGS, {}), launch(2, 2, CONFIGS, {}), launch(2, 2, sharded, FSDP)


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("name", "are_sharded"),
    [(name, are_sharded) for name in CONFIGS for are_sharded in (False, True) if not (are_sharded and name in WHOLE)],
)
def test_two_processes_prune_what_one_does(name, are_sharded, outcomes):
    alone, together, sharded = outcomes
    (one,), (first, second) = alone[name], (sharded if are_sharded else together)[name]
    for outcome, size, shards in ((one, 1, False), (first, 2, are_sharded), (second, 2, are_sharded)):
        assert (outcome["world_size"], outcome["backend"], outcome["sharded"]) == (size, "gloo", shards)
    assert first == second
    # Of 9 heads of keys and values and 72 neurons.
    assert first["pruned"] == one["pruned"] == (4 + 36 if name == "structures" else round(0.8 * 4608))
    assert first["parameters"] == one["parameters"]
    assert first["masks"] == one["masks"]
    assert first["samples"] == one["samples"]
    assert first["rounds"] == one["rounds"]
    if name != "patience":
        assert one["samples"] == ([4, 4, 8] if name == "movement" else [8, 8, 8])
        assert one["norms"] == pytest.approx([1e-2] * 6, rel=1e-3)
    else:  # Each round ends after its best, and the best comes back.
        assert "patience" in [ended for *_, ended in one["rounds"]]
    # Masked before the reduction and clipped after it: the norm is that of the masked mean gradient.
    assert first["norms"] == pytest.approx(one["norms"], rel=1e-9)
    assert first["weights"] == pytest.approx(one["weights"], rel=1e-12)
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


if __name__ == "__main__":
    for each in sys.argv[4:]:
        (Path(sys.argv[1]) / each).mkdir(exist_ok=True)
        train(Path(sys.argv[1]) / each, int(sys.argv[2]), each, json.loads(sys.argv[3]))
        AcceleratorState._reset_state(reset_partial_state=True)
    end_processes()
