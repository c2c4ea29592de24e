"""How much a measurement differs when it is repeated, whether a study drifts, and what that makes of its figures.

Noise is the standard deviation of the logarithm of a metric over runs of one candidate, pooled over all candidates
with several runs: s^2 = sum over candidates of (n_i - 1) s_i^2 / sum of (n_i - 1), with as many degrees of freedom. It
takes relative noise to be alike in all candidates.

Drift is the slope of the logarithm of a metric of the control over time, by least squares, with the t interval of a
slope (Draper and Smith, Applied Regression Analysis, 3rd ed., section 1.4). Confirmations say nothing of it: members of
a front were chosen for a good first run, so that later ones are worse on average without any drift.

Intervals hold the mean of all runs that could be made, with 95%:

- three runs or more: mean * exp(-+ t(n - 1) s / sqrt(n)) with the candidate's own s (`repeats`);
- fewer: the same with the study's pooled noise and its degrees of freedom (`noise of the study`);
- where nothing was repeated there is none, which is said as such.

A metric with a value of 0 or below has no logarithm: its own runs give mean -+ t(n - 1) s / sqrt(n).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from scipy.special import stdtrit

from search_spaces.problem import Problem
from studies.records import Origin, TrialRecord
from studies.repeats import Runs, control_of, runs_by_key

LEVEL = 0.95
OWN_RUNS = 3
"""Runs from which on a candidate's interval is that of its own runs: two say too little of a spread (t(1) = 12.7)."""
_HOUR_S = 3600.0


class Basis(StrEnum):
    """Where the spread of an interval comes from."""

    REPEATS = "repeats"
    STUDY_NOISE = "noise of the study"


@dataclass(frozen=True, kw_only=True)
class Interval:
    """`mean` of `runs` runs, with the 95% interval `low` to `high`."""

    mean: float
    low: float
    high: float
    runs: int
    basis: Basis


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Standard deviation of the logarithm of a metric over repeated runs, with its degrees of freedom (at least 1)."""

    log_stddev: float
    degrees: int


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Relative change of the control's metric from its first to its last run, with its 95% interval.

    -0.03 says that it fell by 3% over `hours`; `runs` are at least 3.
    """

    change: float
    low: float
    high: float
    hours: float
    runs: int

    @property
    def is_clear(self) -> bool:
        """True where the interval leaves out no change at all."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, kw_only=True)
class Stability:
    """What the repeats of a study tell: noise and drift by metric, where they are known.

    `control` is the number of the trial that controls repeat, `control_runs` how often it was measured, `repeats` the
    measured repeats of all kinds.
    """

    noise: dict[str, Noise]
    drift: dict[str, Drift]
    control: int | None = None
    control_runs: int = 0
    repeats: int = 0


def asked_metrics(problem: Problem) -> tuple[str, ...]:
    """The metrics whose stability is stated: objectives and SLOs, then the two basic latencies."""
    names = (*(o.metric for o in problem.objectives), *(slo.metric for slo in problem.slos))
    return tuple(dict.fromkeys((*names, "ttft_p50_ms", "tpot_p50_ms")))


def stability_of(trials: Sequence[TrialRecord], metrics: Iterable[str]) -> Stability:
    """Noise and drift of `metrics` over `trials`, as far as they were repeated."""
    runs = runs_by_key(trials)
    control = control_of(trials)
    controls = runs[control.key] if control is not None and control.key is not None else None
    wanted = tuple(dict.fromkeys(metrics))
    noise = {metric: noise_of(runs.values(), metric) for metric in wanted}
    drift = {metric: drift_of(controls, metric) if controls else None for metric in wanted}
    return Stability(
        noise={metric: known for metric, known in noise.items() if known is not None},
        drift={metric: known for metric, known in drift.items() if known is not None},
        control=control.number if control else None,
        control_runs=len(controls.measured) if controls else 0,
        repeats=sum(trial.is_repeat and trial.measurement is not None for trial in trials),
    )


def noise_of(runs: Iterable[Runs], metric: str) -> Noise | None:
    """Pooled noise of `metric`; None where no candidate was measured twice."""
    squares, degrees = 0.0, 0
    for found in runs:
        values = found.values_of(metric) if len(found.finished) > 1 else ()
        if len(values) > 1 and min(values) > 0:
            squares += (len(values) - 1) * statistics.variance([math.log(value) for value in values])
            degrees += len(values) - 1
    return Noise(log_stddev=math.sqrt(squares / degrees), degrees=degrees) if degrees else None


def drift_of(control: Runs, metric: str) -> Drift | None:
    """Drift of `metric` over the runs of the control; None with fewer than three, or where the metric was ever 0."""
    timed = [
        (trial.ended_at, trial.measurement.metrics.flat().get(metric, 0.0))
        for trial in control.measured
        if trial.ended_at is not None and trial.measurement is not None and _shows_drift(trial)
    ]
    if len(timed) < 3 or min(value for _, value in timed) <= 0:
        return None
    return _slope([(_hours(at), math.log(value)) for at, value in timed])


def _shows_drift(trial: TrialRecord) -> bool:
    """Confirmations are made of what was best by luck too."""
    return trial.origin is not Origin.CONFIRM


def _hours(at: datetime) -> float:
    return at.timestamp() / _HOUR_S


def _slope(points: Sequence[tuple[float, float]]) -> Drift | None:
    """The change over the whole time of a straight line through `points` (hours, logarithms)."""
    count = len(points)
    hours, logs = [x for x, _ in points], [y for _, y in points]
    span = max(hours) - min(hours)
    middle, level = statistics.fmean(hours), statistics.fmean(logs)
    spread = math.fsum((x - middle) ** 2 for x in hours)
    if spread <= 0:
        return None
    slope = math.fsum((x - middle) * (y - level) for x, y in points) / spread
    missed = math.fsum((y - level - slope * (x - middle)) ** 2 for x, y in points)
    wide = quantile(count - 2) * math.sqrt(missed / (count - 2) / spread)
    return Drift(
        change=math.expm1(slope * span),
        low=math.expm1((slope - wide) * span),
        high=math.expm1((slope + wide) * span),
        hours=span,
        runs=count,
    )


def interval_of(runs: Runs, metric: str, noise: Noise | None) -> Interval | None:
    """The interval of `metric` of a candidate; None where it has no value, or nothing says how much it varies."""
    values = runs.values_of(metric)
    if len(values) >= OWN_RUNS:
        return _from_own(values)
    if not values or noise is None or min(values) <= 0:
        return None
    mean = statistics.fmean(values)
    factor = math.exp(quantile(noise.degrees) * noise.log_stddev / math.sqrt(len(values)))
    return Interval(mean=mean, low=mean / factor, high=mean * factor, runs=len(values), basis=Basis.STUDY_NOISE)


def _from_own(values: Sequence[float]) -> Interval:
    mean, count = statistics.fmean(values), len(values)
    t = quantile(count - 1) / math.sqrt(count)
    if min(values) > 0:
        factor = math.exp(t * statistics.stdev([math.log(value) for value in values]))
        return Interval(mean=mean, low=mean / factor, high=mean * factor, runs=count, basis=Basis.REPEATS)
    half = t * statistics.stdev(values)
    return Interval(mean=mean, low=mean - half, high=mean + half, runs=count, basis=Basis.REPEATS)


def is_tie(one: Runs, other: Runs, metric: str, noise: Noise | None) -> bool | None:
    """True where the means of two candidates differ by no more than repeating them would (two-sided t test at 5%).

    None where that cannot be known: nothing was repeated, or a mean is not above 0. Equal means are a tie in any case.
    Not corrected for the number of comparisons.
    """
    first, second = one.values_of(metric), other.values_of(metric)
    if not first or not second:
        return None
    means = statistics.fmean(first), statistics.fmean(second)
    if means[0] == means[1]:
        return True
    if noise is None or min(means) <= 0:
        return None
    wide = quantile(noise.degrees) * noise.log_stddev * math.sqrt(1 / len(first) + 1 / len(second))
    return abs(math.log(means[0] / means[1])) <= wide


def quantile(degrees: int) -> float:
    """Student's t that holds `LEVEL` on both sides together."""
    return float(stdtrit(degrees, (1 + LEVEL) / 2))
