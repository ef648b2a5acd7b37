"""A criterion of neurons that hf_prune does not have: how much what goes into a projection fluctuates.

Source: An et al. 2024, "Fluctuation-based Adaptive Structured Pruning for Large Language Models", arXiv 2312.11983.
"""

from collections.abc import Callable

import torch
from prose import batches_of
from torch import nn
from transformers import PreTrainedModel

from hf_prune.criteria import needs
from hf_prune.structures.criteria import StructureInputs


@torch.no_grad()
def fluctuation_of(
    model: PreTrainedModel, calibration: torch.Tensor, *, standardized: bool
) -> Callable[[StructureInputs], torch.Tensor]:
    """The criterion `Var(x_j) · ‖W_:j‖²` of the neurons of a model with Llama's layout.

    Args:
        model: The model.
        calibration: `[samples, length]` tokens.
        standardized: Whether scores of a layer are brought to mean 0 and variance 1 and compete with those of others,
            as in the paper; else each layer loses the same share.
    """
    moments: dict[str, list[torch.Tensor]] = {}
    hooks = []
    for index, layer in enumerate(model.model.layers):

        def add(module: nn.Module, inputs: tuple[torch.Tensor], name: str = f"model.layers.{index}.mlp") -> None:
            x = inputs[0].flatten(0, -2).double()
            found = [torch.tensor(float(len(x))), x.sum(0), x.square().sum(0)]
            moments[name] = [a + b for a, b in zip(moments[name], found, strict=True)] if name in moments else found

        hooks.append(layer.mlp.down_proj.register_forward_pre_hook(add))
    for batch in batches_of(calibration):
        model(**batch)
    for hook in hooks:
        hook.remove()
    scores = {}
    for name, (count, total, squares) in moments.items():
        variance = squares / count - (total / count).square()
        score = variance * model.get_parameter(f"{name}.down_proj.weight").double().square().sum(0)
        scores[name] = (score - score.mean()) / score.std() if standardized else score

    @needs(kinds=("neuron",), scope="global" if standardized else "layer")
    def fluctuation(inputs: StructureInputs) -> torch.Tensor:
        return scores[inputs.name]

    return fluctuation
