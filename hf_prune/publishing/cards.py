"""Cards: what a README on the Hub says of a pruned model, all of it counted or measured."""

import json
import numbers
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import cast

import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers import PreTrainedModel
from yaml import YAMLError

from ..calibration.costs import Cost
from ..callback import TAGS
from ..plan import Settings
from ..reporting.history import PruningHistory
from ..reporting.reports import SparsityReport
from ..reporting.tables import number
from ..selection.weight_groups import Unstructured
from ..structures.groups import KINDS
from ..structures.loading import recorded_in

UNKNOWN = "unknown"
_SECRETS = {"auth", "bearer", "credential", "credentials", "key", "passwd", "password", "pwd", "secret", "token"}
# name=value and "name": value, wherever they stand; what looks like a token; and the password of an address.
_ASSIGNED = re.compile(r"""([A-Za-z][\w-]*)(["']?\s*[=:]\s*["']?)([^\s"',}&]+)""")
_TOKEN = re.compile(r"hf_\w{8,}|(?<=://)[^/@\s]+(?=@)")
_LOADED_AS = re.compile(r'(?<=\.from_pretrained\()"[^"\n]*"(?=\)\n```)')


@dataclass
class Facts:
    """What a card tells of a pruned model.

    Attributes:
        model: The model, unwrapped.
        report: How sparse it is.
        bytes: Size of its files of weights, once they are written.
        settings: How it was pruned; None if that is not known.
        history: Its rounds; None if they are not known.
        metrics: Metrics of the model as it is, such as `test_accuracy`.
        dataset: Name of the data of these metrics on the Hub, or of the file; None if that is not known.
        base_model: Name of the dense model on the Hub; None if it has none.
        costs: What a forward pass takes with the "dense" and with the "pruned" model; empty if it was not measured.
        compressed: Whether the files leave zeros out.
    """

    model: PreTrainedModel
    report: SparsityReport
    bytes: int = 0
    settings: Settings | None = None
    history: PruningHistory | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    dataset: str | None = None
    base_model: str | None = None
    costs: Mapping[str, Cost] = field(default_factory=dict)
    compressed: bool = False

    @property
    def needs_hf_prune(self) -> bool:
        """Whether hf_prune has to be imported to load the model."""
        return self.compressed or bool(recorded_in(self.model.config))


def model_card(name: str, facts: Facts) -> ModelCard:
    """The card of a pruned model, metadata included. It is loaded by its name: a folder, or one on the Hub."""
    results, title = _results(facts), name.rstrip("/").rpartition("/")[2]
    task = pipeline_tag(facts.model)
    data = ModelCardData(
        base_model=facts.base_model,
        datasets=None if facts.dataset is None or os.path.exists(facts.dataset) else facts.dataset,
        library_name="transformers",
        pipeline_tag=task,
        tags=[*TAGS],
        metrics=sorted({metric for metric, _, _ in results}) or None,
        model_name=title,
        eval_results=[
            EvalResult(
                task_type=task or UNKNOWN,
                dataset_type=facts.dataset or UNKNOWN,
                dataset_name=facts.dataset or UNKNOWN,
                dataset_split=split,
                metric_type=metric,
                metric_value=value,
            )
            for metric, split, value in results
        ]
        or None,
    )
    sections = [
        f"# {title}\n\n{_summary(facts)}",
        f"## Load it\n\n{_how_to_load(name, facts)}",
        f"## Size and speed\n\n{_size_and_speed(facts)}",
    ]
    if facts.history:
        rounds = [_markdown(facts.history.rows()), facts.history.shortfall()]
        sections.append("\n\n".join(filter(None, ["## Rounds", *rounds])))
    sections += [f"## Sparsity\n\n{_sparsity(facts.report)}", f"## How it was made\n\n{_how_made(facts)}"]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def base_model_of(card: Path) -> str | None:
    """The dense model that a saved card names; None if there is no such card, or it names none."""
    try:
        found = metadata_load(card) if card.is_file() else None
    except (ValueError, YAMLError):
        return None
    names = (found or {}).get("base_model")
    name = names[0] if isinstance(names, list) and len(names) == 1 else names
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if isinstance(name, str) else None


def pipeline_tag(model: PreTrainedModel) -> str | None:
    """What a model is for, in the Hub's words; None if Transformers does not say."""
    from transformers.modelcard import TASK_MAPPING

    for task, classes in cast(dict[str, dict[str, str]], TASK_MAPPING).items():
        for names in classes.values():
            if _class_of(model) in ((names,) if isinstance(names, str) else names):
                return task
    return None


def command() -> str:
    """How this program was called, without what is secret."""
    words: list[str] = []
    hide = False
    for word in [os.path.basename(sys.executable), *sys.argv]:
        shown = _TOKEN.sub("***", _ASSIGNED.sub(_hide_secret, word.encode(errors="replace").decode()))
        words.append("***" if hide and not word.startswith("-") else shown)
        hide = (_is_secret(word) and not _ASSIGNED.search(word)) or (hide and not word.startswith("-"))
    return shlex.join(words)


def _is_secret(name: str) -> bool:
    return bool(_SECRETS & set(re.split(r"[^a-z0-9]+", name.lower())))


def _hide_secret(found: re.Match[str]) -> str:
    name, between, value = found.groups()
    return f"{name}{between}{'***' if _is_secret(name) else _ASSIGNED.sub(_hide_secret, value)}"


def loaded_as(name: str, text: str) -> str:
    """The text of a card, with another name by which the model is loaded."""
    return _LOADED_AS.sub(lambda _: json.dumps(name), text)


def _results(facts: Facts) -> list[tuple[str, str, float]]:
    """Metric, split and value, of what was measured of the model as it is; without what tells of time."""
    found: list[tuple[str, str, float]] = []
    for key, value in facts.metrics.items():
        split, _, metric = key.partition("_")
        is_of_time = metric in _OF_TIME or metric.endswith("per_second")
        if split in ("test", "eval") and isinstance(value, numbers.Real) and not is_of_time:
            found.append((metric, {"eval": "validation"}.get(split, split), float(value)))
    last = None if facts.history is None else _last_value(facts.history, facts.settings)
    if not found and facts.history is not None and last is not None:
        found.append((facts.history.metric.removeprefix("eval_"), "validation", last))
    return found


_OF_TIME = ("runtime", "model_preparation_time")


def _last_value(history: PruningHistory, settings: Settings | None) -> float | None:
    """The metric of the weights that the last round has handed on."""
    if not history:
        return None
    came_back = settings is not None and settings.config.patience and settings.config.restore == "best"
    return history[-1].best if came_back else history[-1].last


def _summary(facts: Facts) -> str:
    base = f"[{facts.base_model}](https://huggingface.co/{facts.base_model})" if facts.base_model else "A model"
    report, history = facts.report, facts.history
    if _is_shrunk(facts):
        share = f"{history[-1].reached:.1%}" if history else "some"
        how = f"{share} of its {_units(facts)} were removed"
    else:
        how = f"{report.zeros:,} of {report.total:,} targeted {report.units} are zero ({report.sparsity:.2%})"
    lines = [f"{base} ({_class_of(facts.model)}), pruned with hf_prune: {how}."]
    if rows := _before_and_after(facts):
        lines.append(_markdown([["", "dense", "pruned"], *rows]))
    return "\n\n".join(lines)


def _is_shrunk(facts: Facts) -> bool:
    """Whether it is known that structures were removed: what that saved was counted, or the shapes are recorded."""
    counted = facts.history is not None and bool(facts.history.costs)
    return counted or "shapes" in recorded_in(facts.model.config)


def _units(facts: Facts) -> str:
    kinds = () if facts.settings is None else facts.settings.granularity.kinds
    return " and ".join(KINDS[kind] for kind in kinds) or "structures"


def _before_and_after(facts: Facts) -> list[list[str]]:
    """The history's metric, and every metric that was measured."""
    history, rows = facts.history, []
    if history is not None and (value := _last_value(history, facts.settings)) is not None:
        rows.append([f"{history.metric} (validation)", number(history.dense), number(value)])
    for metric, split, value in _results(facts):
        dense = facts.metrics.get(f"dense_{split}_{metric}")
        if split == "test" or dense is not None or not rows:
            rows.append([f"{metric} ({split})", number(dense), number(value)])
    return rows


def _class_of(model: PreTrainedModel) -> str:
    """The class of Transformers that a model is of, itself or by inheritance."""
    names = (kind.__name__ for kind in type(model).__mro__ if getattr(transformers, kind.__name__, None) is kind)
    return next(names, type(model).__name__)


def _how_to_load(name: str, facts: Facts) -> str:
    kind = _class_of(facts.model)
    lines = [f"from transformers import {kind}", "", f"model = {kind}.from_pretrained({json.dumps(name)})"]
    if not facts.needs_hf_prune:
        return _code("\n".join(lines), "python") + "\n\nIt is an ordinary model: hf_prune is not needed."
    why = "its files leave zeros out" if facts.compressed else "no config of its family can say its shapes"
    lines.insert(0, "import hf_prune  # which tells from_pretrained how to read it")
    return _code("\n".join(lines), "python") + f"\n\nThat needs `pip install hf_prune`, because {why}."


def _size_and_speed(facts: Facts) -> str:
    report, costs = facts.report, facts.costs
    dense, pruned = costs.get("dense"), costs.get("pruned")
    rows = [["", "dense", "pruned"]]
    parameters = sum(parameter.numel() for parameter in facts.model.parameters())
    rows.append(["parameters", f"{dense.parameters:,}" if dense else "", f"{parameters:,}"])
    rows.append(["of them zero", "", f"{report.model_zeros:,} ({report.model_sparsity:.2%})"])
    size = next(facts.model.parameters()).element_size()
    rows.append(["MB of weights", number(dense.parameters * size / 1e6) if dense else "", number(facts.bytes / 1e6)])
    if dense and pruned and dense.flops is not None and pruned.flops is not None:
        rows.append(["GFLOPs of a forward pass", number(dense.flops / 1e9), number(pruned.flops / 1e9)])
    if dense and pruned and dense.seconds is not None and pruned.seconds is not None:
        where = "CPU" if facts.model.device.type == "cpu" else torch.cuda.get_device_name(facts.model.device)
        rows.append([f"ms of a forward pass ({where})", number(1e3 * dense.seconds), number(1e3 * pruned.seconds)])
    return f"{_markdown(rows)}\n\n{_what_zeros_are_worth(facts)}"


def _what_zeros_are_worth(facts: Facts) -> str:
    granularity = None if facts.settings is None else facts.settings.granularity
    if granularity is not None and granularity.kinds and not _is_shrunk(facts):
        if facts.report.zeros:
            return "Pruned structures are still there, as zeros: `hf_prune.shrink(model)` removes them."
        return f"None of its {_units(facts)} is zero: what was pruned has been removed, or nothing was."
    if _is_shrunk(facts) and not facts.report.model_zeros:
        return "Pruned structures were removed, which makes the model smaller and faster."
    alone = "Zeros alone make nothing faster or smaller: the model takes the time and the memory of the dense one"
    return f"{alone}, unless {(granularity or Unstructured()).pays_if}."


def _sparsity(report: SparsityReport) -> str:
    rows = [["module", "shape", "zeros", "sparsity"]]
    for m in report.modules:
        rows.append([f"`{m.name}`", " × ".join(map(str, m.shape)), f"{m.zeros:,}", f"{m.sparsity:.4f}"])
    total = sum(m.total for m in report.modules)
    zeros = sum(m.zeros for m in report.modules)
    rows.append(["all of these", f"{total:,}", f"{zeros:,}", f"{zeros / max(total, 1):.4f}"])
    rows.append(["whole model", f"{report.model_total:,}", f"{report.model_zeros:,}", f"{report.model_sparsity:.4f}"])
    return f"<details><summary>By module</summary>\n\n{_markdown(rows)}\n\n</details>"


def _how_made(facts: Facts) -> str:
    packages = ["hf_prune", "transformers", "torch", "accelerate"]
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    parts = [_code(command(), "bash"), f"With {versions}, Python {platform.python_version()}."]
    if facts.settings is not None:
        asked = _code(facts.settings.config.without_defaults(), "json")
        parts.append(f"`pruning_config.json`, without defaults:\n\n{asked}")
    return "\n\n".join(parts)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = [f"| {' | '.join(cells)} |" for cells in rows]
    rule = "|" + "|".join([" --- "] + [" ---: "] * (len(rows[0]) - 1)) + "|"
    return "\n".join([head, rule, *body])


def _code(text: str, language: str) -> str:
    return f"```{language}\n{text}\n```"
