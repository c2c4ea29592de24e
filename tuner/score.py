"""One figure for each measured configuration, under SLOs that may be other than those of the search.

The base score says how near a configuration is to the best that was measured: for each objective the ratio of its value
to the best one (inverted where lower is better), and over several objectives their geometric mean; 1 is a configuration
that is the best in all of them. The score is the base score times 1 - penalty of each SLO (`search_spaces.slos`).
Nothing is stored: objectives stay as they were measured, and new SLOs rank old measurements anew.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from search_spaces.metrics import Direction, metric_info
from search_spaces.slos import Slo, Tier, feasible, multiplier
from studies.records import TrialRecord
from studies.repeats import runs_by_key


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A measured configuration with its figures (means over `runs` of it) and what SLOs make of them.

    `penalties` and `tiers` are by metric, in the order of the SLOs. `rank` counts from 1, infeasible ones last.
    """

    rank: int
    trial: TrialRecord
    runs: int
    metrics: Mapping[str, float]
    base: float
    multiplier: float
    feasible: bool
    penalties: Mapping[str, float]
    tiers: Mapping[str, Tier]

    @property
    def score(self) -> float:
        """Base score times multiplier; 0 for an infeasible configuration."""
        return self.base * self.multiplier if self.feasible else 0.0


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A configuration and the means over its runs."""

    trial: TrialRecord
    runs: int
    metrics: Mapping[str, float]


def measured_configurations(trials: Sequence[TrialRecord]) -> tuple[Measured, ...]:
    """Every candidate that was measured, once; one that failed in a run did not hold, and is left out."""
    found = ((runs, runs.record) for runs in runs_by_key(trials).values() if len(runs.measured) == len(runs.finished))
    return tuple(
        Measured(trial=record, runs=len(runs.measured), metrics=record.measurement.metrics.flat())
        for runs, record in found
        if record.measurement is not None
    )


def ranked(trials: Sequence[TrialRecord], objectives: Sequence[str], slos: Sequence[Slo]) -> tuple[Scored, ...]:
    """The measured configurations of `trials` by score, best first; ties by the number of the trial.

    Configurations without a finite value of an objective or an SLO's metric are left out. Raises `InvalidValueError`
    for an objective that is no metric.
    """
    for name in objectives:
        metric_info(name)
    needed = (*objectives, *(slo.metric for slo in slos))
    found = [
        each
        for each in measured_configurations(trials)
        if all(math.isfinite(each.metrics.get(name, math.nan)) for name in needed)
    ]
    best = {name: _best([each.metrics[name] for each in found], name) for name in objectives} if found else {}
    scored = [_scored(each, best, slos) for each in found]
    scored.sort(key=lambda item: (not item.feasible, -item.score, -item.base, item.trial.number))
    return tuple(_at(item, rank) for rank, item in enumerate(scored, start=1))


def _best(values: Sequence[float], metric: str) -> float:
    return min(values) if metric_info(metric).direction is Direction.MINIMIZE else max(values)


def nearness(value: float, best: float, direction: Direction) -> float:
    """How near `value` is to `best`, in 0..1; 1 is as good."""
    if value == best:
        return 1.0
    return best / value if direction is Direction.MINIMIZE else value / best


def _scored(each: Measured, best: Mapping[str, float], slos: Sequence[Slo]) -> Scored:
    near = [nearness(each.metrics[name], value, metric_info(name).direction) for name, value in best.items()]
    return Scored(
        rank=0,
        trial=each.trial,
        runs=each.runs,
        metrics=each.metrics,
        base=math.prod(near) ** (1.0 / len(near)),
        multiplier=multiplier(slos, each.metrics),
        feasible=feasible(slos, each.metrics),
        penalties={slo.metric: slo.penalty(each.metrics[slo.metric]) for slo in slos},
        tiers={slo.metric: slo.tier(each.metrics[slo.metric]) for slo in slos},
    )


def _at(item: Scored, rank: int) -> Scored:
    return replace(item, rank=rank)
