"""Structures while training: masked as a whole, and removed at the end."""

import copy
import dataclasses

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from hf_prune import PruningConfig, PruningHistory, PruningTrainerCallback, collect_statistics, prune, shrink
from hf_prune.structures.criteria import gate_fisher
from hf_prune.structures.families import FAMILIES, Neurons, Stack
from tests.structures.models import DECODER, build, logits_of, perturbed
from tests.test_data_criteria import OwnIterator


def samples(model, size=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    tokens = [torch.randint(3, 60, (10,), generator=generator) for _ in range(size)]
    if model.main_input_name == "pixel_values":
        side = getattr(model.config, "image_size", 32)
        images = torch.randn(size, model.config.num_channels, side, side, generator=generator).to(dtype)
        return [{"pixel_values": image, "labels": torch.tensor(i % 3)} for i, image in enumerate(images)]
    if "SequenceClassification" in type(model).__name__:
        return [{"input_ids": ids, "labels": torch.tensor(i % 3)} for i, ids in enumerate(tokens)]
    return [{"input_ids": ids, "labels": ids} for ids in tokens]


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def str_of(value):
    return value.granularity if isinstance(value, PruningConfig) else str(value)


TWO_ROUNDS = {"schedule": "constant", "rounds": 2}
CONFIG = PruningConfig(sparsity=0.5, **TWO_ROUNDS, granularity="head+neuron", multiple_of=4)
# What a llama can lose too, of each kind in two rounds.
KINDS = {
    "query": PruningConfig(sparsity=0.5, **TWO_ROUNDS, granularity="query"),
    "width": PruningConfig(sparsity=0.5, **TWO_ROUNDS, granularity="width", multiple_of=4),
    "query+neuron+width": PruningConfig(
        sparsity=0.5, **TWO_ROUNDS, granularity="query+neuron+width", scope="layer", multiple_of=6
    ),
    "layer": PruningConfig(sparsity=0.6, **TWO_ROUNDS, granularity="layer", criterion="block_influence"),
    "layer+neuron": PruningConfig(sparsity=0.6, **TWO_ROUNDS, granularity="layer+neuron", multiple_of=4),
    "solved anew": PruningConfig(
        sparsity=0.5, **TWO_ROUNDS, granularity="head+neuron", criterion="activation", reconstruct=True, multiple_of=4,
        calibration_samples=24,
    ),
}  # fmt: skip
OF_LLAMA = [("llama", config) for config in KINDS.values()]


class Watch(transformers.TrainerCallback):
    """Whether what is pruned is zero after each step, and gets no gradient."""

    def __init__(self, pruning):
        self.pruning, self.wrong = pruning, []

    def on_step_end(self, args, state, control, model, **kwargs):
        for name, mask in self.pruning.masks.items():
            parameter = model.get_parameter(name)
            if (parameter[~mask] != 0).any() or (parameter.grad is not None and (parameter.grad[~mask] != 0).any()):
                self.wrong.append((state.global_step, name))


@pytest.mark.parametrize(
    ("name", "config"),
    [*((name, CONFIG) for name in ("gpt_neo", "llama", "bert", "vit", "t5", "whisper")), *OF_LLAMA],
    ids=str_of,
)
def test_whole_structures_are_held_and_removed_at_the_end(name, config, make_trainer):
    model = without_dropout(build(name))
    before = model.num_parameters()
    pruning = PruningTrainerCallback(config)
    watch = Watch(pruning)
    dataset = samples(model)
    if name == "whisper":
        features = torch.randn(24, 4, 16)
        dataset = [{"input_features": f, "labels": s["labels"]} for f, s in zip(features, dataset, strict=True)]
    trainer = make_trainer(model, pruning, watch, train_dataset=dataset)
    trainer.train()
    assert watch.wrong == []
    rounds = pruning.history
    assert [row.masked for row in rounds] == [row.zeros for row in rounds]
    total = sum(those.count for those in pruning._last_run.plan.structures.values())
    gone = 24 * (3 - len(model.model.layers)) if config.granularity == "layer+neuron" else 0
    assert rounds[-1].total == total - gone  # The neurons of layers that go are counted with these.
    assert rounds[0].masked < rounds[1].masked
    assert trainer.model is model
    assert model.num_parameters() < before
    masked, shrunk = pruning.history.costs["masked"], pruning.history.costs["shrunk"]
    assert (masked.parameters, shrunk.parameters) == (before, model.num_parameters())
    assert 0 < shrunk.flops < masked.flops
    assert f"Shrunk from {before:,} to {model.num_parameters():,} parameters" in str(pruning.history)
    with pytest.raises(ValueError, match="before the model was shrunk at the end of the last"):
        trainer.train()


def test_cuts_that_solve_anew_give_more_of_what_the_dense_model_gave(make_trainer):
    dense, errors = without_dropout(build("llama")), {}
    tokens = torch.stack([sample["input_ids"] for sample in samples(dense)])
    for reconstruct in (False, True):
        model = copy.deepcopy(dense)
        config = dataclasses.replace(KINDS["solved anew"], reconstruct=reconstruct)
        make_trainer(
            model, PruningTrainerCallback(config), train_dataset=samples(model), learning_rate=0.0
        ).train()  # Only cuts change anything.
        with torch.no_grad():
            errors[reconstruct] = (model(tokens).logits - dense(tokens).logits).square().mean()
    assert errors[True] < 0.8 * errors[False]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw_torch"])
@pytest.mark.parametrize(
    ("name", "granularity"),
    [*((name, "head+neuron") for name in ("gpt_neo", "gpt2", "llama", "bert", "vit")), ("llama", "query+neuron")],
)
def test_training_under_masks_is_training_what_is_left(name, granularity, optimizer, make_trainer):
    """The oracle: a model that is shrunk before training, by the same masks."""
    model = without_dropout(build(name, torch.float64))
    small = copy.deepcopy(model)
    asked = {"schedule": "one_shot", "criterion": "magnitude", "granularity": granularity, "multiple_of": 4}
    config = PruningConfig(sparsity=0.5, **asked)
    prune(small, config)
    shrink(small)
    # Without it, AdamW would make steps of the rounding errors of gradients that are zero.
    options = {"optim": optimizer, "max_grad_norm": 0.5, "weight_decay": 0.1, "adam_epsilon": 1e-3}
    make_trainer(model, PruningTrainerCallback(config), train_dataset=samples(model), **options).train()
    make_trainer(small, train_dataset=samples(small), **options).train()
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in small.named_parameters()}
    for (n, ours), theirs in zip(model.named_parameters(), small.parameters(), strict=True):
        assert (ours - theirs).abs().max() < 1e-8, n


def test_masks_can_stay_masks(make_trainer):
    model = build("gpt_neo")
    before = model.num_parameters()
    config = PruningConfig(sparsity=0.5, granularity="head", schedule="one_shot", shrink_at_end=False)
    pruning = PruningTrainerCallback(config)
    make_trainer(model, pruning, train_dataset=samples(model)).train()
    assert model.num_parameters() == before
    logits = logits_of(model.eval())
    shrink(model, pruning.masks)
    assert model.num_parameters() < before
    assert (logits_of(model) - logits).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("name", "config"),
    [("gpt_neo", CONFIG), ("vit", CONFIG), ("llama", KINDS["query+neuron+width"]), ("llama", KINDS["layer"])],
    ids=str_of,
)
def test_a_resumed_run_ends_as_an_undisturbed_one(name, config, make_trainer, tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1}
    whole = build(name)
    pruning = PruningTrainerCallback(config)
    make_trainer(whole, pruning, train_dataset=samples(whole), **options).train()
    for step in range(1, 7):
        model = build(name)
        resumed = PruningTrainerCallback(config)
        trainer = make_trainer(model, resumed, train_dataset=samples(model), **options)
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{step}"))
        assert [row.masked for row in resumed.history] == [row.masked for row in pruning.history]
        for (n, ours), theirs in zip(model.named_parameters(), whole.parameters(), strict=True):
            assert torch.equal(ours, theirs), (step, n)
        assert getattr(model.config, "rms_norm_eps", 0) == getattr(whole.config, "rms_norm_eps", 0)


def test_what_is_saved_loads(make_trainer, tmp_path):
    model = build("gpt_neo")
    trainer = make_trainer(model, PruningTrainerCallback(CONFIG), train_dataset=samples(model))
    trainer.train()
    trainer.save_model()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits_of(loaded), logits_of(model.eval()))
    history = PruningHistory.load(tmp_path / "out" / "pruning_history.json")
    assert history[-1].reached == pytest.approx(0.5, abs=0.1)
    assert history.costs["shrunk"].parameters == loaded.num_parameters()
    assert PruningConfig.from_pretrained(tmp_path / "out") == CONFIG


@pytest.mark.parametrize(("name", "config"), [("gpt_neo", CONFIG), *OF_LLAMA], ids=str_of)
def test_the_best_model_comes_back_before_it_is_shrunk(name, config, make_trainer, tmp_path):
    model = build(name)
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(
        model,
        PruningTrainerCallback(config),
        train_dataset=samples(model),
        eval_dataset=samples(model, 8, 1),
        load_best_model_at_end=True,
        **options,
    )
    before = model.num_parameters()
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-5)
    assert model.num_parameters() < before


@pytest.mark.parametrize("config", KINDS.values(), ids=str_of)
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"bf16": True}], ids=str)
def test_with_patience(config, options, make_trainer):
    """Rounds end by the metric, and what is left computes what was masked."""
    model = build("llama")
    before = model.num_parameters()
    patient = dataclasses.replace(config, patience=[1], end=8, shrink_at_end=False)
    pruning = PruningTrainerCallback(patient)
    trainer = make_trainer(
        model,
        pruning,
        train_dataset=samples(model),
        eval_dataset=samples(model, 8, 1),
        max_steps=12,
        eval_strategy="steps",
        eval_steps=1,
        **options,
    )
    trainer.train()
    assert [row.round for row in pruning.history] == [1, 2]
    masked = logits_of(model.eval())
    shrink(model, pruning.masks)
    assert model.num_parameters() < before
    assert (logits_of(model) - masked).abs().max() < 1e-5


@pytest.mark.parametrize("config", KINDS.values(), ids=str_of)
def test_a_model_in_half_precision_is_shrunk(config, make_trainer):
    model = build("llama", torch.bfloat16)
    before = model.num_parameters()
    trainer = make_trainer(model, PruningTrainerCallback(config), train_dataset=samples(model))
    trainer.train()
    assert model.num_parameters() < before
    assert logits_of(model.eval()).isfinite().all()


def test_a_kept_zero_does_not_stop_a_resumption(make_trainer, tmp_path):
    model = build("gpt_neo")
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    make_trainer(model, PruningTrainerCallback(CONFIG), train_dataset=samples(model), **options).train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    weights = load_file(checkpoint / "model.safetensors")
    for name in weights:
        if name.endswith("c_fc.weight"):
            weights[name][weights[name].abs() < weights[name].abs().median()] = 0
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    resumed = build("gpt_neo")
    trainer = make_trainer(resumed, PruningTrainerCallback(CONFIG), train_dataset=samples(model), **options)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.num_parameters() == model.num_parameters()


def test_a_run_that_removes_nothing_ends_well(make_trainer):
    model = build("gpt_neo")
    before = model.num_parameters()
    config = PruningConfig(sparsity=0.01, schedule="one_shot", granularity="head")
    make_trainer(model, PruningTrainerCallback(config), train_dataset=samples(model)).train()
    assert model.num_parameters() == before


def test_an_optimizer_may_hold_more_than_the_model(make_trainer):
    model, extra = build("gpt_neo"), torch.nn.Parameter(torch.zeros(1))
    trainer = make_trainer(model, PruningTrainerCallback(CONFIG), train_dataset=samples(model))
    trainer.optimizer = torch.optim.SGD([*model.parameters(), extra], lr=1e-3)
    trainer.train()


class Pairs(transformers.Trainer):
    """Calls its model in a way of its own."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        return (model(input_ids=inputs["a"]).logits - model(input_ids=inputs["b"]).logits).square().mean()


def test_a_model_that_is_called_in_a_way_of_its_own(make_trainer, caplog):
    model = build("gpt_neo")
    before = model.num_parameters()
    pairs = [{"a": row["input_ids"], "b": row["input_ids"].flip(0)} for row in samples(model)]
    pruning = PruningTrainerCallback(CONFIG)
    make_trainer(model, pruning, cls=Pairs, train_dataset=pairs, remove_unused_columns=False).train()
    assert model.num_parameters() < before
    assert pruning.history.costs["shrunk"].flops is None
    assert "Only parameters are counted" in caplog.text
    assert str(pruning.history).endswith("parameters.")


def test_a_family_that_was_described_in_part_leaves_a_model_that_works(make_trainer, monkeypatch, caplog):
    part = Neurons("mlp", {"up_proj": 1}, "down_proj")  # The gate goes with it.
    monkeypatch.setitem(FAMILIES, "olmo", (Stack("layers", (part,)),))
    model = transformers.OlmoForCausalLM(transformers.OlmoConfig(**DECODER))
    before = model.num_parameters()
    pruning = PruningTrainerCallback(PruningConfig(sparsity=0.5, granularity="neuron", multiple_of=4))
    trainer = make_trainer(model, pruning, train_dataset=samples(model))
    trainer.train()
    assert "The model was not shrunk, and its pruned structures stay in it as zeros" in caplog.text
    assert "removing neurons of 'model.layers.0.mlp' changes what OlmoForCausalLM computes" in caplog.text
    assert model.num_parameters() == before
    assert not hasattr(model.config, "quantization_config")
    assert pruning.history.costs == {}
    assert logits_of(model).isfinite().all()
    trainer.train()  # Its optimizer is still the model's.
    layer = model.model.layers[0].mlp.up_proj
    assert bool((layer.weight == 0).all(1).any())


def test_what_looks_at_samples_by_default_goes_by_magnitude_where_it_cannot(make_trainer, caplog):
    config = PruningConfig(sparsity=0.5, granularity="neuron", multiple_of=4, schedule="one_shot", shrink_at_end=False)
    model, expected = build("gpt_neo"), build("gpt_neo")
    pairs = [{"a": row["input_ids"], "b": row["input_ids"].flip(0)} for row in samples(model)]
    pruning = PruningTrainerCallback(config)
    options = dict(cls=Pairs, train_dataset=pairs, remove_unused_columns=False)
    make_trainer(model, pruning, max_steps=1, **options).train()
    assert "Falling back to criterion magnitude, since the calibration failed: You must specify" in caplog.text
    assert pruning.history[-1].criterion == "magnitude"
    prune(expected, dataclasses.replace(config, criterion="magnitude"))
    for name, mask in pruning.masks.items():
        assert torch.equal(mask, expected.get_parameter(name) != 0)
    named = dataclasses.replace(config, criterion="activation")
    with pytest.raises(ValueError, match="You must specify exactly one of input_ids"):
        make_trainer(build("gpt_neo"), PruningTrainerCallback(named), max_steps=1, **options).train()


@pytest.mark.parametrize(
    ("granularity", "criterion"),
    [("head+neuron", "gate_fisher"), ("layer", "block_influence"), ("layer+neuron", "block_influence+gate_fisher")],
)
def test_the_default_looks_at_samples(granularity, criterion, make_trainer):
    model = without_dropout(build("gpt_neo"))
    config = PruningConfig(sparsity=0.5, granularity=granularity, calibration_samples=24)
    pruning = PruningTrainerCallback(config)
    make_trainer(model, pruning, train_dataset=samples(model)).train()
    assert {row.criterion for row in pruning.history} == {criterion}


@pytest.mark.parametrize("granularity", ["query", "neuron", "query+neuron", "neuron+width", "layer+neuron"])
@pytest.mark.parametrize("has_labels", [True, False])
def test_the_default_reads_labels_where_there_are_some(granularity, has_labels):
    model, expected = build("llama"), build("llama")
    batches = [{name: row[name][None] for name in ("input_ids", "labels")} for row in samples(model, 8)]
    batches = batches if has_labels else [{"input_ids": batch["input_ids"]} for batch in batches]
    common = dict(sparsity=0.5, calibration_samples=8, granularity=granularity)
    common |= {"multiple_of": 4} if "neuron" in granularity else {}
    statistics = collect_statistics(model, PruningConfig(**common), batches)
    of_gates = {key.split("/")[0] for key in statistics.tensors} & {"gate_fisher"}
    assert bool(of_gates) == has_labels
    prune(model, PruningConfig(**common), statistics=statistics)
    prune(expected, PruningConfig(**common), batches)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), expected.parameters(), strict=True))
    if granularity in ("query", "neuron", "query+neuron"):
        named = build("llama")
        prune(named, PruningConfig(criterion="gate_fisher" if has_labels else "activation", **common), batches)
        assert all(torch.equal(p, q) for p, q in zip(named.parameters(), expected.parameters(), strict=True))


def test_labels_that_say_nothing_are_none(make_trainer, caplog):
    model = build("gpt_neo")
    rows = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in samples(model)]
    config = PruningConfig(sparsity=0.5, granularity="neuron", multiple_of=4, schedule="one_shot")
    pruning = PruningTrainerCallback(config)
    make_trainer(model, pruning, max_steps=1, train_dataset=rows).train()
    assert "Falling back to criterion activation, since the calibration failed" in caplog.text
    assert pruning.history[-1].criterion == "activation"


def test_samples_that_cannot_be_drawn_are_no_end_of_the_training(make_trainer, caplog):
    model = build("gpt_neo")
    config = PruningConfig(sparsity=0.5, granularity="neuron", multiple_of=4, schedule="one_shot")
    pruning = PruningTrainerCallback(config)
    make_trainer(model, pruning, max_steps=1, train_dataset=OwnIterator(samples(model))).train()
    assert "Falling back to criterion magnitude, since the calibration failed: the training dataset" in caplog.text
    assert pruning.history[-1].criterion == "magnitude"


def test_a_criterion_that_is_given_is_taken():
    model = build("llama")
    batches = [{"input_ids": row["input_ids"][None]} for row in samples(model, 4)]
    config = PruningConfig(sparsity=0.5, granularity="neuron", multiple_of=4, calibration_samples=4)
    with pytest.raises(ValueError, match="LlamaForCausalLM gives no loss for calibration batches with input_ids"):
        prune(model, config, batches, criterion=gate_fisher)


def test_a_loss_is_needed_and_not_only_labels():
    """Of several kinds of labels one may not be enough."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**{**DECODER, "num_labels": 2})
    model = perturbed(transformers.BertForPreTraining(config))
    tokens = torch.randint(3, 60, (4, 10))
    batches = [{"input_ids": tokens, "next_sentence_label": torch.tensor([0, 1, 0, 1])}]
    cut = PruningConfig(sparsity=0.5, granularity="neuron", multiple_of=4, calibration_samples=4)
    named, masked = copy.deepcopy(model), copy.deepcopy(model)
    prune(masked, cut, batches)
    prune(named, dataclasses.replace(cut, criterion="activation"), batches)
    assert all(torch.equal(p, q) for p, q in zip(masked.parameters(), named.parameters(), strict=True))


def test_statistics_that_are_given_are_taken_whatever_samples_have():
    model, expected = build("llama"), build("llama")
    batches = [{name: row[name][None] for name in ("input_ids", "labels")} for row in samples(model, 4)]
    config = PruningConfig(sparsity=0.5, granularity="neuron", multiple_of=4, calibration_samples=4)
    without = [{"input_ids": batch["input_ids"]} for batch in batches]
    prune(model, config, batches, statistics=collect_statistics(model, config, without))
    prune(expected, dataclasses.replace(config, criterion="activation"), without)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), expected.parameters(), strict=True))


def test_without_samples_the_default_warns_and_goes_by_magnitude(caplog):
    model, expected = build("llama"), build("llama")
    config = PruningConfig(sparsity=0.5, granularity="query+neuron", multiple_of=4)
    prune(model, config)
    assert "Without a dataloader query+neuron go by magnitude, which can ruin a model" in caplog.text
    assert "criterion gate_fisher, which looks at samples (gate_fisher)" in caplog.text
    caplog.clear()
    prune(expected, dataclasses.replace(config, criterion="magnitude"))
    assert caplog.text == ""
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), expected.parameters(), strict=True))


def test_kinds_go_each_by_a_criterion_of_its_own():
    """Of layers those that do least, and of neurons in the others those that add least."""
    model, layers, neurons = build("llama"), build("llama"), build("llama")
    batches = [{"input_ids": row["input_ids"][None]} for row in samples(model, 8)]
    common = dict(sparsity=0.34, multiple_of=4, calibration_samples=8)
    found = prune(model, PruningConfig(granularity="neuron+layer", **common), batches)
    alone = prune(layers, PruningConfig(sparsity=0.34, granularity="layer", criterion="block_influence",
                                        calibration_samples=8), batches)  # fmt: skip
    other = prune(neurons, PruningConfig(granularity="neuron", criterion="activation", **common), batches)
    assert [row for row in found.structures if row.kind == "layer"] == list(alone.structures)
    left = {row.name: row.zeros for row in found.structures if row.kind == "neuron"}
    assert len(left) == 2
    assert left == {row.name: row.zeros for row in other.structures if row.name in left}
