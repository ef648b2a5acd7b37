from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import Trainer

from tests.training import trainer_factory


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """Builds Trainers: see `trainer_factory`."""
    return trainer_factory(tmp_path)
