"""What a candidate costs, against what trials took."""

from __future__ import annotations

from dataclasses import replace

import pytest

from search_spaces.outcome import Failure, FailureReason, Prediction
from search_spaces.serving import Mode
from studies.costs import Costs, costs_of
from studies.records import Origin, TrialRecord, TrialStatus
from tests.studies.toy import measure, toy_problem, wide_space

SPACE = wide_space(toy_problem())
CANDIDATE = SPACE.default()
DEVICES = CANDIDATE.config.devices
TIMINGS = {"placement": 1.0, "start": 4.0, "warm_up": 0.5, "measure": 2.0, "stop": 1.0}
OUTCOME = measure(CANDIDATE)


def told(number: int, timings: dict[str, float]) -> TrialRecord:
    return TrialRecord(
        number=number,
        status=TrialStatus.MEASURED,
        candidate=CANDIDATE,
        key=CANDIDATE.key,
        origin=Origin.SEED,
        prediction=None,
        outcome=replace(OUTCOME, timings_s=timings),
        values=(1.0, 1.0),
    )


def test_costs_are_medians_of_timings_times_devices_and_a_warm_deployment_pays_no_start() -> None:
    costs = costs_of([told(0, TIMINGS), told(1, {"warm_up": 0.5, "measure": 2.0})])
    usual = Prediction(metrics={})
    twice_as_fast = Prediction(metrics={"requests_per_s": 2 * OUTCOME.metrics.requests_per_s})
    assert costs.start_s == {Mode.AGGREGATED: 6.0}
    assert costs.device_seconds(CANDIDATE, usual, is_warm=False) == pytest.approx((6.0 + 2.5) * DEVICES)
    assert costs.device_seconds(CANDIDATE, twice_as_fast, is_warm=True) == pytest.approx(1.25 * DEVICES)
    pair = SPACE.default(Mode.DISAGGREGATED)
    dear = costs.device_seconds(pair, twice_as_fast, is_warm=False)
    assert dear == pytest.approx((6.0 + 1.25) * pair.config.devices), "the dearest known start"
    assert costs_of([]) == Costs(start_s={}, measure_s=1.0, requests=None)


def test_what_failed_tells_how_long_a_start_takes_and_what_was_lost_tells_nothing() -> None:
    slow = Failure(reason=FailureReason.STARTUP_TIMEOUT, detail="not ready", timings_s={"start": 600.0})
    failed = replace(told(0, TIMINGS), status=TrialStatus.FAILED, outcome=slow, values=None)
    assert costs_of([failed]).start_s == {Mode.AGGREGATED: 600.0}
    assert costs_of([replace(failed, status=TrialStatus.LOST)]).start_s == {}
