"""Kept statistics: a cut by them is the cut that calibrates itself, to the last bit."""

import copy
import dataclasses

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import default_data_collator

from hf_prune import CalibrationStatistics, PruningConfig, collect_statistics, prune
from hf_prune.criteria import CRITERIA, needs_of
from hf_prune.structures.criteria import STRUCTURE_CRITERIA
from tests import tiny
from tests.structures.mixtures import build_mixture
from tests.structures.models import build, inputs_of

OF_STRUCTURES = {"block_influence": "layer", "reap": "expert", "frequency": "expert", "activation": "query+neuron",
                 "gate_fisher": "head+neuron"}  # fmt: skip
CALIBRATED = [name for name, criterion in CRITERIA.items() if set(needs_of(criterion)) - {"movement"}]


def batches_of(model):
    batches = []
    for seed in range(3):
        torch.manual_seed(seed)
        inputs = {n: torch.randint_like(v, 3, 60) for n, v in inputs_of(model).items()}
        batches.append({**inputs, "labels": inputs["input_ids"]})
    return batches


def config_of(criterion, sparsity=0.5):
    granularity = OF_STRUCTURES.get(criterion, "unstructured")
    return PruningConfig(sparsity=sparsity, criterion=criterion, granularity=granularity, calibration_samples=6)


def same(model, other):
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_every_criterion_of_structures_is_tried():
    assert OF_STRUCTURES.keys() == STRUCTURE_CRITERIA.keys()


@pytest.mark.parametrize("criterion", [*CALIBRATED, "sparsegpt", *OF_STRUCTURES])
def test_cuts_by_a_file_are_those_that_calibrate(criterion, tmp_path):
    dense = build("llama")
    if OF_STRUCTURES.get(criterion) == "expert":
        dense = build_mixture("mixtral").float()
    batches = batches_of(dense)
    path = tmp_path / "scores.safetensors"
    before = copy.deepcopy(dense)
    collect_statistics(dense, config_of(criterion), batches).save(path)
    assert same(dense, before)
    statistics = CalibrationStatistics.load(path)
    assert statistics.samples == 6
    for sparsity in (0.34, 0.5):
        model, other = copy.deepcopy(dense), copy.deepcopy(dense)
        prune(model, config_of(criterion, sparsity), batches)
        # A method that reconstructs goes through the samples, whatever is known of the weights.
        prune(other, config_of(criterion, sparsity), batches if criterion == "sparsegpt" else None,
              statistics=statistics)  # fmt: skip
        assert same(model, other)
        assert not same(model, dense)


def test_scopes_that_read_statistics_are_kept_too(tmp_path):
    model, other = tiny.build("llama"), tiny.build("llama")
    batches = [{"input_ids": sample["input_ids"][None]} for sample in tiny.batch(model)]
    config = PruningConfig(sparsity=0.5, scope="owl", calibration_samples=4)
    prune(model, config, batches)
    prune(other, config, statistics=collect_statistics(other, config, batches))
    assert same(model, other)


def test_what_is_not_kept_is_calibrated():
    model, other = build("llama"), build("llama")
    batches = batches_of(model)
    prune(model, config_of("taylor"), batches)
    prune(other, config_of("taylor"), batches, statistics=collect_statistics(other, config_of("wanda"), batches))
    assert same(model, other)


def test_what_is_neither_kept_nor_given_is_an_error():
    model = build("llama")
    statistics = collect_statistics(model, config_of("wanda"), batches_of(model))
    with pytest.raises(ValueError, match=r"looks at data \(gradient\). Give a dataloader"):
        prune(model, config_of("taylor"), statistics=statistics)


def test_statistics_of_another_model_are_an_error():
    model, other = build("llama"), build("llama")
    statistics = collect_statistics(model, config_of("activation"), batches_of(model))
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-3
    with pytest.raises(ValueError, match="these statistics are not of this LlamaForCausalLM with these weights"):
        prune(other, config_of("activation"), statistics=statistics)
    prune(model, config_of("activation"), statistics=statistics)
    with pytest.raises(ValueError, match="before it is pruned or trained"):
        prune(model, config_of("activation", 0.7), statistics=statistics)


def test_scores_in_steps_need_a_calibration_each():
    model = build("llama")
    statistics = collect_statistics(model, config_of("taylor"), batches_of(model))
    config = PruningConfig(sparsity=0.5, criterion="taylor", score_steps=3)
    with pytest.raises(ValueError, match="score_steps=3 calibrates anew in each step"):
        prune(model, config, statistics=statistics)


def test_a_criterion_that_reads_none_is_an_error():
    model = build("llama")
    with pytest.raises(ValueError, match="criterion 'magnitude' with scope 'auto' reads no statistics"):
        collect_statistics(model, PruningConfig(sparsity=0.5), batches_of(model))


def test_samples_that_can_be_read_once_are_an_error():
    model = build("llama")
    with pytest.raises(ValueError, match="which can be read once"):
        collect_statistics(model, config_of("wanda"), iter(batches_of(model)))


def test_statistics_of_other_weights_or_structures_are_not_enough():
    model, other = build("llama"), build("llama")
    batches = batches_of(model)
    config = config_of("wanda")
    statistics = collect_statistics(other, dataclasses.replace(config, exclude_modules=[".*mlp.*"]), batches)
    with pytest.raises(ValueError, match=r"looks at data \(input_norm\). Give a dataloader"):
        prune(other, config, statistics=statistics)
    prune(other, config, batches, statistics=statistics)
    prune(model, config, batches)
    assert same(model, other)
    structures = PruningConfig(sparsity=0.5, granularity="query+neuron", calibration_samples=6)
    neurons = dataclasses.replace(structures, granularity="neuron")
    model = build("llama")
    with pytest.raises(ValueError, match=r"looks at data \(contribution\). Give a dataloader"):
        prune(model, structures, statistics=collect_statistics(model, neurons, batches))


def test_they_are_collected_from_samples():
    with pytest.raises(ValueError, match=r"statistics are collected from samples\. Give a dataloader"):
        collect_statistics(build("llama"), config_of("wanda"), None)


def test_a_file_of_something_else_is_an_error(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="does not hold calibration statistics"):
        CalibrationStatistics.load(tmp_path / "weights.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "weights.safetensors", {"format": "hf_prune.statistics"})
    with pytest.raises(ValueError, match="does not hold calibration statistics"):
        CalibrationStatistics.load(tmp_path / "weights.safetensors")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match="is truncated or not a file of tensors"):
        CalibrationStatistics.load(tmp_path / "text")
    with pytest.raises(FileNotFoundError, match="no tensors at"):
        CalibrationStatistics.load(tmp_path / "nothing")


def test_a_file_that_was_changed_is_an_error(tmp_path):
    path = tmp_path / "scores.safetensors"
    model = build("llama")
    collect_statistics(model, config_of("activation"), batches_of(model)).save(path)
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name][:-1].clone()}, path, metadata)
    with pytest.raises(ValueError, match=r"scores\.safetensors was changed after it was written"):
        CalibrationStatistics.load(path)


def test_running_statistics_of_norms_are_weights_too():
    model = tiny.build("resnet")
    config = PruningConfig(sparsity=0.5, criterion="wanda", calibration_samples=2)
    statistics = collect_statistics(model, config, [default_data_collator(tiny.batch(model))])
    next(model.buffers()).view(-1)[0] += 1
    with pytest.raises(ValueError, match="these statistics are not of this ResNetForImageClassification"):
        prune(model, config, statistics=statistics)
