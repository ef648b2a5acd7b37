import gc

import pytest
import torch
from torch import nn

from hf_prune.weights.gradient_hooks import GradientHooks, paused


def setup() -> tuple[dict[str, nn.Parameter], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    weights = {name: nn.Parameter(torch.randn(5, 3)) for name in "ab"}
    return weights, {name: torch.rand(5, 3) > 0.5 for name in "ab"}


def gradients(weights: dict[str, nn.Parameter], times: int = 1) -> dict[str, torch.Tensor]:
    """Of the sum of squares, accumulated."""
    for weight in weights.values():
        weight.grad = None
    for _ in range(times):
        sum(weight.square().sum() for weight in weights.values() if weight.requires_grad).backward()
    return {name: weight.grad for name, weight in weights.items()}


def test_gradients_of_pruned_weights_are_zero_and_the_others_are_what_they_were():
    weights, masks = setup()
    hooks, dense = GradientHooks(), gradients(weights, times=2)
    hooks.hold_(weights, masks)
    held = gradients(weights, times=2)
    assert all(torch.equal(held[name], dense[name] * masks[name]) for name in weights)


def test_hooks_are_replaced_and_released():
    weights, masks = setup()
    hooks, dense = GradientHooks(), gradients(weights)
    hooks.hold_(weights, masks)
    hooks.hold_(weights, {name: ~mask for name, mask in masks.items()})
    held = gradients(weights)
    assert all(torch.equal(held[name], dense[name] * ~masks[name]) for name in weights)
    hooks.release_(weights.values())
    assert all(torch.equal(gradients(weights)[name], dense[name]) for name in weights)


def test_a_weight_that_is_unfrozen_has_no_hook_yet():
    weights, masks = setup()
    weights["b"].requires_grad_(False)
    hooks = GradientHooks()
    assert not hooks.are_on(weights, masks)
    hooks.hold_(weights, masks)
    assert hooks.are_on(weights, masks)
    weights["b"].requires_grad_(True)
    assert not hooks.are_on(weights, masks)


def test_another_takes_over_what_is_left():
    weights, masks = setup()
    left, dense = GradientHooks(), gradients(weights)
    left.hold_(weights, masks)
    GradientHooks().release_(weights.values())
    assert all(torch.equal(gradients(weights)[name], dense[name]) for name in weights)


def test_hooks_end_with_their_owner():
    weights, masks = setup()
    hooks, dense = GradientHooks(), gradients(weights)
    hooks.hold_(weights, masks)
    del hooks
    gc.collect()
    assert all(torch.equal(gradients(weights)[name], dense[name]) for name in weights)


@pytest.mark.parametrize("in_zero", [False, True])
def test_hooks_can_be_paused(in_zero):
    weights, masks = setup()
    if in_zero:
        for weight in weights.values():
            weight._hp_mapping = None
    hooks, dense = GradientHooks(), gradients(weights)
    hooks.hold_(weights, masks)
    with paused():
        assert all(torch.equal(gradients(weights)[name], dense[name]) for name in weights)
    assert all(torch.equal(gradients(weights)[name], dense[name] * masks[name]) for name in weights)
