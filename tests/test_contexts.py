import contextlib
import random

import numpy as np
import pytest
import torch

from hf_prune.contexts import keep_random_state


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
