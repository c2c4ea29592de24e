"""The highest request rate that a deployment serves within every SLO, by bisection on the deployment as it stands.

    bracket = Bracket(search=workload.rate_search, first=expected)
    while (rate := bracket.next_rate()) is not None:
        bracket = bracket.told(rate, met=...)

Rates are bisected by their logarithms, since what 1/s and 2/s have between them, 0.1/s and 0.2/s have too. The first
rate is the one that is expected; from there the interval is doubled or halved until it has both ends. Every end is a
rate that was run, never one that was worked out. A server that meets a rate is taken to meet every lower one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cluster.load.driver import LoadRun
from cluster.load.measure import LoadMeasurement, LoadOutcome, measure
from search_spaces.metrics import ServingMetrics
from search_spaces.outcome import Failure, FailureReason, Probe
from search_spaces.problem import Slo
from search_spaces.workload import Load, RateSearch

STEP = 2.0
MOST_PROBES = 24
"""A search over six decades with a tolerance of 1% needs 21; more says that it does not end."""
SEED_STEP = 100_003
"""Seeds of the runs of one search lie so far apart: runs of neighbouring trials do not share theirs."""


@dataclass(frozen=True, kw_only=True)
class Bracket:
    """What is known: `met` is the highest rate that was met, `missed` the lowest that was not; None for none yet."""

    search: RateSearch
    first: float | None = None
    met: float | None = None
    missed: float | None = None

    def next_rate(self) -> float | None:
        """The rate to run next; None where the interval is narrow enough or an end of the search is reached."""
        lowest, highest = self.search.lowest, self.search.highest
        if self.met is None and self.missed is None:
            middle = math.sqrt(lowest * highest)
            return min(highest, max(lowest, self.first or middle))
        if self.missed is None:
            return None if self.met is None or self.met >= highest else min(highest, self.met * STEP)
        if self.met is None:
            return None if self.missed <= lowest else max(lowest, self.missed / STEP)
        narrow = self.missed <= self.met * (1 + self.search.tolerance)
        return None if narrow else math.sqrt(self.met * self.missed)

    def told(self, rate: float, *, met: bool) -> Bracket:
        """What is known after `rate` was run."""
        if met:
            return replace(self, met=max(rate, self.met or rate))
        return replace(self, missed=min(rate, self.missed or rate))


@dataclass(frozen=True, kw_only=True)
class RateRun:
    """A search to be made: `run` is its pattern (its load is replaced), `first` the rate that is expected.

    `run.limit_s` limits the whole search; what has been found by then counts. `prepare` is called before each run but
    the first, and returns a Failure where the deployment could not be made ready for it.
    """

    run: LoadRun
    search: RateSearch
    slos: Sequence[Slo]
    devices: int
    price_per_hour: float
    first: float | None = None
    prepare: Callable[[], Failure | None] = lambda: None


def search_rate(wanted: RateRun) -> LoadOutcome:
    """The measurement at the highest rate that met every SLO, with every run as a probe.

    Where no rate did, it is that at the lowest rate which gave one. A client that is late twice at one rate, and the
    end of the time, end the search with what was found; what else fails without being a matter of the rate fails it
    all.
    """
    found = _Found(wanted)
    began_s = time.monotonic()
    while (rate := found.bracket.next_rate()) is not None and len(found.probes) < MOST_PROBES:
        left_s = wanted.run.limit_s - (time.monotonic() - began_s)
        if left_s <= 0:
            break
        unready = wanted.prepare() if found.probes else None
        if not found.take(rate, unready or _run(wanted, rate, len(found.probes), left_s)):
            break
    return found.outcome()


def _run(wanted: RateRun, rate: float, index: int, left_s: float) -> LoadOutcome:
    path = wanted.run.timings_path
    run = replace(
        wanted.run,
        load=Load(arrival=wanted.run.load.arrival, value=rate),
        seed=wanted.run.seed + SEED_STEP * index,
        limit_s=left_s,
        timings_path=path.with_stem(f"{path.stem}-{index}"),
    )
    return measure(run, slos=wanted.slos, devices=wanted.devices, price_per_hour=wanted.price_per_hour)


class _Found:
    """What the runs of a search have given so far."""

    def __init__(self, wanted: RateRun) -> None:
        self.bracket = Bracket(search=wanted.search, first=wanted.first)
        self.probes: list[Probe] = []
        self._wanted = wanted
        self._measured: list[tuple[Probe, LoadMeasurement]] = []
        self._failure: Failure | None = None
        self._fatal: Failure | None = None

    def take(self, rate: float, outcome: LoadOutcome) -> bool:
        """Take the outcome of the run at `rate`; False where the search is to end."""
        if isinstance(outcome, LoadMeasurement):
            met = meets(outcome.metrics, self._wanted.slos)
            self._measured.append((Probe(request_rate=rate, met=met, metrics=outcome.metrics), outcome))
            self.probes.append(self._measured[-1][0])
            self.bracket = self.bracket.told(rate, met=met)
            return True
        return self._take_failure(rate, outcome)

    def _take_failure(self, rate: float, failure: Failure) -> bool:
        self._failure = failure
        if failure.reason is FailureReason.REQUESTS_FAILED:
            self.probes.append(Probe(request_rate=rate, met=False, detail=failure.detail))
            self.bracket = self.bracket.told(rate, met=False)
            return True
        was_late = any(p.met is None and p.request_rate == rate for p in self.probes)
        self.probes.append(Probe(request_rate=rate, met=None, detail=failure.detail))
        if failure.reason is FailureReason.LATE_CLIENT:
            return not was_late
        if failure.reason is not FailureReason.MEASUREMENT_TIMEOUT:
            self._fatal = failure
        return False

    def outcome(self) -> LoadOutcome:
        """What the search amounts to."""
        if self._fatal is not None or not self._measured:
            failure = self._fatal or self._failure
            if failure is None:
                raise AssertionError("a search of rates made no run")
            return failure
        met = [pair for pair in self._measured if pair[0].met]
        by_rate = sorted(met or self._measured, key=lambda pair: pair[0].request_rate)
        _, chosen = by_rate[-1] if met else by_rate[0]
        chosen.timings_path.replace(self._wanted.run.timings_path)
        return replace(
            chosen,
            probes=tuple(self.probes),
            warm_up_s=sum(outcome.warm_up_s for _, outcome in self._measured),
            measure_s=sum(outcome.measure_s for _, outcome in self._measured),
            requests_sent=sum(outcome.requests_sent for _, outcome in self._measured),
            timings_path=self._wanted.run.timings_path,
        )


def meets(metrics: ServingMetrics, slos: Sequence[Slo]) -> bool:
    """Whether figures meet every SLO."""
    values = metrics.flat()
    return all(slo.violation(values[slo.metric]) <= 0 for slo in slos)
