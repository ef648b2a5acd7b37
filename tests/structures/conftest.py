from collections.abc import Callable, Iterator

import pytest

from hf_prune import describe_family
from hf_prune.structures.families import FAMILIES


@pytest.fixture
def described() -> Iterator[Callable[..., None]]:
    """Describes families, which are as they were afterwards."""
    before = dict(FAMILIES)
    yield describe_family
    FAMILIES.clear()
    FAMILIES.update(before)
