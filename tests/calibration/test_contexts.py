import contextlib
import copy
import random

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

from hf_prune import PruningConfig, prune
from hf_prune.calibration.contexts import keep_random_state, unpartitioned, whole_on_error
from hf_prune.calibration.statistics import calibrate
from hf_prune.weights.targets import find_targets
from tests.tiny import TOKENS


def draw():
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random() for _ in range(3)]


def seed(value):
    torch.manual_seed(value)
    np.random.seed(value)
    random.seed(value)


@pytest.mark.parametrize("error", [(), (KeyError,)])
def test_random_states_are_given_back_also_after_an_error(error):
    seed(0)
    expected = draw()
    seed(0)
    with contextlib.suppress(*error), keep_random_state(torch.device("cpu")):
        assert draw() == expected
        seed(1)
        if error:
            raise KeyError
    assert draw() == expected


@pytest.mark.parametrize("error", [(), (KeyError,)])
def test_deepspeed_divides_no_model_meanwhile(error):
    held = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    assert is_deepspeed_zero3_enabled()
    with contextlib.suppress(KeyError), unpartitioned():
        assert not is_deepspeed_zero3_enabled()
        for each in error:
            raise each
    assert is_deepspeed_zero3_enabled()
    del held
    with unpartitioned():
        assert not is_deepspeed_zero3_enabled()


def test_a_model_is_whole_after_an_error():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    before, tensors = dict(model.named_modules()), {**dict(model.named_parameters()), **dict(model.named_buffers())}

    def take_apart(error=None):
        model[0].weight = nn.Parameter(torch.ones(2, 2))
        model[0].out_features = 2
        model[1].running_mean = torch.ones(2)
        model[1].extra = True
        model[2] = nn.Identity()
        if error is not None:
            raise error

    with pytest.raises(ValueError, match="half done"), whole_on_error(model):
        take_apart(ValueError("half done"))
    assert dict(model.named_modules()) == before
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert after.keys() == tensors.keys()
    assert all(after[name] is tensors[name] for name in tensors)
    assert model[0].out_features == 3
    assert not hasattr(model[1], "extra")

    with whole_on_error(model):
        take_apart()
    assert isinstance(model[2], nn.Identity)


@pytest.mark.parametrize("scaled", [False, True])
def test_weights_that_rwkv_divides_in_evaluation_mode_stay_as_they_are(scaled):
    """And it is differentiated: the gradient is that of training mode, where nothing is divided."""
    torch.manual_seed(0)
    config = transformers.RwkvConfig(**TOKENS, context_length=8, hidden_size=8, num_hidden_layers=4, rescale_every=2)
    model = transformers.RwkvForCausalLM(config).eval()
    ids = torch.randint(1, 60, (3, 6))
    data = {"input_ids": ids, "labels": ids}
    if scaled:  # Someone else has evaluated it.
        model(**data)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    targets = find_targets(model)
    found = calibrate(model, targets, [data], ["input_norm", "gradient", "squared_gradient"], 3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (model.rwkv.layers_are_rescaled, model.config.rescale_every) == (scaled, 2)
    cut = copy.deepcopy(model)
    prune(cut, PruningConfig(sparsity=0.5, criterion="sparsegpt", calibration_samples=3), [data])
    assert (cut.rwkv.layers_are_rescaled, cut.config.rescale_every) == (scaled, 2)
    model.config.use_cache = False
    model.train(not scaled)
    model(**data).loss.backward()
    for name, target in targets.items():
        torch.testing.assert_close(found["gradient"][name], target.weight.grad)
