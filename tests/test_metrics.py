import math
import socket

import evaluate
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    EvalPrediction,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from hf_prune.metrics import Accuracy, Perplexity, accuracy_metrics, perplexity_from_loss, perplexity_metrics
from tests.processes import on_two_processes

VOCAB = 11


@pytest.fixture(autouse=True)
def offline_and_traceless(monkeypatch, tmp_path):
    """Every test here fails if it reaches for the network or leaves a file in the cache of `evaluate`."""
    reached_for = []

    class Offline(socket.socket):
        def connect(self, address):
            if self.family == socket.AF_UNIX:  # as processes of this machine talk
                return super().connect(address)
            return refuse(address)

        connect_ex = connect

    def refuse(*args, **kwargs):
        reached_for.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "socket", Offline)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    cache = tmp_path / "cache"
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", cache)
    monkeypatch.setenv("HF_METRICS_CACHE", str(cache))  # for the processes that a test starts
    yield
    assert not reached_for
    assert not [path for path in cache.rglob("*") if path.is_file()]


@pytest.fixture
def samples():
    """Seven samples of very different lengths: in batches of three, the last one short."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCAB, (length,), generator=generator) for length in (2, 12, 3, 9, 2, 7, 12)]


def pad(samples):
    """What a data collator does: labels of -100 where a sample has ended."""
    longest = max(len(sample) for sample in samples)
    tokens = torch.stack([F.pad(sample, (0, longest - len(sample))) for sample in samples])
    mask = torch.stack([torch.arange(longest) < len(sample) for sample in samples])
    return {"input_ids": tokens, "attention_mask": mask.long(), "labels": tokens.masked_fill(~mask, -100)}


def gpt2():
    torch.manual_seed(0)
    # Large weights make the likelihoods of short and long samples differ.
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=16,
        n_embd=16,
        n_layer=1,
        n_head=2,
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


def t5():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config).eval()


def trainer_of(model, folder, metrics, **arguments):
    compute_metrics, preprocess = metrics
    return Trainer(
        model,
        TrainingArguments(folder, per_device_eval_batch_size=3, report_to="none", use_cpu=True, **arguments),
        data_collator=pad,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=preprocess,
    )


def measure(metrics, *batches):
    """Takes `(logits, labels)` batches the way of Trainer: reduced one by one, then joined and computed on."""
    compute_metrics, preprocess = metrics
    predictions = torch.cat([preprocess(logits, labels) for logits, labels in batches])
    labels = torch.cat([labels for _, labels in batches])
    return compute_metrics(EvalPrediction(predictions.numpy(), labels.numpy()))


@torch.no_grad()
def perplexity_one_by_one(model, samples, shift):
    """The oracle: each sample on its own, without padding, and one mean over all tokens, in float64."""
    model = model.double()
    logits, labels = [], []
    for sample in samples:
        output = model(input_ids=sample[None], labels=sample[None]).logits[0]
        logits.append(output[:-1] if shift else output)
        labels.append(sample[1:] if shift else sample)
    model.float()
    return F.cross_entropy(torch.cat(logits), torch.cat(labels)).exp().item()


class TestPerplexity:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("shift", [True, False])
    def test_is_the_mean_over_all_tokens_of_all_batches(self, dtype, shift):
        torch.manual_seed(0)
        batches = [(3 * torch.randn(n, 6, VOCAB).to(dtype), torch.randint(VOCAB, (n, 6))) for n in (4, 1)]
        batches[0][1][:3, 2:] = -100
        result = measure(perplexity_metrics(shift), *batches)
        logits = torch.cat([(x[:, :-1] if shift else x).flatten(0, 1) for x, _ in batches])
        labels = torch.cat([(y[:, 1:] if shift else y).flatten() for _, y in batches])
        expected = F.cross_entropy(logits.double(), labels).exp().item()
        assert result == {"perplexity": pytest.approx(expected, rel=1e-6)}

    def test_trainer_evaluates_to_the_oracle_where_its_loss_does_not(self, tmp_path, samples):
        model = gpt2()
        metrics = trainer_of(model, tmp_path, perplexity_metrics()).evaluate(samples)
        expected = perplexity_one_by_one(model, samples, shift=True)
        assert metrics["eval_perplexity"] == pytest.approx(expected, rel=1e-5)
        assert perplexity_from_loss(metrics["eval_loss"]) != pytest.approx(expected, rel=0.02)

    def test_encoder_decoders_are_not_shifted(self, tmp_path, samples):
        model = t5()
        trainer = trainer_of(model, tmp_path, perplexity_metrics(shift=False))
        assert isinstance(trainer.prediction_step(model, pad(samples), False)[1], tuple)
        expected = perplexity_one_by_one(model, samples, shift=False)
        assert trainer.evaluate(samples)["eval_perplexity"] == pytest.approx(expected, rel=1e-5)

    def test_batch_eval_metrics_gives_the_same(self, tmp_path, samples):
        model = gpt2()
        whole = trainer_of(model, tmp_path, perplexity_metrics()).evaluate(samples)
        by_batch = trainer_of(model, tmp_path, perplexity_metrics(), batch_eval_metrics=True).evaluate(samples)
        assert by_batch["eval_perplexity"] == whole["eval_perplexity"]

    @pytest.mark.multiprocess
    def test_two_processes_give_the_same(self, tmp_path, samples):
        results = on_two_processes(evaluate_as_one_of_two, tmp_path, tmp_path, samples)
        expected = perplexity_one_by_one(gpt2(), samples, shift=True)
        assert results == [(2, pytest.approx(expected, rel=1e-5))] * 2

    def test_two_numbers_a_sample_are_all_that_is_kept(self, tmp_path, samples):
        predictions = trainer_of(gpt2(), tmp_path, perplexity_metrics()).predict(samples).predictions
        assert predictions.shape == (len(samples), 2)
        assert predictions[:, 1].tolist() == [len(sample) - 1 for sample in samples]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_no_copy_of_a_whole_batch_of_logits_is_made(self, dtype):
        logits, labels = torch.randn(8, 6, VOCAB, dtype=dtype), torch.randint(VOCAB, (8, 6))
        _, preprocess = perplexity_metrics()
        with LargestNewTensor(logits) as largest:
            preprocess(logits, labels)
        assert 0 < largest.numel <= logits[0].numel()

    def test_totals_are_float64(self):
        result = Perplexity(keep_in_memory=True).compute(predictions=[2.0**24, 1.0], references=[2**24, 1])
        assert result == {"perplexity": pytest.approx(math.e, rel=1e-15)}

    def test_overflows_to_infinity(self):
        assert Perplexity(keep_in_memory=True).compute(predictions=[1e5], references=[1]) == {"perplexity": math.inf}
        assert perplexity_from_loss(1e5) == math.inf
        assert perplexity_from_loss(math.log(3)) == pytest.approx(3)

    def test_needs_a_labelled_token_and_recovers(self):
        metrics = perplexity_metrics()
        logits, labels = torch.zeros(2, 4, VOCAB), torch.ones(2, 4, dtype=torch.long)
        with pytest.raises(ValueError, match="at least one labelled token, got 2 samples with none"):
            measure(metrics, (logits, labels.fill_(-100)))
        assert measure(metrics, (logits, labels.fill_(1))) == {"perplexity": pytest.approx(VOCAB)}

    def test_logits_must_fit_the_labels(self):
        _, preprocess = perplexity_metrics()
        with pytest.raises(ValueError, match=r"labels \[batch, seq\], got \[2, 11\] and \[2\]"):
            preprocess(torch.zeros(2, VOCAB), torch.zeros(2, dtype=torch.long))
        with pytest.raises(ValueError, match=r"got \[2, 5, 11\] and \[2, 4\]"):
            preprocess(torch.zeros(2, 5, VOCAB), torch.zeros(2, 4, dtype=torch.long))

    def test_raw_logits_are_refused(self):
        compute_metrics, _ = perplexity_metrics()
        with pytest.raises(ValueError, match="preprocess_logits_for_metrics"):
            compute_metrics(EvalPrediction(np.zeros((2, 4, VOCAB)), np.zeros((2, 4))))


class TestAccuracy:
    def test_of_classes(self):
        torch.manual_seed(0)
        batches = [(torch.randn(n, 3), torch.randint(3, (n,))) for n in (8, 8, 5)]
        expected = accuracy_score(
            torch.cat([labels for _, labels in batches]), torch.cat([logits.argmax(-1) for logits, _ in batches])
        )
        assert measure(accuracy_metrics(), *batches) == {"accuracy": expected}

    def test_of_tokens(self):
        torch.manual_seed(0)
        logits, labels = torch.randn(8, 5, 3), torch.randint(3, (8, 5))
        labels[torch.rand(8, 5) < 0.4] = -100
        labelled = labels != -100
        expected = accuracy_score(labels[labelled], logits.argmax(-1)[labelled])
        assert measure(accuracy_metrics(), ((logits, "hidden states"), labels)) == {"accuracy": expected}

    def test_trainer_keeps_classes_only(self, tmp_path, samples):
        output = trainer_of(gpt2(), tmp_path, accuracy_metrics()).predict(samples)
        assert output.predictions.shape == output.label_ids.shape == (7, 12)
        labelled = output.label_ids != -100
        expected = accuracy_score(output.label_ids[labelled], output.predictions[labelled])
        assert output.metrics["test_accuracy"] == expected

    def test_needs_a_label(self):
        with pytest.raises(ValueError, match="at least one label, got 2 of -100"):
            Accuracy(keep_in_memory=True).compute(predictions=[0, 1], references=[-100, -100])

    def test_predictions_must_fit_the_labels(self):
        compute_metrics, _ = accuracy_metrics()
        with pytest.raises(ValueError, match=r"got predictions \[2, 3\] for labels \[2\].*preprocess_logits"):
            compute_metrics(EvalPrediction(np.zeros((2, 3)), np.zeros(2)))


def evaluate_as_one_of_two(rank, folder, samples):
    trainer = trainer_of(gpt2(), folder, perplexity_metrics())
    return trainer.args.world_size, trainer.evaluate(samples)["eval_perplexity"]


class LargestNewTensor(TorchDispatchMode):
    """Watches every operation for the largest result that is not a view of `source`."""

    def __init__(self, source):
        super().__init__()
        self.source, self.numel = source.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(result)):
            if tensor.untyped_storage().data_ptr() != self.source:
                self.numel = max(self.numel, tensor.numel())
        return result
