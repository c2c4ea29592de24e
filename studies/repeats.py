"""Several runs of one candidate: what they amount to together, and when another one is due.

A repeat is a trial of its own in the storage, with origin `control` or `confirm` and the number of the trial that it
repeats. It is no new candidate: budgets count candidates, fronts and hypervolumes are those of the means over all runs
of each candidate, and the sampler meets every candidate once (docs/decisions/0007).

- A *control* is a run of the first default configuration that could be measured, one after every `control_every` new
  candidates: it shows the noise of a study, and whether its machines drift.
- A *confirmation* is a run of a member of the front, until each has `confirm` runs. Every run has a seed of its own,
  and so its own order of arrivals, lengths and prompts.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from search_spaces.errors import require
from search_spaces.metrics import Percentiles, ServingMetrics
from search_spaces.outcome import Measurement
from search_spaces.serving import ServingConfig
from studies.constraints import HELD
from studies.costs import costs_of
from studies.records import Origin, TrialRecord, TrialStatus


@dataclass(frozen=True, kw_only=True)
class RepeatRule:
    """How often is measured again.

    A control comes after every `control_every` candidates (0 for none). Each member of the final front has `confirm`
    runs, its first one included.
    """

    control_every: int = 10
    confirm: int = 3

    def __post_init__(self) -> None:
        require(self.control_every >= 0, f"control_every={self.control_every} must not be negative; 0 is none")
        require(self.confirm >= 1, f"confirm={self.confirm} must be at least 1, the first run included")


NO_REPEATS = RepeatRule(control_every=0, confirm=1)
"""Nothing is measured twice."""


@dataclass(frozen=True, kw_only=True)
class Runs:
    """All finished runs of one candidate, in the order of their numbers; `first` is one of them."""

    first: TrialRecord
    finished: tuple[TrialRecord, ...]

    @property
    def measured(self) -> tuple[TrialRecord, ...]:
        """The runs that gave a measurement."""
        return tuple(trial for trial in self.finished if trial.status is TrialStatus.MEASURED)

    def values_of(self, metric: str) -> tuple[float, ...]:
        """`metric` in every measured run that has it."""
        flats = (trial.measurement.metrics.flat() for trial in self.measured if trial.measurement)
        return tuple(flat[metric] for flat in flats if metric in flat)

    @property
    def metrics(self) -> dict[str, float]:
        """Every metric of the candidate by name: that of the mean figures of its measured runs; empty without one."""
        found = [trial.measurement.metrics for trial in self.measured if trial.measurement]
        return mean_metrics(found).flat() if found else {}

    @property
    def record(self) -> TrialRecord:
        """The first run with the objectives, violations and metrics of all: their means.

        A candidate that failed in one of its runs did not hold, and is infeasible whatever the others gave. Artefacts,
        timings and all else are those of the first run.
        """
        measured = self.measured
        if len(self.finished) == 1 or not measured:
            return self.first
        values = [trial.values for trial in measured if trial.values is not None]
        violations = {name: statistics.fmean(t.violations[name] for t in measured) for name in measured[0].violations}
        failed = len(self.finished) - len(measured)
        if failed:
            violations |= {HELD: failed / len(self.finished)}
        means = tuple(statistics.fmean(column) for column in zip(*values, strict=True))
        found = [trial.measurement.metrics for trial in measured if trial.measurement]
        outcome = self.first.outcome
        if isinstance(outcome, Measurement):
            outcome = replace(outcome, metrics=mean_metrics(found))
        return replace(self.first, values=means or None, violations=violations, outcome=outcome)


def mean_metrics(runs: Sequence[ServingMetrics]) -> ServingMetrics:
    """Figures of several runs as one: means of latencies and rates; requests, errors and durations summed."""
    if len(runs) == 1:
        return runs[0]
    return replace(
        runs[0],
        ttft_ms=_mean_latency([run.ttft_ms for run in runs]),
        tpot_ms=_mean_latency([run.tpot_ms for run in runs]),
        itl_ms=_mean_latency([run.itl_ms for run in runs]),
        e2e_ms=_mean_latency([run.e2e_ms for run in runs]),
        output_tokens_per_s=statistics.fmean(run.output_tokens_per_s for run in runs),
        input_tokens_per_s=statistics.fmean(run.input_tokens_per_s for run in runs),
        requests_per_s=statistics.fmean(run.requests_per_s for run in runs),
        goodput_rps=statistics.fmean(run.goodput_rps for run in runs),
        power_w=_mean_power([run.power_w for run in runs]),
        percentiles_ms=_mean_figures([run.percentiles_ms for run in runs]),
        requests=sum(run.requests for run in runs),
        errors=sum(run.errors for run in runs),
        duration_s=sum(run.duration_s for run in runs),
    )


def _mean_figures(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every figure that all `rows` have."""
    return {name: statistics.fmean(row[name] for row in rows) for name in rows[0] if all(name in row for row in rows)}


def _mean_power(watts: Sequence[float | None]) -> float | None:
    """The mean, None where it was not read in every run."""
    known = [value for value in watts if value is not None]
    return statistics.fmean(known) if len(known) == len(watts) else None


def _mean_latency(runs: Sequence[Percentiles]) -> Percentiles:
    """The mean of each statistic."""
    return Percentiles(
        mean=statistics.fmean(run.mean for run in runs),
        p50=statistics.fmean(run.p50 for run in runs),
        p90=statistics.fmean(run.p90 for run in runs),
        p95=statistics.fmean(run.p95 for run in runs),
        p99=statistics.fmean(run.p99 for run in runs),
    )


def runs_by_key(trials: Sequence[TrialRecord]) -> dict[str, Runs]:
    """The finished runs of every candidate of `trials` (by number), by key, in the order of the first run."""
    finished: dict[str, list[TrialRecord]] = {}
    for trial in trials:
        if trial.key is not None and trial.is_finished:
            finished.setdefault(trial.key, []).append(trial)
    return {
        key: Runs(first=next((t for t in found if not t.is_repeat), found[0]), finished=tuple(found))
        for key, found in finished.items()
    }


def candidates_of(trials: Sequence[TrialRecord]) -> tuple[TrialRecord, ...]:
    """`trials` as a search must see them: every candidate once, with the means of its runs, and no repeats."""
    if not any(trial.is_repeat for trial in trials):
        return tuple(trials)
    runs = runs_by_key(trials)
    return tuple(_joined(trial, runs) for trial in trials if not trial.is_repeat)


def _joined(trial: TrialRecord, runs: Mapping[str, Runs]) -> TrialRecord:
    found = runs.get(trial.key) if trial.key is not None else None
    return found.record if found is not None and found.first.number == trial.number else trial


def control_of(trials: Sequence[TrialRecord]) -> TrialRecord | None:
    """The trial that controls repeat: the first default configuration that was measured, None while there is none."""
    return next((t for t in trials if t.origin is Origin.DEFAULT and t.status is TrialStatus.MEASURED), None)


def due_control(trials: Sequence[TrialRecord], rule: RepeatRule) -> TrialRecord | None:
    """The trial to repeat as a control now, None where none is due.

    One is due when `control_every` candidates were finished since the last. A control that was given up after faults of
    the infrastructure counts as made, one that failed too: what cannot be measured again is not tried for ever.
    """
    control = control_of(trials)
    if control is None or rule.control_every == 0:
        return None
    last = max((trial.number for trial in trials if trial.origin is Origin.CONTROL), default=-1)
    since = sum(trial.is_finished and not trial.is_repeat for trial in trials if trial.number > last)
    return control if since >= rule.control_every else None


def due_confirmation(
    trials: Sequence[TrialRecord],
    members: Sequence[TrialRecord],
    rule: RepeatRule,
    warm: Sequence[ServingConfig] = (),
) -> TrialRecord | None:
    """The member of the front `members` to run again now, None where each has its runs or cannot have more.

    Members whose deployment is up go first, then those of the same deployment one after the other; what is being
    measured on a deployment lets those of another go before.
    """
    lacking = lacking_runs(trials, members, rule)
    busy = {t.candidate.config for t in trials if t.status is TrialStatus.RUNNING and t.candidate is not None}
    places = {
        (config in busy, config not in warm, config.key, trial.number): trial
        for trial in members
        if lacking.get(trial.number, 0) > 0 and trial.candidate is not None
        for config in (trial.candidate.config,)
    }
    return places[min(places)] if places else None


def lacking_runs(trials: Sequence[TrialRecord], members: Sequence[TrialRecord], rule: RepeatRule) -> dict[int, int]:
    """How many more runs each of `members` is to have, by number.

    Runs that wait, are being made, or were given up count as made: the infrastructure is not asked for ever.
    """
    asked: dict[str, int] = {}
    for trial in trials:
        if trial.key is not None and trial.retry_of is None:
            asked[trial.key] = asked.get(trial.key, 0) + 1
    return {m.number: max(0, rule.confirm - asked.get(m.key, 0)) for m in members if m.key is not None}


def confirmation_s(
    trials: Sequence[TrialRecord], members: Sequence[TrialRecord], rule: RepeatRule, at_once: int = 1
) -> float:
    """Expected seconds until each of `members` has its runs, `at_once` of them at a time; 0 where each has.

    Runs take the median measurement of the study so far, deployments the median start of their mode. One candidate
    more is counted in: the one that would be measured before.
    """
    lacking = {number: count for number, count in lacking_runs(trials, members, rule).items() if count}
    if not lacking:
        return 0.0
    costs = costs_of(trials)
    configs = {m.candidate.config for m in members if m.number in lacking and m.candidate is not None}
    starts_s = sum(costs.start_s.get(config.mode, 0.0) for config in configs)
    candidate_s = costs.measure_s + max(costs.start_s.values(), default=0.0)
    return candidate_s + (sum(lacking.values()) * costs.measure_s + starts_s) / at_once
