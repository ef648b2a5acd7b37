"""Routed tokens: which experts a call of fused or listed experts gives which tokens, and what they make of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Routed:
    """What one call of experts was given, token by token and expert by expert.

    Attributes:
        tokens: How many tokens there are.
        numbers: `[pairs]`, the expert of each pair of an expert and a token.
        owners: `[pairs]`, the token.
        outputs: The experts' module → the three of pairs for which outputs are computed: expert, token, and
            `g · ‖f(x)‖₂` in float32.
    """

    tokens: int
    numbers: torch.Tensor
    owners: torch.Tensor
    outputs: Callable[[nn.Module], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]

    @classmethod
    def of(cls, experts: nn.Module, given: Sequence[Any], count: int) -> "Routed | None":
        """What experts were called with, of those ways in which Transformers calls them; None if it is none of them.

        Args:
            experts: The experts' module.
            given: The arguments: hidden states, `[tokens, width]`; then either the chosen experts and their weights,
                `[tokens, chosen]` each; or a mask, `[tokens, (1,) experts]`, and weights, `[tokens, 1]` or
                `[tokens, experts]`; or nothing, where the states are those of each expert, `[experts · tokens,
                width]`, scaled already and zero where it is not chosen.
            count: How many experts there are.
        """
        tensors = [each for each in given if isinstance(each, torch.Tensor)]
        if not tensors:
            return None
        states = tensors[0].reshape(-1, tensors[0].shape[-1])
        if len(tensors) == 1:
            # A block that chooses experts itself is called with states alone too, but holds no weights of them.
            are_fused = any(parameter.ndim == 3 for parameter in experts.parameters(recurse=False))
            if not are_fused or len(states) % count:
                return None
            return _of_scaled(states, count)
        if len(tensors) != 3 or tensors[1].is_floating_point() or not tensors[2].is_floating_point():
            return None
        chosen, weights = (each.reshape(len(states), -1) for each in tensors[1:])
        if chosen.shape == weights.shape and (chosen.shape[1] < count or int(chosen.max()) > 1):
            return _of_chosen(states, chosen, weights, count)
        return _of_mask(states, chosen, weights) if chosen.shape[1] == count else None


def _of_chosen(states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, count: int) -> Routed:
    # Under expert parallelism, experts of other processes have numbers behind those of this one.
    owners, places = (chosen < count).nonzero(as_tuple=True)
    numbers = chosen[owners, places]

    def outputs(experts: nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        one = torch.ones_like(numbers[:, None], dtype=weights.dtype)
        made = experts.forward(states[owners], numbers[:, None], one)
        return numbers, owners, weights[owners, places].float().abs() * made.float().norm(dim=-1)

    return Routed(len(states), numbers, owners, outputs)


def _of_mask(states: torch.Tensor, mask: torch.Tensor, weights: torch.Tensor) -> Routed:
    owners, numbers = mask.nonzero(as_tuple=True)

    def outputs(experts: nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        only = torch.nn.functional.one_hot(numbers, mask.shape[1]).to(mask.dtype)
        made = experts.forward(states[owners], only[:, None], torch.ones_like(weights[owners, :1]))
        gates = weights.expand(-1, mask.shape[1])[owners, numbers]
        return numbers, owners, gates.float().abs() * made.float().norm(dim=-1)

    return Routed(len(states), numbers, owners, outputs)


def _of_scaled(states: torch.Tensor, count: int) -> Routed:
    given = states.view(count, -1, states.shape[-1])
    numbers, owners = given.any(-1).nonzero(as_tuple=True)

    def outputs(experts: nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        made = experts.forward(states).view(count, -1, states.shape[-1])
        return numbers, owners, made[numbers, owners].float().norm(dim=-1)

    return Routed(given.shape[1], numbers, owners, outputs)
