"""Accuracy and perplexity as `evaluate` metrics that need no network, ready to pass to a `Trainer`."""

import math
from collections.abc import Callable

import datasets
import evaluate
import numpy as np
import torch
import torch.nn.functional as F
from transformers import EvalPrediction

from .calibration.batches import IGNORED_LABEL
from .reporting.history import perplexity_from_loss

ComputeMetrics = Callable[..., dict[str, float]]
"""`compute_metrics(prediction: EvalPrediction, compute_result: bool = True)`, as `Trainer` calls it."""

PreprocessLogits = Callable[[torch.Tensor | tuple[torch.Tensor, ...], torch.Tensor], torch.Tensor]
"""`preprocess_logits_for_metrics(logits, labels)`, as `Trainer` calls it after each batch."""


class Accuracy(evaluate.Metric):
    """The fraction of labels that were predicted correctly. A label of -100 does not count.

    Example:
        >>> Accuracy(keep_in_memory=True).compute(predictions=[1, 0, 2], references=[1, 1, -100])
        {'accuracy': 0.5}
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info(
            "The fraction of labels that were predicted correctly; a label of -100 does not count.",
            "predictions: the predicted classes. references: the labels.",
            "int64",
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        labelled = np.not_equal(references, IGNORED_LABEL)
        if not labelled.any():
            raise ValueError(f"accuracy needs at least one label, got {len(references)} of -100.")
        return {"accuracy": float(np.equal(predictions, references)[labelled].mean())}


class Perplexity(evaluate.Metric):
    """The exponential of the mean negative log-likelihood of a token, whatever sample or batch the token is in.

    Example:
        >>> Perplexity(keep_in_memory=True).compute(predictions=[0.0, 3 * math.log(4)], references=[1, 2])
        {'perplexity': 4.0}
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info(
            "The exponential of the mean negative log-likelihood of a token.",
            "predictions: each sample's negative log-likelihood, summed over its labelled tokens. "
            "references: how many labelled tokens each sample has.",
            "float64",
        )

    def _compute(self, predictions: list[float], references: list[int]) -> dict[str, float]:
        tokens = sum(references)
        if tokens == 0:
            raise ValueError(f"perplexity needs at least one labelled token, got {len(references)} samples with none.")
        return {"perplexity": perplexity_from_loss(math.fsum(predictions) / tokens)}


def accuracy_metrics() -> tuple[ComputeMetrics, PreprocessLogits]:
    """What makes a `Trainer` report `eval_accuracy`, for labels of any shape; -100 is left out.

    The logits `[..., classes]` of each batch are reduced to the predicted classes `[...]`.

    Returns:
        `(compute_metrics, preprocess_logits_for_metrics)`, the arguments of `Trainer` with these names. Both also
        serve `batch_eval_metrics=True`.

    Raises:
        ValueError: from `compute_metrics`, if the logits do not fit the labels, or if every label is -100.

    Example:
        ```python
        compute_metrics, preprocess = accuracy_metrics()
        trainer = Trainer(..., compute_metrics=compute_metrics, preprocess_logits_for_metrics=preprocess)
        ```
    """
    metric = Accuracy(keep_in_memory=True)

    def preprocess(logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
        return _first(logits).argmax(dim=-1)

    def compute(prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        predictions, labels = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
        if predictions.shape != labels.shape:
            raise ValueError(
                f"accuracy needs one prediction for each label, got predictions {list(predictions.shape)} for labels "
                f"{list(labels.shape)}. Was preprocess_logits_for_metrics given to Trainer too?"
            )
        metric.add_batch(predictions=predictions.flatten(), references=labels.flatten())
        return metric.compute() if compute_result else {}

    return compute, preprocess


def perplexity_metrics(shift: bool = True) -> tuple[ComputeMetrics, PreprocessLogits]:
    """What makes a `Trainer` report `eval_perplexity`, weighted by tokens, without keeping any logits.

    The logits of each batch are reduced, one sample at a time, to its samples' summed negative log-likelihoods and
    numbers of labelled tokens `[batch, 2]`; their totals are taken in float64.

    Args:
        shift: Whether the logits of a position predict the next position's label, as in causal models. False for
            models that predict the label of the same position: T5 and other encoder-decoders, masked models.

    Returns:
        `(compute_metrics, preprocess_logits_for_metrics)`, the arguments of `Trainer` with these names. Both also
        serve `batch_eval_metrics=True`.

    Raises:
        ValueError: from `preprocess_logits_for_metrics`, if the logits do not fit the labels; from `compute_metrics`,
            if no token has a label other than -100.

    Example:
        ```python
        compute_metrics, preprocess = perplexity_metrics()
        trainer = Trainer(..., compute_metrics=compute_metrics, preprocess_logits_for_metrics=preprocess)
        ```
    """
    metric = Perplexity(keep_in_memory=True)

    def preprocess(logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
        logits = _first(logits)
        if logits.dim() != 3 or logits.shape[:2] != labels.shape:
            raise ValueError(
                f"perplexity needs logits [batch, seq, vocab] and labels [batch, seq], got {list(logits.shape)} and "
                f"{list(labels.shape)}."
            )
        if shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return torch.stack([_nll_and_tokens(*sample) for sample in zip(logits, labels, strict=True)])

    def compute(prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        samples = torch.as_tensor(prediction.predictions)
        if samples.dim() != 2 or samples.shape[1] != 2:
            raise ValueError(
                f"perplexity needs each sample's negative log-likelihood and number of tokens [samples, 2], got "
                f"{list(samples.shape)}. Was preprocess_logits_for_metrics given to Trainer too?"
            )
        metric.add_batch(predictions=samples[:, 0], references=samples[:, 1])
        return metric.compute() if compute_result else {}

    return compute, preprocess


def _info(description: str, inputs: str, kind: str) -> evaluate.MetricInfo:
    """What `evaluate` asks of a metric whose predictions are of a kind, and whose references are whole numbers."""
    features = datasets.Features({"predictions": datasets.Value(kind), "references": datasets.Value("int64")})
    return evaluate.MetricInfo(description=description, citation="", inputs_description=inputs, features=features)


def _nll_and_tokens(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """One sample `[seq, vocab]`, `[seq]` → its negative log-likelihood and number of labelled tokens `[2]`."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum")
    return torch.stack([total, (labels != IGNORED_LABEL).sum().to(total.dtype)])


def _first(logits: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    # Models that also return hidden states hand them over behind the logits.
    return logits[0] if isinstance(logits, tuple) else logits
