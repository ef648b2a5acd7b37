"""Other libraries that make a language model smaller without training, each called as its guide has it."""

import copy
from collections.abc import Callable

import torch
from prose import batches_of
from transformers import PreTrainedModel


def by_optipfair(model: PreTrainedModel, keep: float, calibration: torch.Tensor, options: list[str]) -> None:
    import optipfair
    from optipfair.pruning.depth import analyze_layer_importance

    total, layers = model.num_parameters(), model.model.layers
    if options[0] == "depth":
        each = sum(parameter.numel() for parameter in layers[0].parameters())
        count = max(1, round((1 - keep) * total / each))
        scores = analyze_layer_importance(model, batches_of(calibration), show_progress=False)
        lowest = sorted(scores, key=lambda layer: scores[layer])[:count]
        optipfair.prune_model(model, "DEPTH", layer_indices=lowest, depth_pruning_percentage=None, show_progress=False)
        return
    of_neurons = sum(p.numel() for layer in layers for p in layer.mlp.parameters())
    optipfair.prune_model(
        model,
        "MLP_GLU",
        neuron_selection_method="MAW",
        pruning_percentage=100 * (1 - keep) * total / of_neurons,
        dataloader=batches_of(calibration) if "data" in options else None,
        show_progress=False,
    )


def by_torch_pruning(model: PreTrainedModel, keep: float, calibration: torch.Tensor, options: list[str]) -> None:
    import torch_pruning

    importances: dict[str, Callable[[], object]] = {
        "magnitude": torch_pruning.importance.GroupMagnitudeImportance,
        "taylor": torch_pruning.importance.GroupTaylorImportance,
    }
    if options[0] == "taylor":
        for batch in batches_of(calibration):
            (model(**batch).loss / len(calibration)).backward()
    total = model.num_parameters()
    neurons = {projection for layer in model.model.layers for projection in (layer.mlp.gate_proj, layer.mlp.up_proj)}
    others = [m for m in model.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Embedding)) and m not in neurons]

    def left_at(ratio: float) -> PreTrainedModel:
        tried = copy.deepcopy(model)
        for mine, its in zip(tried.parameters(), model.parameters(), strict=True):
            mine.grad = its.grad
        here = dict(zip(model.modules(), tried.modules(), strict=True))
        pruner = torch_pruning.pruner.BasePruner(
            tried,
            example_inputs=calibration[:1],
            importance=importances[options[0]](),
            global_pruning="global" in options,
            pruning_ratio=ratio,
            ignored_layers=[here[module] for module in others],
            output_transform=lambda out: out.logits,
        )
        pruner.step()
        return tried

    low, high = 0.0, 0.9
    for _ in range(7):
        middle = (low + high) / 2
        low, high = (middle, high) if left_at(middle).num_parameters() > keep * total else (low, middle)
    smaller = left_at((low + high) / 2)
    vars(model).update(vars(smaller))
    model.zero_grad()


PRUNERS = {"optipfair": by_optipfair, "torch-pruning": by_torch_pruning}
