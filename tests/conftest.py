import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Trainer

from tests.trainers import trainer_factory

# Two test processes on two cores: with more threads than one each, they would wait for each other. So would those
# that tests start, and DeepSpeed would look for GPUs.
torch.set_num_threads(1)
os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def pytest_collection_finish() -> None:
    """Each training collects garbage: what was imported, and the tests themselves, need not be looked at each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """Builds Trainers: see `trainer_factory`."""
    return trainer_factory(tmp_path)
