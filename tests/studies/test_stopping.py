"""When a study ends."""

from __future__ import annotations

from dataclasses import replace

import pytest

from search_spaces.errors import InvalidValueError
from search_spaces.outcome import Failure, FailureReason
from studies.records import TrialRecord, TrialStatus
from studies.spending import Spent
from studies.stopping import Budget, Progress, StopReason, progress_of, stop_reason

BUDGET = Budget(trials=4, wall_s=60.0, lost_in_a_row=3)


def trial(number: int, status: TrialStatus, reason: FailureReason | None = None) -> TrialRecord:
    return TrialRecord(
        number=number,
        status=status,
        candidate=None,
        key=None,
        origin=None,
        prediction=None,
        outcome=Failure(reason=reason, detail="x") if reason else None,
        values=None,
    )


@pytest.mark.parametrize(
    ("limits", "spent", "running", "reason"),
    [
        ({"dollars": 10.0}, Spent(dollars=9.9, device_hours=50.0, trials=9), 0, None),
        ({"dollars": 10.0}, Spent(dollars=10.0, device_hours=5.0, trials=9), 0, StopReason.COST),
        ({"dollars": 10.0}, Spent(dollars=9.0, device_hours=5.0, trials=9), 1, StopReason.COST),
        ({"device_hours": 5.0}, Spent(dollars=10.0, device_hours=5.0, trials=9), 0, StopReason.DEVICE_HOURS),
        ({"device_hours": 5.0, "dollars": 1.0}, Spent(), 3, None),
    ],
)
def test_money_and_device_hours_are_limits_that_what_runs_counts_towards(
    limits: dict[str, float], spent: Spent, running: int, reason: StopReason | None
) -> None:
    budget = Budget(trials=100, **limits)  # type: ignore[arg-type]  # limits by name
    assert stop_reason(budget, progress(finished=9, running=running), elapsed_s=0.0, spent=spent) is reason


def progress(**counts: int) -> Progress:
    return Progress(**({"finished": 0, "running": 0, "waiting": 0, "lost": 0, "lost_in_a_row": 0} | counts))


@pytest.mark.parametrize(
    ("state", "elapsed_s", "exhausted", "reason"),
    [
        (progress(finished=3), 0.0, False, None),
        (progress(finished=3, running=1), 0.0, False, StopReason.TRIALS),
        (progress(finished=4), 0.0, True, StopReason.TRIALS),
        (progress(finished=1), 60.0, False, StopReason.WALL_TIME),
        (progress(lost=3, lost_in_a_row=3), 0.0, False, StopReason.INFRASTRUCTURE),
        (progress(finished=1), 0.0, True, StopReason.SPACE_EXHAUSTED),
        (progress(finished=1, waiting=1), 0.0, True, None),
    ],
)
def test_reasons(state: Progress, elapsed_s: float, *, exhausted: bool, reason: StopReason | None) -> None:
    assert stop_reason(BUDGET, state, elapsed_s=elapsed_s, space_exhausted=exhausted) is reason


@pytest.mark.parametrize(
    ("gains", "ends"),
    [
        ((0.3, 0.004, 0.001), True),
        ((0.001, 0.004, 0.3), False),
        ((0.001, 0.02, 0.001), False),
        ((0.001,), False),
        ((), False),
    ],
)
def test_little_expected_gain_ends_a_study_where_that_is_wanted(gains: tuple[float, ...], *, ends: bool) -> None:
    state = replace(progress(finished=3), expected_gains=gains)
    wanted = replace(BUDGET, min_gain=0.005, patience=2)
    assert (stop_reason(wanted, state, elapsed_s=0.0) is StopReason.LITTLE_GAIN) is ends
    assert stop_reason(BUDGET, state, elapsed_s=0.0) is None


def test_progress_holds_the_gains_that_were_stated_of_finished_trials() -> None:
    trials = [
        replace(trial(0, TrialStatus.MEASURED), expected_gain=0.5),
        trial(1, TrialStatus.MEASURED),
        replace(trial(2, TrialStatus.FAILED), expected_gain=0.2),
        replace(trial(3, TrialStatus.RUNNING), expected_gain=0.1),
    ]
    assert progress_of(trials).expected_gains == (0.5, 0.2)


def test_progress_counts_lost_trials_in_a_row_but_not_those_of_a_dead_coordinator() -> None:
    lost = TrialStatus.LOST
    trials = [
        trial(0, lost, FailureReason.LOST_NODE),
        trial(1, TrialStatus.MEASURED),
        trial(2, lost, FailureReason.LOST_NODE),
        trial(3, lost, FailureReason.LOST_COORDINATOR),
        trial(4, lost, FailureReason.TRANSPORT),
        trial(5, TrialStatus.RUNNING),
        trial(6, TrialStatus.WAITING),
    ]
    assert progress_of(trials) == Progress(finished=1, running=1, waiting=1, lost=4, lost_in_a_row=2)


def test_a_budget_has_limits() -> None:
    with pytest.raises(InvalidValueError, match="trials=0"):
        Budget(trials=0)
    with pytest.raises(InvalidValueError, match="wall_s=0"):
        Budget(trials=1, wall_s=0)
    with pytest.raises(InvalidValueError, match="min_gain=0"):
        Budget(trials=1, min_gain=0)
    with pytest.raises(InvalidValueError, match="patience=0"):
        Budget(trials=1, patience=0)
