"""Endings: what comes after the last step may fail, and the training is not lost for it."""

import contextlib
import logging
from collections.abc import Iterator

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def logged_on_error(consequence: str) -> Iterator[None]:
    """Logs an error with its trace, under a sentence that says what comes of it, instead of raising it."""
    try:
        yield
    except Exception:
        logger.error("%s", consequence, exc_info=True)
