"""Several studies held against each other: fronts, hypervolumes, the best under each SLO, and what is more than noise.

All studies are judged alike: by one set of objectives and one set of SLOs, from what was measured; nothing is written.

Hypervolumes share a reference point: the worst of each objective over all measured candidates of all studies, moved out
by 10% (`studies.pareto.reference_point`). Their intervals are a parametric bootstrap: in each of `DRAWS` draws every
member of a front takes mean * exp(t s / sqrt(n)) in each objective, with t drawn from Student's distribution and s and
its degrees of freedom as in the member's own interval (`studies.noise`): from its own runs where it has three or more,
else from the noise of the study. Objectives vary independently of each other, and the members stay the ones that were
chosen by what was measured. Where a study repeated nothing there is no interval.

The means of two studies differ by more than the noise where |log(a / b)| > t * sqrt(s_a^2 / n_a + s_b^2 / n_b), with t
at 95% and the degrees of freedom of Welch and Satterthwaite. It is not corrected for the number of comparisons, nor for
the best of many being a lucky one: confirmed members (`budget.confirm`) are less so.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from search_spaces.errors import InvalidValueError
from search_spaces.metrics import Direction, metric_info
from search_spaces.slos import Slo, feasible
from studies.noise import OWN_RUNS, Noise, quantile
from studies.pareto import Points, front, hypervolume, nondominated, points_of, reference_point
from studies.records import TrialRecord
from studies.repeats import Runs
from tuner.report import StudyReport, metrics_of

DRAWS = 1000
_LARGEST_LOG = 20.0
ALL_SLOS = "all SLOs"


@dataclass(frozen=True, kw_only=True)
class Spread:
    """What is known of a mean: the standard deviation of its logarithm, with its degrees of freedom."""

    mean: float
    log_stddev: float
    degrees: int


@dataclass(frozen=True, kw_only=True)
class Volume:
    """Hypervolume of a study's front; `share` is that of what all fronts together dominate.

    `low` and `high` are the 95% interval of the share, None where the noise is not known. `joint` counts the members
    that stay on the front of all studies together.
    """

    hypervolume: float
    share: float
    low: float | None
    high: float | None
    members: int
    joint: int


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best value of `metric` that each study measured under `condition`; None where nothing met it.

    `winner` is the study that is best, `clear` says by study whether the winner is better by more than the noise (None
    where that is not known).
    """

    condition: str
    metric: str
    trials: Mapping[str, TrialRecord | None]
    winner: str | None
    clear: Mapping[str, bool | None]

    def value(self, study: str) -> float | None:
        """What `study` reached."""
        trial = self.trials[study]
        return metrics_of(trial)[self.metric] if trial is not None else None


@dataclass(frozen=True, kw_only=True)
class Shared:
    """Candidates that two studies both measured: the median of second / first of `metric`, and how many clearly differ.

    `differing` counts those that differ by more than the noise; None where no noise is known.
    """

    first: str
    second: str
    metric: str
    pairs: int
    ratio: float
    differing: int | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Studies with common `objectives` and `slos`. The reports hold every study as those judge it."""

    reports: tuple[StudyReport, ...]
    objectives: tuple[str, ...]
    slos: tuple[Slo, ...]
    notes: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the studies."""
        return tuple(report.name for report in self.reports)

    @property
    def directions(self) -> tuple[Direction, ...]:
        """Better direction of each objective."""
        return tuple(metric_info(name).direction for name in self.objectives)

    @cached_property
    def fronts(self) -> dict[str, tuple[TrialRecord, ...]]:
        """The front of each study."""
        return {report.name: front(report.trials, self.directions) for report in self.reports}

    @cached_property
    def reference(self) -> Points | None:
        """The common reference point; None where nothing was measured."""
        measured = [trial for report in self.reports for trial in report.measured]
        return reference_point(points_of(measured), self.directions) if measured else None

    @cached_property
    def joint(self) -> Points:
        """The front of all studies together."""
        rows = [points_of(members) for members in self.fronts.values() if members]
        return nondominated(np.vstack(rows), self.directions) if rows else np.empty((0, len(self.objectives)))

    @cached_property
    def volumes(self) -> dict[str, Volume]:
        """Hypervolumes by study; empty where nothing was measured."""
        if self.reference is None:
            return {}
        return {report.name: self._volume(report) for report in self.reports}

    def _volume(self, report: StudyReport) -> Volume:
        members = self.fronts[report.name]
        points = points_of(members) if members else np.empty((0, len(self.objectives)))
        value, total = self._hypervolume(points), self._hypervolume(self.joint)
        shares = self.draws[report.name]
        low, high = np.quantile(shares, (0.025, 0.975)) if shares is not None else (None, None)
        return Volume(
            hypervolume=value,
            share=value / total if total > 0 else 0.0,
            low=None if low is None else float(low),
            high=None if high is None else float(high),
            members=len(members),
            joint=sum(any(np.array_equal(point, other) for other in self.joint) for point in points),
        )

    def _hypervolume(self, points: Points) -> float:
        return hypervolume(points, self.reference, self.directions) if self.reference is not None else 0.0

    @cached_property
    def draws(self) -> dict[str, Points | None]:
        """Drawn shares (`DRAWS`,) of the joint hypervolume by study; None where the noise is not known."""
        total = self._hypervolume(self.joint)
        return {report.name: self._drawn(report, total) for report in self.reports}

    def _drawn(self, report: StudyReport, total: float) -> Points | None:
        members = self.fronts[report.name]
        spreads = [[spread(report, trial, metric) for metric in self.objectives] for trial in members]
        if not members or total <= 0 or any(one is None for row in spreads for one in row):
            return None
        rng = np.random.default_rng(0)
        points = np.stack([np.stack([_drawn_values(one, rng) for one in row], axis=1) for row in spreads], axis=1)
        return np.array([self._hypervolume(drawn) / total for drawn in points])

    def share_difference(self, first: str, second: str) -> tuple[float, float] | None:
        """The 95% interval of the difference of two shares (second - first); None where a noise is not known."""
        one, other = self.draws[first], self.draws[second]
        if one is None or other is None:
            return None
        difference = np.random.default_rng(1).permutation(other) - one
        low, high = np.quantile(difference, (0.025, 0.975))
        return float(low), float(high)

    @cached_property
    def best(self) -> tuple[Best, ...]:
        """The best of each objective under all SLOs together, and under each alone where there are several."""
        conditions: list[tuple[str, tuple[Slo, ...]]] = [(ALL_SLOS if self.slos else "no SLO", self.slos)]
        if len(self.slos) > 1:
            conditions += [(f"{slo.metric} {slo.threshold:g} alone", (slo,)) for slo in self.slos]
        return tuple(self._best(title, slos, metric) for title, slos in conditions for metric in self.objectives)

    def _best(self, title: str, slos: Sequence[Slo], metric: str) -> Best:
        sign = 1.0 if metric_info(metric).direction is Direction.MINIMIZE else -1.0
        trials: dict[str, TrialRecord | None] = {}
        for report in self.reports:
            meeting = [t for t in report.measured if _held(report, t) and feasible(slos, metrics_of(t))]
            trials[report.name] = min(meeting, key=lambda t: (sign * metrics_of(t)[metric], t.number), default=None)
        there = {name: trial for name, trial in trials.items() if trial is not None}
        winner = min(there, key=lambda name: sign * metrics_of(there[name])[metric], default=None)
        clear = (
            {n: self.differ((winner, there[winner]), (n, there[n]), metric) for n in there if winner} if winner else {}
        )
        return Best(condition=title, metric=metric, trials=trials, winner=winner, clear=clear)

    def differ(self, one: tuple[str, TrialRecord], other: tuple[str, TrialRecord], metric: str) -> bool | None:
        """True where `metric` of two trials of studies differs by more than the noise; None where that is not known."""
        first, second = (spread(self.report(name), trial, metric) for name, trial in (one, other))
        if first is None or second is None:
            values = [metrics_of(trial)[metric] for _, trial in (one, other)]
            return False if values[0] == values[1] else None
        return exceeds_noise(first, second)

    def report(self, name: str) -> StudyReport:
        """The report of the study called `name`."""
        return next(report for report in self.reports if report.name == name)

    @cached_property
    def shared(self) -> tuple[Shared, ...]:
        """What each later study measured of the candidates of the first one; none where they have none in common."""
        first = self.reports[0]
        found = (self._shared(first, other, metric) for other in self.reports[1:] for metric in self.objectives)
        return tuple(one for one in found if one is not None)

    def _shared(self, first: StudyReport, second: StudyReport, metric: str) -> Shared | None:
        theirs = {trial.key: trial for trial in second.measured}
        pairs = [(trial, theirs[trial.key]) for trial in first.measured if trial.key in theirs]
        ratios = [metrics_of(b)[metric] / metrics_of(a)[metric] for a, b in pairs if metrics_of(a)[metric] > 0]
        if not ratios:
            return None
        verdicts = [self.differ((first.name, a), (second.name, b), metric) for a, b in pairs]
        return Shared(
            first=first.name,
            second=second.name,
            metric=metric,
            pairs=len(pairs),
            ratio=statistics.median(ratios),
            differing=None if None in verdicts else sum(map(bool, verdicts)),
        )


def compare(
    reports: Sequence[StudyReport], *, objectives: Sequence[str] | None = None, slos: Sequence[Slo] | None = None
) -> Comparison:
    """Hold studies against each other; objectives and SLOs are those of the first one unless given.

    Raises `InvalidValueError` for fewer than two studies, a study given twice, and an objective or an SLO on a metric
    that measurements of a study do not have.
    """
    names = [report.name for report in reports]
    if len(names) < 2 or len(set(names)) < len(names):
        raise InvalidValueError(f"{', '.join(names) or 'no study'}: give at least two different studies to compare")
    asked = tuple(dict.fromkeys(objectives or reports[0].objectives))
    if len(asked) < 2:
        raise InvalidValueError(f"--by {', '.join(asked)}: a front takes at least two objectives")
    held = tuple(reports[0].problem.slos if slos is None else slos)
    for report in reports:
        _check_measured(report, (*asked, *(slo.metric for slo in held)))
    return Comparison(
        reports=tuple(_judged(report, asked, held) for report in reports),
        objectives=asked,
        slos=held,
        notes=tuple(_notes(reports, asked, held)),
    )


def _check_measured(report: StudyReport, metrics: Sequence[str]) -> None:
    for metric in metrics:
        metric_info(metric)
        lacking = [trial.number for trial in report.measured if metric not in metrics_of(trial)]
        if lacking:
            raise InvalidValueError(
                f"trial {lacking[0]} of study {report.name} has no {metric}; choose objectives with --by and SLOs with "
                "--slo that every study measured (figures per dollar need prices, other percentiles an SLO on them)"
            )


def _judged(report: StudyReport, objectives: Sequence[str], slos: Sequence[Slo]) -> StudyReport:
    """`report` with the values and violations of every trial by common objectives and SLOs."""
    return replace(report, trials=tuple(_judged_trial(trial, objectives, slos) for trial in report.trials))


def _judged_trial(trial: TrialRecord, objectives: Sequence[str], slos: Sequence[Slo]) -> TrialRecord:
    if trial.measurement is None:
        return trial
    metrics = metrics_of(trial)
    return replace(
        trial,
        values=tuple(metrics[name] for name in objectives),
        violations={slo.metric: slo.excess(metrics[slo.metric]) for slo in slos if slo.hard},
    )


def _held(report: StudyReport, trial: TrialRecord) -> bool:
    """False for a candidate that failed in one of its runs."""
    found = report.spreads.runs_of(trial)
    return found is None or len(found.measured) == len(found.finished)


def _notes(reports: Sequence[StudyReport], objectives: Sequence[str], slos: Sequence[Slo]) -> list[str]:
    notes = [
        f"{report.name} searched with other SLOs; here it is judged by those of the comparison"
        for report in reports
        if {slo.metric: slo for slo in report.problem.slos} != {slo.metric: slo for slo in slos}
    ]
    notes += [
        f"{report.name} searched for other objectives ({', '.join(report.objectives)})"
        for report in reports
        if set(report.objectives) != set(objectives)
    ]
    if notes and any(name.startswith("goodput") for name in objectives):
        notes.append("goodput was counted under the SLOs of each study, and stays as it was measured")
    notes += [f"{report.name} has no measured trial" for report in reports if not report.measured]
    emulated = [report.name for report in reports if report.emulated]
    if emulated and len(emulated) < len(reports):
        notes.append(f"EMULATED are {', '.join(emulated)}, the others were measured: their figures do not compare")
    first = reports[0].problem
    notes += [
        f"{report.name} has other users ({_users(report)}) than {reports[0].name} ({_users(reports[0])})"
        for report in reports[1:]
        if report.problem.workload != first.workload
    ]
    notes += [
        f"{report.name} serves another model ({report.problem.model.name})"
        for report in reports[1:]
        if report.problem.model.name != first.model.name
    ]
    return notes


def _users(report: StudyReport) -> str:
    workload = report.problem.workload
    return f"ISL {workload.isl.mean}, OSL {workload.osl.mean}, {workload.arrival} arrivals"


def spread(report: StudyReport, trial: TrialRecord, metric: str) -> Spread | None:
    """What is known of the mean of `metric` of a candidate; None where nothing says how much it varies."""
    runs = report.spreads.runs_of(trial)
    return _spread(runs, metric, report.spreads.stability.noise.get(metric)) if runs else None


def _spread(runs: Runs, metric: str, noise: Noise | None) -> Spread | None:
    values = runs.values_of(metric)
    if not values or min(values) <= 0:
        return None
    mean = statistics.fmean(values)
    if len(values) >= OWN_RUNS:
        own = statistics.stdev([math.log(value) for value in values])
        return Spread(mean=mean, log_stddev=own / math.sqrt(len(values)), degrees=len(values) - 1)
    if noise is None:
        return None
    return Spread(mean=mean, log_stddev=noise.log_stddev / math.sqrt(len(values)), degrees=noise.degrees)


def exceeds_noise(one: Spread, other: Spread) -> bool:
    """True where two means differ by more than the noise: Welch's test of their logarithms at 5%, two-sided."""
    variances = one.log_stddev**2, other.log_stddev**2
    total = sum(variances)
    gap = abs(math.log(one.mean / other.mean))
    if total == 0:
        return gap > 0
    degrees = total**2 / sum(v**2 / d for v, d in zip(variances, (one.degrees, other.degrees), strict=True))
    return gap > quantile(max(1, math.floor(degrees))) * math.sqrt(total)


def _drawn_values(known: Spread | None, rng: np.random.Generator) -> Points:
    """Draws (`DRAWS`,) of a mean."""
    if known is None:
        raise AssertionError("a mean of unknown spread is not drawn: the caller checks it")
    logs = np.clip(known.log_stddev * rng.standard_t(known.degrees, DRAWS), -_LARGEST_LOG, _LARGEST_LOG)
    values: Points = known.mean * np.exp(logs)
    return values
