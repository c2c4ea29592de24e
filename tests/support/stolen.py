"""Whether this machine had its processor while clocks were held against each other.

A virtual machine waits while its host gives the processor to others, which it counts as stolen: nothing in it can be
punctual then, and a test of punctuality tells nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import psutil
import pytest

STOLEN_LIMIT = 0.05
"""Share of the processor time that was wanted; a calm virtual machine has 0 to 2%."""


class Spent(NamedTuple):
    """Processor time of all cores since the start, in seconds: worked, and taken away by the host."""

    worked_s: float
    stolen_s: float

    @classmethod
    def now(cls) -> Spent:
        """As the kernel counts it; nothing is stolen where it does not count that."""
        times = psutil.cpu_times()
        idle_s = times.idle + getattr(times, "iowait", 0.0)
        stolen_s = getattr(times, "steal", 0.0)
        guests_s = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # part of user and nice already
        return cls(worked_s=sum(times) - idle_s - stolen_s - guests_s, stolen_s=stolen_s)

    def stolen_until(self, later: Spent) -> float:
        """Share of what was wanted between here and `later`."""
        stolen_s = later.stolen_s - self.stolen_s
        wanted_s = later.worked_s - self.worked_s + stolen_s
        return stolen_s / wanted_s if wanted_s > 0 else 0.0


@contextmanager
def judged_on_a_calm_machine(test: str, now: Callable[[], Spent] = Spent.now) -> Iterator[None]:
    """An assertion that fails inside is a skip where more than `STOLEN_LIMIT` of the processor was stolen meanwhile."""
    before = now()
    try:
        yield
    except AssertionError as error:
        share = before.stolen_until(now())
        if share <= STOLEN_LIMIT:
            raise
        failure = (str(error) or "an assertion").splitlines()[0]
        pytest.skip(
            f"{test}: the host took {share:.0%} of the processor away meanwhile (at most {STOLEN_LIMIT:.0%} may be for "
            f"a test of timing); run it on a calmer machine. It had failed: {failure}"
        )
