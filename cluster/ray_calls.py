"""Calls to actors that are under way: their answers are handed on in a later turn, and nobody waits for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray

ANSWER_LIMIT_S = 3.0
"""An answer that is ready is fetched within this time, or its actor counts as lost."""

Then = Callable[[Any], None]
Lost = Callable[[ray.exceptions.RayError], None]


@dataclass(kw_only=True)
class _Gathering:
    """Several calls whose answers are handed on together, those of lost actors left out."""

    then: Callable[[dict[str, Any]], None]
    until_s: float
    missing: set[str]
    answers: dict[str, Any] = field(default_factory=dict)

    def take(self, name: str, answer: Any) -> None:
        self.missing.discard(name)
        self.answers[name] = answer

    def lose(self, name: str, _error: ray.exceptions.RayError) -> None:
        self.missing.discard(name)


class Calls:
    """Calls under way; `turn` hands on what has been answered."""

    def __init__(self) -> None:
        self._pending: dict[Any, tuple[Then, Lost]] = {}
        self._gatherings: list[_Gathering] = []

    def add(self, reference: Any, then: Then, lost: Lost) -> None:
        """Call `then` with the value of `reference`, or `lost` with the error of its actor."""
        self._pending[reference] = (then, lost)

    def gather(
        self, references: Mapping[str, Any], then: Callable[[dict[str, Any]], None], limit_s: float = ANSWER_LIMIT_S
    ) -> None:
        """Call `then` with the values by name when all have come or are lost, or with what there is after `limit_s`."""
        gathering = _Gathering(then=then, until_s=time.monotonic() + limit_s, missing=set(references))
        self._gatherings.append(gathering)
        for name, reference in references.items():
            self.add(reference, _bound(gathering.take, name), _bound(gathering.lose, name))

    def clear(self) -> None:
        """Forget all calls: their answers are no longer wanted."""
        self._pending.clear()
        self._gatherings.clear()

    def turn(self) -> None:
        """Hand on what has been answered."""
        if self._pending:
            done, _ = ray.wait(list(self._pending), num_returns=len(self._pending), timeout=0, fetch_local=False)
            for reference in done:
                self._answer(reference)
        for gathering in tuple(self._gatherings):
            late = time.monotonic() >= gathering.until_s
            if gathering in self._gatherings and (late or not gathering.missing):
                self._gatherings.remove(gathering)
                gathering.then(gathering.answers)

    def _answer(self, reference: Any) -> None:
        if reference not in self._pending:  # an earlier answer of this turn has made all others unwanted
            return
        then, lost = self._pending.pop(reference)
        try:
            value = ray.get(reference, timeout=ANSWER_LIMIT_S)
        except ray.exceptions.RayError as error:
            lost(error)
            return
        then(value)


def _bound(function: Callable[[str, Any], None], name: str) -> Callable[[Any], None]:
    return lambda value: function(name, value)
