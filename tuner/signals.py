"""A clean stop on SIGINT and SIGTERM."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_Handler = Callable[[int, FrameType | None], object] | int | None


class StopRequest:
    """Inside its `with` block the first SIGINT or SIGTERM is a request to stop, the second a `KeyboardInterrupt`.

    Called, it says whether a stop was requested; `signal_number` says by which signal.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._before: dict[signal.Signals, _Handler] = {}

    def __call__(self) -> bool:
        """True once a stop was requested."""
        return self.signal_number is not None

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self():
            raise KeyboardInterrupt
        self.signal_number = number
