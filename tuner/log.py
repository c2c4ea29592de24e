"""Warnings of our packages, shown where the progress of a study is shown."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PACKAGES = ("cluster", "studies", "perf_model", "search_spaces", "tuner")


class _Forward(logging.Handler):
    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._note = note

    def emit(self, record: logging.LogRecord) -> None:
        """Hand the message on."""
        self._note(f"{record.levelname.lower()}: {record.getMessage()}")


@contextmanager
def warnings_to(note: Callable[[str], None]) -> Iterator[None]:
    """Inside the block, warnings and errors that our packages log go to `note` instead of the screen."""
    handler = _Forward(note)
    loggers = [logging.getLogger(name) for name in PACKAGES]
    before = [logger.propagate for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, propagate in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.propagate = propagate
