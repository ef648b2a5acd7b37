"""Statistics against plain loops over single samples, and that nothing else is touched."""

import copy
import itertools
import random

import numpy as np
import pytest
import torch
import transformers
from accelerate.data_loader import IterableDatasetShard
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import default_data_collator

from hf_prune.calibration.samples import batches_of
from hf_prune.calibration.statistics import STATISTICS, LabelCounts, calibrate
from hf_prune.weights.targets import find_targets
from tests.tiny import FAMILIES, TEXT, TOKENS, batch, build, sixteen_experts

SAMPLES = 7


def samples_of(model: nn.Module, uneven: bool = True) -> list[dict[str, torch.Tensor]]:
    """Samples of which each has another number of labels, where samples have several."""
    samples = batch(model, SAMPLES)
    for i, sample in enumerate(samples):
        if uneven and sample["labels"].ndim:
            sample["labels"][:i] = -100
        if "pixel_values" in sample:
            sample["pixel_values"] = sample["pixel_values"].to(next(model.parameters()).dtype)
    return samples


def loader(samples: list[dict[str, torch.Tensor]], size: int = 4) -> DataLoader:
    return DataLoader(samples, batch_size=size, collate_fn=default_data_collator)


def alone(model: nn.Module, samples: list[dict[str, torch.Tensor]]) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """Each sample's labels and gradients, by autograd, one after the other."""
    model = copy.deepcopy(model).eval()
    targets, found = find_targets(model), []
    for sample in samples:
        single = default_data_collator([sample])
        model.zero_grad()
        model(**single).loss.backward()
        gradients = {
            n: torch.zeros_like(t.weight) if t.weight.grad is None else t.weight.grad.clone()
            for n, t in targets.items()
        }
        found.append((float(LabelCounts(model)(single)), gradients))
    return found


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        assert ours[name].dtype == torch.float32
        assert (ours[name] - expected).norm() <= tolerance * expected.norm(), name
        assert expected.any(), name


def double(family: str) -> nn.Module:
    # torch has no grouped product in float64, with which Mixtral's experts work.
    return build(family, torch.float32 if family == "mixtral" else torch.float64)


@pytest.mark.parametrize("size", [1, 4, 7])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_is_that_of_the_mean_loss_over_labels(family, size):
    model = double(family)
    samples = samples_of(model)
    found = alone(model, samples)
    total = sum(labels for labels, _ in found)
    expected = {n: sum(labels * g[n] for labels, g in found) / total for n in find_targets(model)}
    statistics = calibrate(model, find_targets(model), loader(samples, size), ["gradient"], SAMPLES)
    assert_close(statistics["gradient"], expected, 1e-4 if family == "mixtral" else 1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_input_norms_are_those_that_modules_see(family):
    model = double(family).eval()
    if family == "mixtral":
        model.set_experts_implementation("eager")
    samples, targets = samples_of(model), find_targets(model)
    squares: dict[str, torch.Tensor] = {}

    def see(name: str):
        def hook(module, inputs):
            x = inputs[0].detach()
            if isinstance(module, nn.Conv2d):
                group = x.shape[1] // module.groups
                ones = torch.ones(1, 1, *module.weight.shape[2:], dtype=x.dtype)
                # What each kernel position sees of each channel: the squares, shifted and cut as the convolution does.
                x = (
                    torch.nn.functional.unfold(
                        x.square(), module.kernel_size, module.dilation, module.padding, module.stride
                    )
                    .sum((0, 2))
                    .reshape(module.groups, 1, group, *ones.shape[2:])
                )
                rows = len(module.weight) // module.groups
                value = x.expand(-1, rows, -1, -1, -1).reshape(module.weight.shape)
            else:
                value = x.reshape(-1, x.shape[-1]).square().sum(0)
                value = value[:, None] if isinstance(module, transformers.pytorch_utils.Conv1D) else value[None]
                value = value.expand(module.weight.shape)
            squares[name] = squares.get(name, 0) + value

        return hook

    for name in targets:
        if not name.endswith(("_proj",)):
            model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(see(name))
    statistics = calibrate(model, targets, loader(samples), ["input_norm"], SAMPLES)["input_norm"]
    expected = {name: value.sqrt() for name, value in squares.items()}
    assert_close({n: statistics[n].expand(targets[n].weight.shape) for n in expected}, expected)
    experts = {name for name, target in targets.items() if target.weight.ndim == 3}
    assert set(targets) - set(expected) == experts


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_input_norms_of_experts(implementation):
    """Against the states that the router sends to each of them."""
    model = build("mixtral").eval()
    model.set_experts_implementation(implementation)
    targets, samples = find_targets(model), samples_of(model)
    statistics = calibrate(model, targets, loader(samples, 7), ["input_norm"], SAMPLES)["input_norm"]
    assert model.config._experts_implementation == implementation
    found = {}

    def see(module, inputs, name):
        states, chosen, _ = inputs
        found[name] = torch.stack([states[(chosen == e).any(1)].square().sum(0).sqrt() for e in range(3)])

    for i, layer in enumerate(model.model.layers):
        name = f"model.layers.{i}.mlp.experts.gate_up_proj"
        layer.mlp.experts.register_forward_pre_hook(lambda module, inputs, name=name: see(module, inputs, name))
    with torch.no_grad():
        model(**default_data_collator(samples))
    assert len(found) == 2
    for name, expected in found.items():
        torch.testing.assert_close(statistics[name].squeeze(1), expected)


@pytest.mark.parametrize("family", ["gpt_neo", "resnet", "mixtral"])
def test_nothing_else_is_touched(family):
    model = build(family).train()
    model.requires_grad_(False)
    first = next(iter(model.parameters()))
    first.requires_grad_(True)
    first.grad = torch.full_like(first, 3.0)
    next(model.children()).eval()
    modes = [module.training for module in model.modules()]
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    weights = {name: value.clone() for name, value in model.named_parameters()}
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()

    def noisy():
        for values in loader(samples_of(model)):
            torch.rand(3), np.random.rand(3), random.random()
            yield values

    calibrate(model, find_targets(model), noisy(), list(STATISTICS), SAMPLES)
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == [p is first for p in model.parameters()]
    assert [p.grad is None for p in model.parameters()] == [p is not first for p in model.parameters()]
    assert (first.grad == 3).all()
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]


def test_dropout_does_not_matter():
    config = transformers.LlamaConfig(**TEXT, num_key_value_heads=1, attention_dropout=0.9)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).train()
    runs = [calibrate(model, find_targets(model), loader(samples_of(model)), ["gradient"], SAMPLES) for _ in range(2)]
    for name, value in runs[0]["gradient"].items():
        assert torch.equal(value, runs[1]["gradient"][name])


def test_bfloat16_has_statistics_in_float32():
    model, reference = build("llama", torch.bfloat16), build("llama", torch.bfloat16).float()
    for name in STATISTICS:
        ours = calibrate(model, find_targets(model), loader(samples_of(model)), [name], SAMPLES)[name]
        theirs = calibrate(reference, find_targets(reference), loader(samples_of(model)), [name], SAMPLES)[name]
        for parameter, value in ours.items():
            assert value.dtype == torch.float32
            assert (value - theirs[parameter]).norm() < 0.1 * theirs[parameter].norm()


def test_samples_beyond_those_asked_for_are_not_read():
    model = build("llama")
    samples = samples_of(model)
    targets = find_targets(model)
    few = calibrate(model, targets, loader(samples, 4), ["gradient"], 5)["gradient"]
    same = calibrate(model, targets, loader(samples[:5], 5), ["gradient"], 5)["gradient"]
    for name, value in few.items():
        torch.testing.assert_close(value, same[name])


def test_fewer_samples_than_asked_for_are_told(caplog):
    model = build("llama")
    calibrate(model, find_targets(model), loader(samples_of(model)), ["gradient"], 100)
    assert caplog.text.count("Calibration has 7 samples, fewer than the 100 asked for.") == 1


def test_progress_is_shown_where_it_takes_long(capsys, monkeypatch):
    model = build("llama")
    arguments = model, find_targets(model), loader(samples_of(model), 1), ["gradient"], SAMPLES
    calibrate(*arguments, show_progress=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("hf_prune.calibration.samples.DELAY", 0)
    calibrate(*arguments, show_progress=True)
    assert "Calibrating: 100%" in capsys.readouterr().err
    calibrate(*arguments)
    assert capsys.readouterr().err == ""


class Stream(IterableDataset):
    def __iter__(self):
        yield from range(10)


def test_batches_are_drawn_anew_and_leave_the_loader_alone():
    data = DataLoader(list(range(100)), batch_size=7, shuffle=True, collate_fn=list)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    drawn = [list(batches_of(data, 10, 4, seed)) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert [len(values) for values in drawn[0]] == [4, 4, 2]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(itertools.chain(*drawn[0]))) == 10
    assert list(batches_of(DataLoader(Stream(), collate_fn=list), 5, 4, 0)) == [[0, 1, 2, 3], [4]]


def test_a_stream_that_accelerate_has_divided_is_divided_once(monkeypatch):
    monkeypatch.setattr("hf_prune.calibration.samples.rank_and_size", lambda: (1, 2))
    for stream in (Stream(), IterableDatasetShard(Stream(), batch_size=2, num_processes=2, process_index=1)):
        assert list(batches_of(DataLoader(stream, collate_fn=list), 5, 4, 0)) == [[1, 3]]


# Bad input


def test_no_samples_are_an_error():
    model = build("llama")
    with pytest.raises(ValueError, match="there are no calibration samples: the dataloader gave no batch"):
        calibrate(model, find_targets(model), [], ["gradient"], 4)


@pytest.mark.parametrize("name", ["gradient", "squared_gradient"])
def test_batches_without_labels_are_an_error_where_a_loss_is_needed(name):
    model = build("llama")
    samples = [{"input_ids": sample["input_ids"]} for sample in samples_of(model)]
    calibrate(model, find_targets(model), loader(samples), ["input_norm"], 4)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM gives no loss for .* with input_ids\. They need 'labels'"):
        calibrate(model, find_targets(model), loader(samples), [name], 4)


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_an_error_that_names_a_module(name, value):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] = value
    message = rf"the {name.replace('_', ' ')} of 'model\.layers\..*' is NaN or infinite over the calibration samples"
    with pytest.raises(ValueError, match=message):
        calibrate(model, find_targets(model), loader(samples_of(model)), [name], 4)


TOKENS_FIRST = {
    "xlnet": lambda: transformers.XLNetLMHeadModel(
        transformers.XLNetConfig(vocab_size=60, d_model=16, n_layer=2, n_head=2, d_inner=32)
    ),
    "longformer": lambda: transformers.LongformerForSequenceClassification(
        transformers.LongformerConfig(**TEXT, attention_window=4, max_position_embeddings=20)
    ),
}


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", *TOKENS_FIRST])
def test_padding_is_no_input(family):
    """Alone, a sample needs none; beside a longer one it does."""
    torch.manual_seed(0)
    model = TOKENS_FIRST[family]().eval() if family in TOKENS_FIRST else build(family)
    short, long = (torch.arange(1, n + 1) for n in (4, 12))
    labels = torch.tensor(0) if family in ("bert", "longformer") else torch.full((12,), -100)

    def sample(ids: torch.Tensor, size: int) -> dict[str, torch.Tensor]:
        padded = torch.cat([ids, ids.new_zeros(size - len(ids))])
        mask = (torch.arange(size) < len(ids)).long()
        return {"input_ids": padded, "attention_mask": mask, "labels": labels[:size] if labels.ndim else labels}

    alone = [default_data_collator([sample(ids, len(ids))]) for ids in (short, long)]
    together = [default_data_collator([sample(short, 12), sample(long, 12)])]
    targets = find_targets(model)
    one, other = (calibrate(model, targets, b, ["input_norm"], 2)["input_norm"] for b in (alone, together))
    for name, norm in one.items():
        torch.testing.assert_close(other[name], norm, rtol=1e-4, atol=1e-5)


def test_padding_is_not_looked_for_where_positions_are_in_another_order():
    """Two experts that are given every token have it in the order of their ranks."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**TEXT, num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=2)
    model = transformers.MixtralForCausalLM(config)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    data = [{"input_ids": torch.randint(1, 60, (2, 6)), "attention_mask": mask}]
    norms = calibrate(model, find_targets(model), data, ["input_norm"], 2)["input_norm"]
    norm = norms["model.layers.0.mlp.experts.gate_up_proj"]
    torch.testing.assert_close(norm[0], norm[1])


FLATTENED = {
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(
            **TOKENS, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=20, word_embed_proj_dim=16,
        )
    ),
    "one head": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**TOKENS, n_positions=16, n_embd=16, n_layer=2, n_head=1)
    ),
    "llama": lambda: build("llama"),
    "bert": lambda: build("bert"),
}  # fmt: skip


@pytest.mark.parametrize("tokens", [4, 6])
@pytest.mark.parametrize("family", FLATTENED)
def test_padding_is_found_where_positions_are_flattened_and_where_samples_are_as_many(family, tokens):
    torch.manual_seed(0)
    model = FLATTENED[family]().eval()
    lengths = [2, 4, 3, tokens]
    ids = torch.randint(1, 60, (4, tokens))
    mask = (torch.arange(tokens) < torch.tensor(lengths)[:, None]).long()
    alone = [{"input_ids": ids[i : i + 1, :n], "attention_mask": mask[i : i + 1, :n]} for i, n in enumerate(lengths)]
    together = [{"input_ids": ids, "attention_mask": mask}]
    targets = find_targets(model)
    one, other = (calibrate(model, targets, b, ["input_norm"], 4)["input_norm"] for b in (alone, together))
    for name, norm in one.items():
        torch.testing.assert_close(other[name], norm, rtol=1e-4, atol=1e-5)


def squares_and_gradient(model, samples, targets):
    """By autograd, of samples alone."""
    squares = {name: torch.zeros_like(target.weight) for name, target in targets.items()}
    for sample in samples:
        output = model(**sample)
        loss = output[0] if isinstance(output, tuple) else output["loss"]
        gradients = torch.autograd.grad(loss, [target.weight for target in targets.values()], allow_unused=True)
        for name, gradient in zip(targets, gradients, strict=True):
            if gradient is not None:
                squares[name] += gradient.square() / len(samples)
    return squares


def singles(data):
    size = len(data["labels"])
    return [{name: value[i : i + 1] for name, value in data.items()} for i in range(size)]


def segformer():
    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 8], patch_sizes=[3, 3],
        strides=[2, 2], num_attention_heads=[1, 1], mlp_ratios=[2, 2], decoder_hidden_size=8, num_labels=3,
    )  # fmt: skip
    labels = torch.randint(0, 3, (4, 16, 16))
    labels[1, 2:] = labels[2, :8] = 255
    return transformers.SegformerForSemanticSegmentation(config), {"pixel_values": torch.randn(4, 3, 16, 16)}, labels


def bert():
    labels = torch.tensor([0, -100, 1, -100, 2, -100])
    return build("bert"), {"input_ids": torch.randint(1, 60, (6, 8))}, labels


def xlm():
    """Its loss reads the first label."""
    config = transformers.XLMConfig(vocab_size=60, emb_dim=16, n_layers=2, n_heads=2, max_position_embeddings=16)
    labels = torch.full((4, 6), -100)
    labels[:2, 0], labels[2:, 3], labels[3, 4] = 7, 8, 9
    return transformers.XLMWithLMHeadModel(config), {"input_ids": torch.randint(3, 60, (4, 6))}, labels


@pytest.mark.parametrize("make", [segformer, bert, xlm])
def test_labels_that_a_loss_leaves_out_are_not_counted(make):
    torch.manual_seed(0)
    model, inputs, labels = make()
    model = model.double().eval()
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    data, targets = {**inputs, "labels": labels}, find_targets(model)
    alone = singles(data)
    labelled = [sample for sample in alone if bool((sample["labels"] >= 0).any())]
    expected = squares_and_gradient(model, labelled, targets)
    found = calibrate(model, targets, [data], ["squared_gradient", "gradient"], len(labels))
    for name, values in expected.items():
        torch.testing.assert_close(found["squared_gradient"][name], values.float() * len(labelled) / len(labels))
    # The same in batches of one as in one of all.
    one_by_one = calibrate(model, targets, alone, ["gradient"], len(labels))["gradient"]
    for name, gradient in one_by_one.items():
        torch.testing.assert_close(found["gradient"][name], gradient, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("statistic", ["gradient", "squared_gradient"])
def test_the_class_255_is_one_as_others(statistic):
    config = transformers.BeitConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4,
        num_channels=1, num_labels=300, out_indices=[0, 1, 2, 3],
    )  # fmt: skip
    assert config.semantic_loss_ignore_index == 255
    torch.manual_seed(0)
    model = transformers.BeitForImageClassification(config)
    data = [{"pixel_values": torch.randn(3, 1, 8, 8), "labels": torch.full((3,), 255)}]
    found = calibrate(model, find_targets(model), data, [statistic], 3)[statistic]
    assert all(values.any() for values in found.values())


def test_models_that_give_tuples_have_their_loss_first():
    model = build("bert", torch.float64)
    samples, targets = samples_of(model), find_targets(model)
    expected = calibrate(model, targets, loader(samples), ["gradient"], SAMPLES)["gradient"]
    model.config.return_dict = False
    assert isinstance(model(**default_data_collator(samples)), tuple)
    assert_close(calibrate(model, targets, loader(samples), ["gradient"], SAMPLES)["gradient"], expected)


def test_a_loss_that_is_constant_for_single_samples_is_an_error():
    class Contrasts(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return {"loss": nn.functional.cross_entropy(self.a(x) @ x.T, torch.arange(len(x)))}

    torch.manual_seed(0)
    model, data = Contrasts(), [{"x": torch.randn(4, 4)}]
    with pytest.raises(ValueError, match=r"every gradient is zero: .* with a contrastive loss, which is constant"):
        calibrate(model, find_targets(model), data, ["squared_gradient"], 4)
    assert calibrate(model, find_targets(model), data, ["gradient"], 4)["gradient"]["a.weight"].any()


def test_the_message_names_the_labels_of_the_task():
    model = transformers.BertForQuestionAnswering(transformers.BertConfig(**TEXT, max_position_embeddings=16))
    data = [{"input_ids": torch.ones(2, 4, dtype=torch.long), "start_positions": torch.zeros(2, dtype=torch.long)}]
    with pytest.raises(ValueError, match=r"They need 'end_positions'"):
        calibrate(model, find_targets(model), data, ["gradient"], 2)


def test_buffers_that_a_model_changes_are_given_back():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x):
            x = x * (1 + self.calls)  # What backward passes need, and the next pass changes.
            self.calls += 1
            self.seen += 1
            self.mean = 0.9 * self.mean + x.mean(0)
            return {"loss": self.a(x - self.mean).square().mean()}

    model = Counts()
    model.seen = 0
    calls, mean = model.calls, model.mean
    calibrate(model, find_targets(model), [{"x": torch.randn(4, 4)}], list(STATISTICS), 4)
    assert model.calls is calls
    assert model.mean is mean
    assert model.seen == 0
    assert not calls.any()
    assert not mean.any()


def test_a_rotary_embedding_is_as_it_was():
    """It keeps the length for which it was computed beside the buffer."""
    model = build("llama")
    model.config.rope_parameters |= {"rope_type": "dynamic", "factor": 2.0}
    model.config.max_position_embeddings = 8
    model = type(model)(model.config).eval()
    fresh, ids = copy.deepcopy(model), torch.randint(1, 60, (2, 32))
    calibrate(model, find_targets(model), [{"input_ids": ids}], ["input_norm"], 2)
    with torch.inference_mode():  # Its buffer is one of inference mode then.
        assert torch.equal(model(input_ids=ids).logits, fresh(input_ids=ids).logits)
    calibrate(model, find_targets(model), [{"input_ids": ids}], ["input_norm"], 2)


def test_columns_of_one_storage_are_told_apart():
    model, whole = nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 3)), torch.randn(3, 8)
    model[0].weight, model[1].weight = nn.Parameter(whole[:, :4]), nn.Parameter(whole[:, 4:])
    model[0].weight.data, model[1].weight.data = whole[:, :4], whole[:, 4:]

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = model

        def forward(self, x):
            return self.a(x) + self.b(10 * x)

    both, x = Both(), torch.randn(5, 4)
    found = calibrate(both, find_targets(both), [{"x": x}], ["input_norm"], 5)["input_norm"]
    torch.testing.assert_close(found["a.weight"].flatten(), x.norm(dim=0))
    torch.testing.assert_close(found["b.weight"].flatten(), 10 * x.norm(dim=0))


@pytest.mark.parametrize("statistic", STATISTICS)
def test_parameters_may_share_a_storage(statistic):
    """As they do after `vector_to_parameters`."""
    model = build("llama", torch.float64)
    samples, flat = samples_of(model), copy.deepcopy(model)
    vector = nn.utils.parameters_to_vector(flat.parameters()).detach()
    nn.utils.vector_to_parameters(vector, flat.parameters())
    for modules in (None, ["o_proj"]):
        expected, found = (
            calibrate(each, find_targets(each, modules), loader(samples), [statistic], SAMPLES)[statistic]
            for each in (model, flat)
        )
        assert_close(found, expected)


@pytest.mark.parametrize("width", [4, 6])
def test_uses_of_a_transposed_weight_are_no_inputs_of_its_rows(width):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, width, bias=False)

        def forward(self, x):
            back = nn.functional.linear(self.layer(x).tanh(), self.layer.weight.t())
            return {"loss": (back - x).square().flatten(1).mean(1).mean()}

    torch.manual_seed(0)
    model, x = Tied().double(), torch.randn(5, 4).double()
    targets = find_targets(model)
    found = calibrate(model, targets, [{"x": x}], ["input_norm", "squared_gradient"], 5)
    torch.testing.assert_close(found["input_norm"]["layer.weight"].flatten(), x.norm(dim=0).float())
    expected = squares_and_gradient(model, [{"x": row[None]} for row in x], targets)
    assert_close(found["squared_gradient"], expected)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_sparse_products_are_left_alone(statistic):
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.register_buffer("adjacency", torch.eye(4).to_sparse())

        def forward(self, x):
            return {"loss": (self.adjacency @ self.a(x[0])).square().mean()}

    model = Graph()
    data = [{"x": torch.randn(1, 4, 4)} for _ in range(3)]
    assert calibrate(model, find_targets(model), data, [statistic], 3)[statistic]["a.weight"].any()


@pytest.mark.parametrize("how", ["whole", "in place"])
def test_compiled_models_are_watched_as_they_are_written(how):
    model = build("llama")
    samples = samples_of(model)
    expected = calibrate(model, find_targets(model), loader(samples), list(STATISTICS), SAMPLES)
    compiled = torch.compile(model, backend="eager") if how == "whole" else model
    if how == "in place":
        model.compile(backend="eager")
    compiled(**default_data_collator(samples))
    found = calibrate(compiled, find_targets(compiled), loader(samples), list(STATISTICS), SAMPLES)
    for name, values in expected.items():
        assert_close({key.removeprefix("_orig_mod."): value for key, value in found[name].items()}, values)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("data", "got"), [([torch.ones(2, 4)], "Tensor"), ([[torch.ones(2, 4)]], "list"), ([{"x": [[1.0]]}], "x")]
)
def test_batches_must_be_dicts_of_tensors(data, got):
    model = build("llama")
    with pytest.raises(TypeError, match=rf"calibration batches must be dicts of tensors, .*; got {got}\."):
        calibrate(model, find_targets(model), data, ["input_norm"], 2)


def test_a_part_that_no_sample_reaches_has_norms_of_one_and_that_is_said(caplog):
    model = sixteen_experts()
    data = [{"input_ids": torch.tensor([[3, 4, 5]])}]
    norms = calibrate(model, find_targets(model), data, ["input_norm"], 1)["input_norm"]
    norm = norms["model.layers.0.mlp.experts.down_proj"]
    unreached = int((norm == 1).all(dim=-1).sum())
    assert 10 <= unreached < 16  # Three tokens go to six experts at most.
    name = "model.layers.0.mlp.experts.down_proj"
    assert f"was seen to reach {unreached} of the 16 parts of {name!r}; their weights count alike" in caplog.text


def test_a_weight_may_stand_on_the_left():
    """As in Mamba, which multiplies a layer's weight by hand."""

    class Left(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3, bias=False)

        def forward(self, x, labels=None):
            out = (self.layer.weight @ x.transpose(1, 2)).transpose(1, 2)
            return {"loss": (out - 1).square().flatten(1).mean(1).mean(), "out": out}

    torch.manual_seed(0)
    left = Left().double()
    right = nn.Linear(5, 3, bias=False).double()
    right.weight = left.layer.weight
    x = torch.randn(6, 4, 5).double()
    data = [{"x": x[:4]}, {"x": x[4:]}]
    found = calibrate(left, find_targets(left), data, ["input_norm", "squared_gradient"], 6)
    name = "layer.weight"
    torch.testing.assert_close(found["input_norm"][name], x.flatten(0, 1).norm(dim=0)[None].float())
    squares = torch.zeros(3, 5)
    for sample in x:
        (gradient,) = torch.autograd.grad((right(sample) - 1).square().mean(), right.weight)
        squares += gradient.square().float() / 6
    torch.testing.assert_close(found["squared_gradient"][name], squares)


def test_the_labels_of_a_model_under_peft_are_shifted_too():
    peft = pytest.importorskip("peft")
    plain = build("llama")
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    sample = default_data_collator(samples_of(plain))
    assert torch.equal(LabelCounts(model)(sample), LabelCounts(plain)(sample))


def test_labels_in_lists_are_cut_with_their_samples():
    """As those of detection."""

    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, labels):
            assert len(labels) == len(x)
            seen.append(len(x))
            return {"loss": (self.layer(x) - torch.stack([label["box"] for label in labels])).square().sum()}

    seen: list[int] = []
    model = Detector()
    data = [{"x": torch.randn(4, 4), "labels": [{"box": torch.randn(4)} for _ in range(4)]}]
    calibrate(model, find_targets(model), data, ["gradient"], 3)
    assert seen == [3]
