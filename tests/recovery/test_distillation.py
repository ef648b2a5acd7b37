"""Distillation: the loss is what its formula says, however the batches of a step are divided."""

import copy
import functools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from hf_prune import PruningConfig, PruningTrainerCallback, prune, shrink
from hf_prune.distributed.shards import whole
from hf_prune.recovery.distillation import DistillationMixin, DistillationTrainer, _distance
from tests.processes import on_two_processes, results_in_turn
from tests.structures.models import build as build_of_structures
from tests.tiny import TEXT, batch, build
from tests.trainers import FSDP, trainer_factory

FAMILIES = ["llama", "gpt2", "t5", "bert", "vit", "resnet"]


def student_of(family: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    model = build(family, dtype)
    prune(model, PruningConfig(sparsity=0.6))
    return model


def uneven(model: nn.Module, size: int = 24) -> list[dict[str, torch.Tensor]]:
    """Samples of which each has another number of labels."""
    samples = batch(model, size)
    for i, sample in enumerate(samples):
        if sample["labels"].ndim:
            sample["labels"][: 1 + i % 7] = -100
    return samples


def trainer_of(folder: Path, model: nn.Module, *callbacks: TrainerCallback, **options) -> DistillationTrainer:
    names = ("teacher", "temperature", "distillation_weight", "hidden_states_weight")
    cls = functools.partial(DistillationTrainer, **{name: options.pop(name) for name in names if name in options})
    samples = options.pop("train_dataset", None) or uneven(model)
    return trainer_factory(folder)(
        model, *callbacks, cls=cls, train_dataset=samples, eval_dataset=batch(model, 8, seed=1), **options
    )


def soft_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """By torch, as papers have it: a mean over rows."""
    log_student, soft_teacher = F.log_softmax(student / temperature, -1), F.softmax(teacher / temperature, -1)
    return F.kl_div(log_student, soft_teacher, reduction="batchmean") * temperature**2


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_its_formula(family, temperature, tmp_path):
    student, teacher = student_of(family), build(family, torch.float64)
    trainer = trainer_of(tmp_path, student, teacher=teacher, temperature=temperature, distillation_weight=0.3)
    inputs = default_data_collator(uneven(student, 4))
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    student.eval()
    student.training = True  # The loss of training, without dropout and batch statistics.
    found = trainer.compute_loss(student, dict(inputs))
    outputs = student(**inputs)
    logits, expected, labels = outputs.logits, teacher.eval()(**inputs).logits, inputs["labels"]
    if family in ("llama", "gpt2"):
        logits, expected, labels = logits[:, :-1], expected[:, :-1], labels[:, 1:]
    kept = labels != -100
    soft = soft_loss(logits[kept], expected[kept], temperature)
    assert found.item() == pytest.approx((0.7 * outputs.loss + 0.3 * soft).item(), rel=1e-5)
    found.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_evaluations_are_those_without_a_teacher(tmp_path):
    student = student_of("llama", torch.float32)
    plain = trainer_factory(tmp_path)(copy.deepcopy(student))
    assert trainer_of(tmp_path, student).evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


def weights_after(folder: Path, samples: int, **options) -> dict[str, torch.Tensor]:
    """What two steps make of a model."""
    student = student_of("llama")
    options = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.5, "per_device_train_batch_size": samples, **options}
    trainer_of(folder, student, teacher=build("llama", torch.float64), **options).train()
    return {name: whole(parameter.detach()).clone() for name, parameter in student.named_parameters()}


def are_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return all(torch.allclose(found[name], tensor, rtol=0, atol=1e-7) for name, tensor in expected.items())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_step_is_the_same_however_its_samples_are_accumulated(smoothing, tmp_path):
    plain = weights_after(tmp_path, 4, label_smoothing_factor=smoothing)
    before = dict(student_of("llama").named_parameters())
    assert not are_close(before, plain)
    for samples in (2, 1):
        steps = 4 // samples
        found = weights_after(tmp_path, samples, gradient_accumulation_steps=steps, label_smoothing_factor=smoothing)
        assert are_close(found, plain)
    other = weights_after(tmp_path, 4, label_smoothing_factor=smoothing, distillation_weight=0.0)
    assert not are_close(other, plain)


def test_a_loss_of_ones_own_is_accumulated_alike(tmp_path):
    def compute_loss(outputs, labels, num_items_in_batch=None):
        logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return F.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch

    results = []
    for samples in (4, 2, 1):
        student = student_of("llama")
        teacher = build("llama", torch.float64)
        cls = functools.partial(DistillationTrainer, compute_loss_func=compute_loss, teacher=teacher)
        trainer = trainer_factory(tmp_path)(
            student, cls=cls, train_dataset=uneven(student), max_steps=2, optim="sgd", learning_rate=0.5,
            per_device_train_batch_size=samples, gradient_accumulation_steps=4 // samples,
        )  # fmt: skip
        trainer.train()
        results.append(dict(student.named_parameters()))
    assert are_close(results[1], results[0])
    assert are_close(results[2], results[0])
    assert are_close(weights_after(tmp_path, 4), results[0])


class Watch(TrainerCallback):
    """Keeps what was logged."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def test_a_copy_of_the_model_teaches_it_nothing(tmp_path):
    student = build("llama", torch.float64)
    before, watch = copy.deepcopy(student.state_dict()), Watch()
    trainer = trainer_of(
        tmp_path, student, watch, distillation_weight=1.0, optim="sgd", logging_strategy="steps", logging_steps=1
    )
    trainer.train()
    assert all(torch.allclose(tensor, before[name], atol=1e-6) for name, tensor in student.state_dict().items())
    losses = [logs["distillation_loss"] for logs in watch.logs if "distillation_loss" in logs]
    assert len(losses) == 6
    assert losses == pytest.approx([0.0] * 6, abs=1e-6)
    assert watch.logs[0]["teacher_seconds"] > 0


def test_the_dense_model_teaches_while_it_is_pruned(tmp_path):
    model = build("llama", torch.float64)
    before, pruning = copy.deepcopy(model.state_dict()), PruningTrainerCallback(PruningConfig(sparsity=0.8))
    trainer = trainer_of(tmp_path, model, pruning)
    trainer.train()
    assert pruning.masks.sparsity == pytest.approx(0.8, abs=1e-3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.teacher.state_dict().items())
    assert not trainer.teacher.training
    assert set(trainer.model.state_dict()) == set(before)


@pytest.mark.parametrize("granularity", ["neuron", "head+neuron", "layer"])
def test_hidden_states_are_compared_with_a_shrunk_model(granularity, tmp_path):
    teacher = build_of_structures("llama").double()
    student = copy.deepcopy(teacher)
    options = {"multiple_of": 1} if "neuron" in granularity else {}
    prune(student, PruningConfig(sparsity=0.5, granularity=granularity, **options))
    shrink(student)
    trainer = trainer_of(
        tmp_path, student, teacher=teacher, hidden_states_weight=100.0, max_steps=30,
        learning_rate=1e-3,
    )  # fmt: skip
    inputs = default_data_collator(batch(student, 8))

    def far() -> float:
        with torch.no_grad():
            states = [m(**inputs, output_hidden_states=True).hidden_states for m in (student, teacher)]
        last = [each[-1] for each in states]
        return float((last[0] - last[1]).square().mean() / last[1].square().mean())

    first = far()
    trainer.train()
    assert far() < 0.9 * first


def test_layers_are_compared_at_the_same_depth():
    teacher = [torch.full((2, 2), float(i + 1)) for i in range(5)]

    def far(student: list[torch.Tensor]) -> float:
        return float(_distance({"hidden_states": student}, {"hidden_states": teacher}))

    assert far([teacher[0], teacher[2], teacher[4]]) == 0
    assert far([teacher[4]]) > 0
    assert far([teacher[0], teacher[1], teacher[4]]) == pytest.approx(((2.0 - 3.0) ** 2 / 3.0**2) / 3)


def test_encoder_and_decoder_are_compared_apart():
    states = [torch.full((2, 2), float(i + 1)) for i in range(5)]
    teacher = {"encoder_hidden_states": states, "decoder_hidden_states": states[:3]}
    assert _distance({"encoder_hidden_states": states[::2], "decoder_hidden_states": states[:3]}, teacher) == 0


def soft_of(model: nn.Module, teacher: nn.Module, inputs: dict[str, torch.Tensor], folder: Path) -> torch.Tensor:
    trainer = trainer_of(folder, model, teacher=teacher, temperature=1.0, distillation_weight=1.0)
    items = (inputs["labels"] != -100).sum()
    return trainer.compute_loss(model.train(), inputs, num_items_in_batch=items)


def test_several_labels_of_a_sample_are_no_several_samples(tmp_path):
    def make() -> nn.Module:
        config = transformers.LlamaConfig(**TEXT, num_labels=4, problem_type="multi_label_classification")
        return transformers.LlamaForSequenceClassification(config).double()

    student, teacher = make(), make()
    inputs = {"input_ids": torch.randint(3, 60, (8, 6)), "labels": torch.rand(8, 4, dtype=torch.float64)}
    found = soft_of(student, teacher, dict(inputs), tmp_path)
    student.train()
    expected = soft_loss(student(inputs["input_ids"]).logits, teacher(inputs["input_ids"]).logits, 1.0)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_what_has_no_soft_targets_is_an_error(tmp_path):
    one = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**TEXT, num_labels=1))
    inputs = {"input_ids": torch.randint(3, 60, (8, 6)), "labels": torch.rand(8)}
    with pytest.raises(ValueError, match=r"logits of shape \[8, 1\] are not those of classes"):
        soft_of(one, copy.deepcopy(one), inputs, tmp_path)
    spans = transformers.BertForQuestionAnswering(transformers.BertConfig(**TEXT, max_position_embeddings=16))
    rows = {"input_ids": torch.ones(2, 6, dtype=torch.long), "start_positions": torch.tensor([1, 2]),
            "end_positions": torch.tensor([2, 3])}  # fmt: skip
    trainer = trainer_of(tmp_path, spans, train_dataset=[{k: v[0] for k, v in rows.items()}])
    with pytest.raises(ValueError, match="gives no logits, which are what is distilled"):
        trainer.compute_loss(spans.train(), rows)


def test_classes_that_nobody_allows_count_for_nothing(tmp_path):
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build("llama", torch.float64)
            self.main_input_name, self.config = self.inner.main_input_name, self.inner.config

        def forward(self, input_ids, labels=None):
            output = self.inner(input_ids=input_ids, labels=labels)
            output.logits = output.logits.index_fill(-1, torch.tensor([5, 7]), float("-inf"))
            return output

    student, samples = Masked(), batch(build("llama"), 4)
    trainer = trainer_of(tmp_path, student, teacher=Masked(), train_dataset=samples)
    loss = trainer.compute_loss(student.train(), default_data_collator(samples))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


def test_what_is_logged_does_not_depend_on_accumulation(tmp_path):
    found = []
    for samples in (4, 1):
        watch = Watch()
        trainer = trainer_of(
            tmp_path, student_of("llama"), watch, teacher=build("llama", torch.float64), optim="sgd", max_steps=2,
            per_device_train_batch_size=samples, gradient_accumulation_steps=4 // samples, logging_strategy="steps",
            logging_steps=1,
        )  # fmt: skip
        trainer.train()
        found.append([logs["distillation_loss"] for logs in watch.logs if "distillation_loss" in logs])
    assert len(found[0]) == 2
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_a_teacher_that_is_the_student_is_an_error(tmp_path):
    model = build("llama")
    with pytest.raises(ValueError, match="teacher shares parameters with the model that it is to teach"):
        trainer_of(tmp_path, model, teacher=model)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0 and finite, got 0.0"),
        ({"temperature": float("nan")}, "temperature must be above 0 and finite, got nan"),
        ({"temperature": float("inf")}, "temperature must be above 0 and finite, got inf"),
        ({"distillation_weight": 1.5}, r"distillation_weight must be in \[0, 1\], got 1.5"),
        ({"hidden_states_weight": -1.0}, "hidden_states_weight must be 0 or more and finite, got -1.0"),
        ({"hidden_states_weight": float("inf")}, "hidden_states_weight must be 0 or more and finite, got inf"),
    ],
)
def test_numbers_out_of_range_are_errors(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, build("llama"), **options)


def test_a_teacher_that_is_no_model_is_an_error(tmp_path):
    with pytest.raises(TypeError, match="teacher must be a model, got str"):
        trainer_of(tmp_path, build("llama"), teacher="gpt2")


def test_other_logits_are_an_error(tmp_path):
    teacher = build("llama")
    teacher.lm_head = nn.Linear(16, 61)
    with pytest.raises(ValueError, match=r"logits of shape \[4, 12, 60\], the teacher \[4, 12, 61\]"):
        trainer_of(tmp_path, build("llama"), teacher=teacher).train()


def test_no_hidden_state_of_equal_shape_is_an_error(tmp_path):
    teacher = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**TEXT, "hidden_size": 32}))
    trainer = trainer_of(tmp_path, build("llama"), teacher=teacher, hidden_states_weight=1.0)
    with pytest.raises(ValueError, match="have no hidden states of equal shape: set hidden_states_weight=0"):
        trainer.train()


def test_a_mixin_goes_before_another_trainer(tmp_path):
    class Doubled(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            return (2 * loss, outputs) if return_outputs else 2 * loss

    class Own(DistillationMixin, Doubled):
        """Somebody's own."""

    model = build("llama")
    inputs = default_data_collator(batch(model, 4))
    found = trainer_factory(tmp_path)(model, cls=Own).compute_loss(model.train(), dict(inputs))
    assert found.item() == pytest.approx(model(**inputs).loss.item())  # Half of what is doubled: a copy adds nothing.


@pytest.mark.parametrize("scaled", [None, False, True])
def test_a_loss_by_a_trainer_of_ones_own_is_accumulated_as_it_says(scaled, tmp_path):
    """Its loss is a mean, and so is the teacher's part then, of 8 samples at once as of 4 times 2."""

    class OwnLoss(Trainer):
        loss_is_scaled_for_ga = scaled

        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            outputs = model(**inputs)
            loss = outputs.loss / (self.current_gradient_accumulation_steps if scaled else 1)
            return (loss, outputs) if return_outputs else loss

    class Own(DistillationMixin, OwnLoss):
        """Somebody's own."""

    found = []
    for samples in (8, 2):
        student = student_of("vit")
        before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
        cls = functools.partial(Own, teacher=build("vit", torch.float64), distillation_weight=1.0)
        data = [{k: v.double() if v.is_floating_point() else v for k, v in s.items()} for s in batch(student, 8)]
        trainer = trainer_factory(tmp_path)(
            student, cls=cls, train_dataset=data, max_steps=1, optim="sgd", learning_rate=0.5,
            per_device_train_batch_size=samples, gradient_accumulation_steps=8 // samples,
        )  # fmt: skip
        trainer.train()
        found.append({name: parameter.detach() - before[name] for name, parameter in student.named_parameters()})
    assert are_close(found[1], found[0])
    assert any(bool(moved.any()) for moved in found[0].values())


@pytest.mark.parametrize("average", [True, False])
def test_data_parallel_learns_what_one_device_does(average, tmp_path, monkeypatch):
    def forward(self, **inputs):
        halves = [{name: value.chunk(2)[i] for name, value in inputs.items()} for i in range(2)]
        outputs = [self.module(**half) for half in halves]
        together = {"logits": torch.cat([each["logits"] for each in outputs])}
        return {"loss": torch.stack([each["loss"] for each in outputs])} | together

    def apart(devices: int) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda _: devices))
        return weights_after(
            tmp_path, 4 // max(devices, 1), distillation_weight=1.0, average_tokens_across_devices=average,
            logging_strategy="steps", logging_steps=1, train_dataset=batch(build("llama"), 24),
        )  # fmt: skip

    one = apart(0)
    monkeypatch.setattr(nn.DataParallel, "forward", forward)
    assert are_close(apart(2), one)


@pytest.mark.parametrize(("family", "shifts"), [("llama", True), ("bart", False), ("xlnet", False)])
def test_the_position_that_is_taught_is_that_of_the_label(family, shifts, tmp_path):
    options = {"d_model": 16, "vocab_size": 60, "dropout": 0.0}
    models = {
        "llama": lambda: build("llama"),
        "bart": lambda: transformers.BartForCausalLM(
            transformers.BartConfig(
                **options, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32, max_position_embeddings=32
            )
        ),
        "xlnet": lambda: transformers.XLNetLMHeadModel(
            transformers.XLNetConfig(**options, n_layer=1, n_head=2, d_inner=32)
        ),
    }
    torch.manual_seed(0)
    student, teacher = models[family](), models[family]()
    with torch.no_grad():
        student.get_output_embeddings().weight.normal_()
    inputs = {"input_ids": torch.randint(3, 60, (2, 8)), "labels": torch.full((2, 8), -100)}
    inputs["labels"][:, 4] = 7
    found = soft_of(student, teacher, dict(inputs), tmp_path)
    at = 3 if shifts else 4
    logits, expected = (model.eval()(input_ids=inputs["input_ids"]).logits[:, at] for model in (student, teacher))
    assert found.item() == pytest.approx(soft_loss(logits, expected, 1.0).item(), rel=1e-5)


def test_a_teacher_need_not_have_a_loss(tmp_path):
    class Silent(transformers.LlamaForCausalLM):
        def forward(self, input_ids, attention_mask=None, labels=None):
            return {"logits": super().forward(input_ids, attention_mask).logits}

    torch.manual_seed(0)
    student, silent = build("llama"), Silent(build("llama").config)
    teacher = build("llama")
    teacher.load_state_dict(silent.state_dict())
    inputs = default_data_collator(uneven(student, 4))
    found, expected = (soft_of(student, each, dict(inputs), tmp_path).item() for each in (silent, teacher))
    assert found == pytest.approx(expected)


def test_labels_of_a_length_of_their_own_count_no_positions(tmp_path):
    def make() -> nn.Module:
        config = transformers.Wav2Vec2Config(
            vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2, mask_time_prob=0.0,
            num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, layerdrop=0.0, do_stable_layer_norm=False,
            feat_extract_norm="group", hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
            feat_proj_dropout=0.0, final_dropout=0.0,
        )  # fmt: skip
        return transformers.Wav2Vec2ForCTC(config)

    torch.manual_seed(0)
    student, teacher = make(), make()
    inputs = {"input_values": torch.randn(2, 400), "labels": torch.randint(1, 12, (2, 4))}
    found = soft_of(student, teacher, dict(inputs), tmp_path)
    logits, expected = (model.eval()(inputs["input_values"]).logits.flatten(0, 1) for model in (student, teacher))
    assert found.item() == pytest.approx(soft_loss(logits, expected, 1.0).item(), rel=1e-4)


def train_apart(rank: int, folder: Path) -> list[dict[str, torch.Tensor]]:
    return results_in_turn([{}, FSDP], lambda options: weights_after(folder / str(rank), 2, **options))


@pytest.mark.multiprocess
def test_two_processes_learn_what_one_does(tmp_path):
    one = weights_after(tmp_path, 4)
    for of_rank in on_two_processes(train_apart, tmp_path, tmp_path):
        assert all(are_close(found, one) for found in of_rank)
