"""The callback on a model with adapters: base weights are pruned while adapters are trained."""

import copy
import dataclasses
import logging
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from hf_prune import MaskSet, PruningConfig, PruningTrainerCallback, keep_sparsity, prune
from hf_prune.criteria import CRITERIA
from hf_prune.distributed.gathering import accessible
from hf_prune.distributed.shards import has_shards, whole
from hf_prune.distributed.zero import has_partitions
from hf_prune.recovery.masked_lora import MaskedLinear
from hf_prune.weights.targets import find_targets
from tests.processes import on_two_processes, results_in_turn
from tests.resuming import KINDS
from tests.tiny import TEXT, batch, build, logits
from tests.trainers import FSDP, trainer_factory

EVEN = PruningConfig(sparsity=0.8, schedule="geometric", rounds=3, end=4)
PATIENT = PruningConfig(sparsity=0.8, schedule="geometric", rounds=3, patience=1, min_round_steps=1, restart_lr=True)


def adapted(family: str = "llama", dtype: torch.dtype = torch.float32, **options) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(build(family, dtype), LoraConfig(**{"target_modules": "all-linear", "r": 2, **options}))


def train(folder: Path, config: PruningConfig, model: nn.Module, resume: str | None = None, **options):
    pruning = PruningTrainerCallback(config)
    trainer = trainer_factory(folder)(
        model, pruning, train_dataset=batch(model.get_base_model(), 24),
        eval_dataset=batch(model.get_base_model(), 8, seed=1), eval_strategy="steps", eval_steps=1,
        resume_from_checkpoint=resume, **options,
    )  # fmt: skip
    pruning.evaluate = trainer.evaluate
    trainer.train(resume_from_checkpoint=resume)
    return pruning, trainer


@pytest.mark.parametrize("config", [EVEN, PATIENT, PruningConfig(granularity="2:4")], ids=["even", "patience", "2:4"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neo"])
def test_base_weights_are_pruned_while_adapters_are_trained(family, config, tmp_path):
    model = adapted(family)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    options = {"max_steps": 30, "learning_rate": 0.3} if config.patience else {}
    pruning, trainer = train(tmp_path, config, model, **options)
    assert pruning.masks.masked == round(config.round_sparsities[-1] * pruning.masks.total)
    assert len(pruning.history) == len(config.round_sparsities)
    moved = 0
    for name, parameter in model.named_parameters():
        if name in pruning.masks:
            assert torch.equal(parameter, before[name] * pruning.masks[name])
        elif "lora_" in name:
            moved += not torch.equal(parameter, before[name])
        else:
            assert torch.equal(parameter, before[name])
    assert moved > 0
    expected = logits(model.eval())
    merged = copy.deepcopy(model).merge_and_unload()
    zeros = MaskSet.from_zeros(merged)
    assert zeros.masked == pruning.masks.masked
    assert torch.allclose(logits(merged), expected, atol=1e-5)
    row = pruning.history[-1]  # With patience its best weights have come back.
    assert trainer.evaluate()["eval_loss"] == pytest.approx(row.best if config.patience else row.last, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_modules_that_are_trained_whole_are_pruned_where_they_are_trained(family, tmp_path):
    modules = ["down_proj", "layers.1"] if family == "llama" else ["output.dense", "classifier"]
    model = adapted(family, target_modules=["q_proj", "query"], modules_to_save=modules)
    plain = build(family)
    pruning, _ = train(tmp_path, EVEN, model)
    assert pruning.masks.total == sum(target.weight.numel() for target in find_targets(plain).values())
    copies = [name for name in pruning.masks if "modules_to_save.default" in name]
    assert copies
    assert not any("original_module" in name for name in pruning.masks)
    before = dict(plain.named_parameters())
    for name in copies:
        moved = model.get_parameter(name) != before[name.replace("base_model.model.", "").replace(
            "modules_to_save.default.", ""
        )] * pruning.masks[name]  # fmt: skip
        assert bool(moved.any())
    expected = logits(model.eval())
    merged = model.merge_and_unload()
    assert MaskSet.from_zeros(merged).masked == pruning.masks.masked
    assert torch.allclose(logits(merged), expected, atol=1e-5)


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name != "movement"])
def test_every_criterion(criterion, tmp_path):
    config = dataclasses.replace(EVEN, criterion=criterion, calibration_samples=8)
    model = adapted()
    pruning, _ = train(tmp_path, config, model)
    assert pruning.masks.sparsity == pytest.approx(0.8, abs=0.02)  # wanda rounds in each row
    assert any(type(module) is MaskedLinear for module in model.modules())


@pytest.mark.parametrize("names", [[], ["default"], ["default", "other"]])
@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "wanda", "fisher"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scores_under_adapters_are_those_of_the_merged_model(family, criterion, names):
    model = adapted(family, torch.float64)
    model.add_adapter("other", LoraConfig(target_modules="all-linear", r=3))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and any(each in name for each in names):
                parameter.copy_(torch.randn_like(parameter) * 0.05)
    model.base_model.set_adapter(names or ["default"])
    samples = [
        {key: torch.stack([s[key] for s in batch(model.get_base_model(), 8)]) for key in ("input_ids", "labels")}
    ]
    first = PruningConfig(sparsity=0.25)
    second = PruningConfig(sparsity=0.5, criterion=criterion, calibration_samples=8)
    prune(model, first)
    keep_sparsity(model)  # Its layers compute by one product, unless somebody looks.
    merged = copy.deepcopy(model).merge_and_unload()
    prune(model, second, samples)
    prune(merged, second, samples)
    assert MaskSet.from_zeros(model.unload()) == MaskSet.from_zeros(merged)


@pytest.mark.parametrize("at", [2, 3, 5])
@pytest.mark.parametrize("config", [EVEN, PATIENT], ids=["even", "patience"])
def test_a_resumed_run_is_the_undisturbed_one(config, at, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 9, "learning_rate": 0.1}
    straight, resumed = adapted(), adapted()
    pruning, _ = train(tmp_path, config, straight, **options)
    again, _ = train(tmp_path, config, resumed, str(tmp_path / "out" / f"checkpoint-{at}"), **options)
    assert again.masks == pruning.masks
    expected = dict(straight.named_parameters())
    assert all(torch.equal(parameter, expected[name]) for name, parameter in resumed.named_parameters())
    for ours, theirs in zip(again.history, pruning.history, strict=True):
        assert dataclasses.replace(ours, seconds=0) == dataclasses.replace(theirs, seconds=0)


def test_what_is_saved_makes_the_model_again(tmp_path):
    model = adapted()
    _, trainer = train(tmp_path, EVEN, model)
    trainer.save_model()
    expected = logits(model.eval())
    base, folder = build("llama"), tmp_path / "out"
    MaskSet.load(folder / "pruning_masks.safetensors").apply_(again := PeftModel.from_pretrained(base, str(folder)))
    assert torch.equal(logits(keep_sparsity(again).eval()), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"granularity": "neuron"},
            "adapters, whose matrices are as wide as the layers that they stand",
        ),
        ({"criterion": "sparsegpt"}, "criterion 'sparsegpt' changes base weights, which checkpoints of adapters"),
        ({"criterion": "movement", "begin": 1}, "base weights under adapters do not move"),
        ({"target_modules": ["lora_A"]}, "matches no prunable module"),
    ],
)
def test_what_does_not_go_with_adapters_is_an_error(changes, message, tmp_path):
    config = PruningConfig(**{"sparsity": 0.5, **changes})
    with pytest.raises(ValueError, match=message):
        train(tmp_path, config, adapted())


def test_adapters_that_cannot_be_masked_are_an_error(tmp_path):
    model = adapted(use_dora=True)
    with pytest.raises(ValueError, match="is a DoraLinearVariant, which does more than add to weights"):
        train(tmp_path, EVEN, model)
    assert not any(bool((p == 0).any()) for n, p in model.named_parameters() if "base_layer.weight" in n)


# Several processes


def of_odd_width(options: dict) -> PeftModel:
    """Of base weights and of adapters one process holds more rows than the other. DeepSpeed trains in float32."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**TEXT, "intermediate_size": 33}, num_key_value_heads=1)
    base = transformers.LlamaForCausalLM(config)
    base = base if "deepspeed" in options else base.double()
    return get_peft_model(base, LoraConfig(target_modules="all-linear", r=3))


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    with accessible(model):
        return {name: whole(parameter.detach()).clone() for name, parameter in model.named_parameters()}


def train_apart(rank: int, folder: Path, criterion: str, samples: int, options: dict) -> dict[str, torch.Tensor]:
    model = of_odd_width(options)
    config = dataclasses.replace(EVEN, criterion=criterion, calibration_samples=8)
    # Evaluation comes before the first pass of the training, in which DeepSpeed would learn who reads what.
    train(folder / str(rank), config, model, per_device_train_batch_size=samples, eval_on_start=True, **options)
    assert has_shards(model) == ("fsdp" in options)
    assert has_partitions(model) == ("deepspeed" in options)
    masks = [module.sparsity_mask for module in model.modules() if type(module) is MaskedLinear]
    assert masks
    assert all((mask is None) == ("fsdp" in options) for mask in masks)
    return weights_of(model)


CELLS = [
    ("fisher", "ddp"),
    *((criterion, "fsdp") for criterion in ("magnitude", "taylor", "fisher", "wanda")),
    ("wanda", "zero-2"),
    ("fisher", "zero-3"),
]


def train_cells_apart(rank: int, folder: Path) -> list[dict[str, torch.Tensor]]:
    return results_in_turn(CELLS, lambda cell: train_apart(rank, folder, cell[0], 2, KINDS[cell[1]]))


@pytest.mark.multiprocess
def test_several_processes_prune_and_learn_what_one_does(tmp_path):
    one = {criterion: train_apart(0, tmp_path / criterion, criterion, 4, {}) for criterion, _ in CELLS}
    for of_rank in on_two_processes(train_cells_apart, tmp_path / "two", tmp_path / "two"):
        for (criterion, kind), found in zip(CELLS, of_rank, strict=True):
            expected, close = one[criterion], 1e-7 if "zero" not in kind else 1e-6
            assert found.keys() == expected.keys()
            for name, tensor in expected.items():
                assert torch.allclose(found[name].double(), tensor, rtol=0, atol=close), (criterion, kind, name)
                assert "base_layer" not in name or torch.equal(found[name] == 0, tensor == 0), (criterion, kind, name)


RESUMED = [("ddp", PATIENT), ("fsdp", PATIENT), ("fsdp-sharded", EVEN), ("zero-2", EVEN), ("zero-3", PATIENT)]


def resume_apart(rank: int, folder: Path) -> list[tuple]:
    def run(cell: tuple[str, PruningConfig, bool]) -> tuple:
        kind, config, resumes = cell
        model, checkpoint = of_odd_width(KINDS[kind]), str(folder / kind / "out" / "checkpoint-3")
        pruning, trainer = train(
            folder / kind, config, model, checkpoint if resumes else None, save_strategy="steps", save_steps=1,
            max_steps=9, learning_rate=0.1, per_device_train_batch_size=2, **KINDS[kind],
        )  # fmt: skip
        trainer.save_model()
        rows = [dataclasses.asdict(dataclasses.replace(row, seconds=0)) for row in pruning.history]
        return weights_of(model), pruning.masks.digest(), rows

    return results_in_turn([(*cell, resumes) for cell in RESUMED for resumes in (False, True)], run)


@pytest.mark.multiprocess
def test_two_processes_resume_and_save(tmp_path):
    for of_rank in on_two_processes(resume_apart, tmp_path, tmp_path):
        for (kind, _), straight, resumed in zip(RESUMED, of_rank[::2], of_rank[1::2], strict=True):
            weights, *rest = straight
            assert resumed[1:] == tuple(rest), kind
            assert all(torch.equal(resumed[0][name], weight) for name, weight in weights.items()), kind
            masks = MaskSet.load(tmp_path / kind / "out" / "pruning_masks.safetensors")
            assert masks.digest() == rest[0]
            if kind != "fsdp-sharded":  # Trainer saves no adapters of such a run: they are in its checkpoints.
                again = PeftModel.from_pretrained(of_odd_width(KINDS[kind]).unload(), str(tmp_path / kind / "out"))
                masks.apply_(again)
                assert all(torch.equal(tensor, weights[name]) for name, tensor in again.named_parameters())


def with_zeros_that_are_kept(rank: int, folder: Path) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    model, said = of_odd_width(FSDP), []
    name = "base_model.model.model.layers.1.mlp.down_proj"
    with torch.no_grad():
        model.get_submodule(name).base_layer.weight[:3].zero_()
    handler = logging.Handler()
    logging.getLogger("hf_prune").setLevel(logging.DEBUG)  # Only one process says it aloud.
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("hf_prune.recovery.lora").addHandler(handler)
    config = PruningConfig(sparsity=0.5, layer_sparsity={r".*down_proj": 0.05}, scope="layer", criterion="random")
    pruning, _ = train(folder, config, model, per_device_train_batch_size=2, **FSDP)
    delta = model.get_submodule(name).get_delta_weight("default").detach()
    return whole(delta), whole(pruning.masks[f"{name}.base_layer.weight"]), said


def wrapped_one_by_one(rank: int, folder: Path) -> str:
    linears = {**FSDP["fsdp_config"], "transformer_layer_cls_to_wrap": ["Linear"]}
    with pytest.raises(ValueError, match="masked adapters need both at once") as caught:
        train(folder, EVEN, of_odd_width(FSDP), per_device_train_batch_size=2, fsdp=True, fsdp_config=linears)
    return str(caught.value)


@pytest.mark.multiprocess
def test_layers_that_are_gathered_by_themselves_are_an_error(tmp_path):
    for message in on_two_processes(wrapped_one_by_one, tmp_path, tmp_path):
        assert "Wrap whole transformer layers, by transformer_layer_cls_to_wrap" in message


@pytest.mark.multiprocess
def test_zeros_that_are_not_pruned_are_told_of_where_no_process_holds_masks(tmp_path):
    for delta, mask, said in on_two_processes(with_zeros_that_are_kept, tmp_path, tmp_path):
        kept_zeros = int(mask[:3].sum())
        assert kept_zeros > 0
        assert said == [
            f"{kept_zeros} weights of 'model.layers.1.mlp.down_proj.weight' are zero without being pruned. Under "
            "FSDP2 adapters are masked by the zeros, and leave these at zero too."
        ]
        assert not bool(delta[:3].any())
        assert bool(delta[3:].any())
