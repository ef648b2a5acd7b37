"""How sparse each layer should be: as its sensitivity has it, as all weights of the model compete, or all alike?

python recipes/sensitivity.py tinystories
python recipes/sensitivity.py vit --criteria activation+granularity=neuron --sparsities 0.5 0.75

One sweep measures the sensitivity of each layer to a criterion, on validation data. Then the dense model is pruned in
one cut to each sparsity, by the scopes and by both rules of the file, and measured on test data, with nothing trained
afterwards. Data and dense model are those of the study (`STUDY` of the recipe).
"""

import copy
import csv
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import set_seed

import tinystories
import vit
from common.arguments import parse_task, split_settings
from common.dense import dense_model
from common.tables import markdown
from hf_prune import PruningConfig, prune, sensitivity

RECIPES: dict[str, Any] = {"tinystories": tinystories, "vit": vit}


@dataclass
class SensitivityArguments:
    """What is compared."""

    criteria: list[str] = field(
        default_factory=lambda: ["magnitude", "fisher", "activation+granularity=neuron", "fisher+granularity=neuron"],
        metadata={"help": "With other fields of PruningConfig behind them, as in fisher+granularity=neuron."},
    )
    levels: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75, 0.9], metadata={"help": "Of the sweep."})
    sparsities: list[float] = field(default_factory=lambda: [0.5, 0.75], metadata={"help": "Of the whole model."})


def ways_of(settings: dict[str, Any], file: Path) -> dict[str, dict[str, Any]]:
    """Name → fields of the config that say how sparsities are divided; structures know no outliers."""
    scopes = ("layer", "global") if "granularity" in settings else ("layer", "global", "owl")
    ways: dict[str, dict[str, Any]] = {scope: {"scope": scope} for scope in scopes}
    return ways | {"@FILE": {"layer_sparsity": f"@{file}"}, "@FILE:least": {"layer_sparsity": f"@{file}:least"}}


def main() -> None:
    """Sweeps once for each criterion, prunes by each way, prints a table for each criterion."""
    name, wanted, script, training = parse_task(SensitivityArguments, RECIPES, "sensitivity", left_out=["budget"])
    folder = Path(str(training.output_dir))
    configs = {}
    for row, criterion in enumerate(wanted.criteria):
        chosen, settings = split_settings(criterion)
        configs[criterion] = ({"criterion": chosen, **settings}, folder / f"{row}.json")
        PruningConfig(sparsity=0.5, **configs[criterion][0])  # or an error now

    set_seed(training.seed)
    task = RECIPES[name].load_task(script, training)
    dense = dense_model(task, script, training)
    metric = f"eval_{training.metric_for_best_model}"
    measuring = 0.0

    def measure(model: nn.Module, data: Any = None) -> float:
        nonlocal measuring
        began = time.monotonic()
        value: float = task.trainer(model, training).evaluate(data)[metric]
        measuring += time.monotonic() - began
        return value

    measure.__name__ = str(training.metric_for_best_model)
    folder.mkdir(parents=True, exist_ok=True)
    texts, rows = [], []
    of_dense = measure(dense, task.test)
    for criterion, (settings, file) in configs.items():
        batch_size = training.per_device_train_batch_size
        began, measuring = time.monotonic(), 0.0
        report = sensitivity(
            dense,
            PruningConfig(sparsity=0.5, **settings),
            task.samples(batch_size, seed=0),
            levels=wanted.levels,
            metric=measure,
            greater_is_better=bool(training.greater_is_better),
        )
        seconds = time.monotonic() - began
        count = 1 + sum(value is not None for row in report.rows for value in row.values)
        said = f"{criterion}: {count} measurements, of {seconds:.1f} s in all {measuring:.1f} s in the metric alone."
        print(said, flush=True)
        report.save(file)
        report.plot(file.with_suffix(".png"))
        found: dict[str, list[str]] = {}
        for way, fields in ways_of(settings, file).items():
            for sparsity in wanted.sparsities:
                model = copy.deepcopy(dense)
                config = PruningConfig(sparsity=sparsity, **settings, **fields)
                reached = prune(model, config, task.samples(batch_size, seed=0)).sparsity
                value = measure(model, task.test)
                found.setdefault(way, []).append(f"{value:.3f}")
                rows.append([criterion, way, sparsity, reached, value])
        table = "\n".join(markdown(criterion, [str(sparsity) for sparsity in wanted.sparsities], found))
        texts.append(f"{said}\n\n{table}\n")
    text = f"Test {metric.removeprefix('eval_')}; dense: {of_dense:.3f}.\n\n" + "\n".join(texts)
    (folder / "tables.md").write_text(text, encoding="utf-8")
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as csv_file:
        csv.writer(csv_file).writerows([["criterion", "way", "sparsity", "reached", metric], *rows])
    print(f"\n{text}\nTables, sensitivities and heat maps are in {folder}.")


if __name__ == "__main__":
    main()
