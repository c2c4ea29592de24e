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
from search_spaces.serving import ServingConfig
from studies.constraints import HELD
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
        """The mean over the runs of every metric that all measured runs have."""
        return mean_of([trial.measurement.metrics.flat() for trial in self.measured if trial.measurement])

    @property
    def record(self) -> TrialRecord:
        """The first run with the objectives and violations of all: their means.

        A candidate that failed in one of its runs did not hold, and is infeasible whatever the others gave.
        """
        measured = self.measured
        if len(self.finished) == 1 or not measured:
            return self.first
        values = [trial.values for trial in measured if trial.values is not None]
        violations = mean_of([trial.violations for trial in measured])
        failed = len(self.finished) - len(measured)
        if failed:
            violations |= {HELD: failed / len(self.finished)}
        means = tuple(statistics.fmean(column) for column in zip(*values, strict=True))
        return replace(self.first, values=means or None, violations=violations)


def mean_of(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every name that all `rows` have."""
    if not rows:
        return {}
    return {name: statistics.fmean(row[name] for row in rows) for name in rows[0] if all(name in row for row in rows)}


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

    One is due after every `control_every` finished candidates. A control that was given up after faults of the
    infrastructure counts as made, one that failed too: what cannot be measured again is not tried for ever.
    """
    control = control_of(trials)
    if control is None or rule.control_every == 0:
        return None
    candidates = sum(trial.is_finished and not trial.is_repeat for trial in trials)
    made = sum(trial.origin is Origin.CONTROL and trial.retry_of is None for trial in trials)
    return control if candidates // rule.control_every > made else None


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
