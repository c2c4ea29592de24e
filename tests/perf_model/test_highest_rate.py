"""The model at the highest rate that meets every SLO, against a model whose highest rate is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perf_model.highest_rate import HighestRatePredictor
from search_spaces.outcome import Prediction
from search_spaces.serving import Candidate
from search_spaces.slos import Slo
from search_spaces.workload import Arrival, Load, RateSearch
from tests.studies.toy import small_space, toy_problem

SEARCH = RateSearch(lowest=0.1, highest=100.0)
DEFAULT = small_space(toy_problem()).default()


class Queue:
    """TTFT is 20 ms * (1 + (rate / capacity)^3), and infeasible configurations ask for 4 slots."""

    def __init__(self, capacity: float) -> None:
        self.capacity, self.calls = capacity, 0

    def predict(self, candidates: Sequence[Candidate]) -> list[Prediction]:
        self.calls += 1
        return [self.at(candidate) for candidate in candidates]

    def at(self, candidate: Candidate) -> Prediction:
        if candidate.config.pools[0].option("threads") == 2:
            return Prediction(metrics={}, infeasible="two threads")
        rate = candidate.load.request_rate
        assert rate is not None
        metrics = {"ttft_p99_ms": 20.0 * (1 + (rate / self.capacity) ** 3), "requests_per_s": rate, "tpot_p50_ms": 5.0}
        return Prediction(metrics=metrics, log_stddev=dict.fromkeys(metrics, 0.1))


def predicted(capacity: float, threshold: float) -> Prediction:
    model = Queue(capacity)
    predictor = HighestRatePredictor(model=model, search=SEARCH, slos=(Slo(metric="ttft_p99_ms", threshold=threshold),))
    candidate = replace(DEFAULT, load=Load(arrival=Arrival.POISSON, value=SEARCH.highest))
    (found,) = predictor.predict([candidate])
    assert model.calls == 2, "many candidates at once"
    return found


@given(st.floats(0.2, 50.0))
def test_the_highest_rate_is_found_within_some_percent(capacity: float) -> None:
    """TTFT is 40 ms at the capacity, from where it is steep."""
    found = predicted(capacity, 40.0)
    assert found.metrics["requests_per_s"] == pytest.approx(capacity, rel=0.25)
    assert found.metrics["ttft_p99_ms"] <= 40.0
    assert found.log_stddev["requests_per_s"] > 0.1, "what is uncertain of TTFT is uncertain of the rate"
    assert found.log_stddev["tpot_p50_ms"] == 0.1


def test_the_ends_of_the_search_bound_it() -> None:
    assert predicted(1e6, 40.0).metrics["requests_per_s"] == pytest.approx(SEARCH.highest)
    assert predicted(1.0, 10.0).metrics["requests_per_s"] == pytest.approx(SEARCH.lowest)


def test_the_rate_is_as_uncertain_as_its_metric_and_slope_say() -> None:
    """Far above the capacity TTFT grows with the third power: a tenth of its logarithm is a thirtieth of the rate's."""
    found = predicted(1.0, 20.0 * 1001)
    assert found.metrics["requests_per_s"] == pytest.approx(10.0, rel=0.02)
    assert found.log_stddev["requests_per_s"] == pytest.approx(math.hypot(0.1, 0.1 / 3), rel=0.02)


def test_what_cannot_run_says_so() -> None:
    space = small_space(toy_problem())
    apart = next(c for c in space.neighbours(space.default()) if c.config.pools[0].option("threads") == 2)
    candidates = [replace(c, load=Load(arrival=Arrival.POISSON, value=1.0)) for c in (space.default(), apart)]
    predictor = HighestRatePredictor(model=Queue(5.0), search=SEARCH, slos=(Slo(metric="ttft_p99_ms", threshold=40),))
    found = predictor.predict(candidates)
    assert [prediction.infeasible for prediction in found] == [None, "two threads"]
    assert predictor.predict([]) == []
