"""Candidates chosen before there is a place for them.

With many trials in flight a place becomes free every second or so, and choosing takes about as long: the place would
wait, and a pass over hundreds of candidates would choose one. So a few are chosen jointly while nothing else waits;
those that are chosen after them count them as running. What is in stock knows nothing of the few trials that were told
since, of very many. It is in memory alone: a coordinator that dies loses thoughts, no trial.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace

from studies.errors import SpaceExhausted
from studies.records import TrialRecord, TrialStatus
from studies.screen import Choice, Request

SHARE = 32
"""Trials in flight for each candidate in stock: fewer trials than these have none, and every choice knows all."""

MOST = 8

Choosing = Generator[None, None, list[Choice]]


class Stock:
    """At most `MOST` choices for a study with `in_flight` trials at once."""

    def __init__(self, in_flight: int) -> None:
        self.size = min(MOST, in_flight // SHARE)
        self._choices: list[Choice] = []
        self._choosing: Choosing | None = None

    def step(self, begin: Callable[[], Choosing]) -> bool:
        """Choose on, for some tens of milliseconds; `begin` anew where less than half is left. False: enough is there.

        Nor is there anything to do at the end of the space.
        """
        if self._choosing is None:
            if 2 * len(self._choices) >= self.size:
                return False
            self._choosing = begin()
        try:
            next(self._choosing)
        except StopIteration as ended:
            self._choices += ended.value
            self._choosing = None
        except SpaceExhausted:
            self._choosing = None
            return False
        return True

    def take(self, request: Request) -> list[Choice]:
        """At most `request.count` choices; where none is left, what is being chosen is chosen to its end.

        Choices that have no room now, or were tried in another way, are dropped.
        """
        while self._choosing is not None and not self._choices:
            self.step(_never)
        able = [c for c in self._choices if c.key not in request.tried and request.has_room_for(c.candidate.config)]
        self._choices = able[request.count :]
        return able[: request.count]

    def beside(self, request: Request) -> Request:
        """`request` for as many as the stock is short of: what is in stock counts as running."""
        running = [_running(request.number + place, choice) for place, choice in enumerate(self._choices)]
        return replace(
            request,
            number=request.number + len(running),
            trials=(*request.trials, *running),
            tried=request.tried | {choice.key for choice in self._choices},
            count=self.size - len(running),
        )


def _never() -> Choosing:
    raise AssertionError("what is being chosen was begun before")


def _running(number: int, choice: Choice) -> TrialRecord:
    return TrialRecord(
        number=number,
        status=TrialStatus.RUNNING,
        candidate=choice.candidate,
        key=choice.key,
        origin=choice.origin,
        prediction=choice.prediction,
        outcome=None,
        values=None,
    )
