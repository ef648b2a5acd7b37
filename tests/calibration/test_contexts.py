import contextlib
import random

import numpy as np
import pytest
import torch
from torch import nn

from hf_prune.calibration.contexts import keep_random_state, whole_on_error


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
