"""What a study has cost so far: device-hours and dollars of its trials, repeats and failures included.

A trial holds the devices of its configuration from its start to its stop; the time that it waited for free nodes costs
nothing. Deployments that are kept warm between trials, and nodes that stand idle, are not counted: what they cost is a
matter of the cluster, not of the study.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from search_spaces.outcome import FailureReason
from search_spaces.problem import Problem
from studies.records import TrialRecord

WAITING = "placement"


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Device-hours and dollars of `trials` trials that have ended."""

    device_hours: float = 0.0
    dollars: float = 0.0
    trials: int = 0

    def with_running(self, running: int) -> Spent:
        """What will have been spent once `running` more trials of average cost have ended."""
        share = 1.0 + running / self.trials if self.trials else 1.0
        return Spent(device_hours=self.device_hours * share, dollars=self.dollars * share, trials=self.trials + running)


NOTHING_SPENT = Spent()


def held_s(trial: TrialRecord) -> float:
    """Seconds for which `trial` held its devices; those between its start and end where no phase was timed."""
    timings = trial.outcome.timings_s if trial.outcome else {}
    if timings:
        return sum(seconds for phase, seconds in timings.items() if phase != WAITING)
    if trial.started_at is None or trial.ended_at is None:
        return 0.0
    return max(0.0, (trial.ended_at - trial.started_at).total_seconds())


def spent(trials: Sequence[TrialRecord], problem: Problem) -> Spent:
    """The cost of every trial of `trials` that has an outcome, lost ones included.

    A trial that lost its coordinator ends when another one finds it, days later perhaps: it counts as no longer than
    the longest of the others.
    """
    device_hours = dollars = 0.0
    count = 0
    longest_s = max((held_s(trial) for trial in trials if trial.outcome and not _was_left(trial)), default=math.inf)
    for trial in trials:
        if trial.candidate is None or trial.outcome is None:
            continue
        hours = (min(held_s(trial), longest_s) if _was_left(trial) else held_s(trial)) / 3600
        device_hours += hours * trial.candidate.config.devices
        dollars += hours * problem.price_per_hour(trial.candidate.config)
        count += 1
    return Spent(device_hours=device_hours, dollars=dollars, trials=count)


def _was_left(trial: TrialRecord) -> bool:
    """True where nobody was there when the trial ended, so that nothing says how long it lasted."""
    failure = trial.failure
    return failure is not None and failure.reason is FailureReason.LOST_COORDINATOR and not failure.timings_s
