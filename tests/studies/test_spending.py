"""What trials have cost: by hand, and as a limit of a search."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from search_spaces.outcome import Failure, FailureReason
from studies.records import TrialStatus
from studies.spending import NOTHING_SPENT, Spent, held_s, spent
from tests.studies.toy import toy_problem, wide_space
from tests.support.reports import some_candidates, trial


def test_devices_and_their_price_for_the_time_that_a_trial_held_them() -> None:
    problem = toy_problem()  # nodes of 4 cores at $1 an hour
    candidates = some_candidates(wide_space(problem))[:3]
    made = [trial(index, candidate, problem) for index, candidate in enumerate(candidates)]
    phases = {"placement": 999.0, "start": 100.0, "measure": 200.0, "stop": 60.0}
    timed = [replace(t, outcome=replace(t.outcome, timings_s=phases)) for t in made if t.measurement]
    devices = sum(candidate.config.devices for candidate in candidates)
    found = spent(timed, problem)
    assert found.device_hours == pytest.approx(devices * 360 / 3600)
    assert found.dollars == pytest.approx(devices * 0.25 * 360 / 3600)
    assert found.trials == 3


def test_failures_cost_too_and_what_was_never_placed_does_not() -> None:
    problem = toy_problem()
    first = trial(0, some_candidates(wide_space(problem))[0], problem)
    failure = Failure(reason=FailureReason.STARTUP_TIMEOUT, detail="x", timings_s={"placement": 5.0, "start": 600.0})
    failed = replace(first, status=TrialStatus.FAILED, outcome=failure)
    assert held_s(failed) == 600
    assert spent([failed], problem).device_hours > 0
    untimed = replace(failed, outcome=replace(failure, timings_s={}))
    assert untimed.started_at is not None
    assert held_s(replace(untimed, ended_at=untimed.started_at + timedelta(seconds=7))) == 7
    assert spent([replace(first, outcome=None)], problem) == NOTHING_SPENT


def test_what_runs_is_taken_for_average() -> None:
    found = Spent(device_hours=4.0, dollars=8.0, trials=4).with_running(2)
    assert (found.device_hours, found.dollars, found.trials) == (6.0, 12.0, 6)
    assert NOTHING_SPENT.with_running(3).dollars == 0


def test_a_trial_that_was_left_running_counts_no_longer_than_the_longest_of_the_others() -> None:
    problem = toy_problem()
    first = trial(0, some_candidates(wide_space(problem))[0], problem)
    known = replace(first, outcome=replace(first.outcome, timings_s={"start": 60.0, "measure": 40.0}))  # type: ignore[type-var]
    assert first.started_at is not None
    lost = replace(
        first,
        number=1,
        status=TrialStatus.LOST,
        outcome=Failure(reason=FailureReason.LOST_COORDINATOR, detail="found on monday"),
        ended_at=first.started_at + timedelta(days=2),
    )
    devices = lost.candidate.config.devices if lost.candidate else 0
    assert spent([known, lost], problem).device_hours == pytest.approx(devices * 200 / 3600)
    assert spent([lost], problem).device_hours == pytest.approx(devices * 48), "there is nothing to compare it with"
