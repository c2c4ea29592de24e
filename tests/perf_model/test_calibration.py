"""Calibration: closed-form answers and the laws that any correction must keep."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perf_model.calibration import (
    PRIOR_LOG_STDDEV,
    PRIOR_PAIRS,
    CalibratedPredictor,
    Calibration,
    Pair,
    calibrate,
)
from search_spaces.outcome import Prediction
from search_spaces.serving import Candidate, Mode, Pool, Role, ServingConfig
from search_spaces.workload import Arrival, Load

AGG, DISAGG = Mode.AGGREGATED, Mode.DISAGGREGATED


def pair(predicted: float, measured: float, mode: Mode = AGG) -> Pair:
    return Pair(mode=mode, predicted={"ttft_p50_ms": predicted}, measured={"ttft_p50_ms": measured})


def test_one_pair_moves_a_third_of_the_way() -> None:
    correction = calibrate([pair(10, 80)]).correction(AGG, "ttft_p50_ms")
    assert correction.factor == pytest.approx(2.0)  # 8 ** (1 / (1 + 2))
    residual = math.log(8) - math.log(2)
    assert correction.log_stddev == pytest.approx(math.sqrt((residual**2 + PRIOR_PAIRS * PRIOR_LOG_STDDEV**2) / 3))


def test_many_pairs_leave_the_mean_ratio() -> None:
    correction = calibrate([pair(10, 30)] * 1000).correction(AGG, "ttft_p50_ms")
    assert correction.factor == pytest.approx(3.0, rel=0.01)
    assert correction.log_stddev < 0.05
    assert correction.pairs == 1000


def test_modes_and_metrics_are_corrected_apart() -> None:
    calibration = calibrate([pair(10, 30)] * 9 + [pair(10, 5, DISAGG)] * 9)
    prediction = Prediction(metrics={"ttft_p50_ms": 10.0, "tpot_p50_ms": 7.0}, log_stddev={"tpot_p50_ms": 0.2})
    aggregated, disaggregated = calibration.apply(prediction, AGG), calibration.apply(prediction, DISAGG)
    assert aggregated.metrics["ttft_p50_ms"] > 20
    assert disaggregated.metrics["ttft_p50_ms"] < 10
    assert aggregated.metrics["tpot_p50_ms"] == 7.0
    assert aggregated.log_stddev["tpot_p50_ms"] == 0.2
    assert aggregated.log_stddev["ttft_p50_ms"] == calibration.correction(AGG, "ttft_p50_ms").log_stddev


def test_infeasible_predictions_pass_unchanged() -> None:
    prediction = Prediction(metrics={}, infeasible="does not fit")
    assert calibrate([pair(1, 2)]).apply(prediction, AGG) is prediction


@pytest.mark.parametrize(("predicted", "measured"), [(0.0, 5.0), (5.0, 0.0), (-1.0, 2.0)])
def test_what_has_no_logarithm_teaches_nothing(predicted: float, measured: float) -> None:
    assert calibrate([pair(predicted, measured)]) == Calibration()


@given(st.lists(st.tuples(st.floats(0.01, 1e4), st.floats(0.01, 1e4)), min_size=1, max_size=20))
def test_a_factor_stays_between_one_and_the_ratios(values: list[tuple[float, float]]) -> None:
    factor = calibrate([pair(p, m) for p, m in values]).correction(AGG, "ttft_p50_ms").factor
    ratios = [m / p for p, m in values]
    assert min(1.0, *ratios) * (1 - 1e-9) <= factor <= max(1.0, *ratios) * (1 + 1e-9)


class Doubling:
    """A model that says TTFT is ten times the concurrency."""

    def predict(self, candidates: Sequence[Candidate]) -> list[Prediction]:
        return [Prediction(metrics={"ttft_p50_ms": 10 * c.load.value}) for c in candidates]


def at(concurrency: int) -> Candidate:
    config = ServingConfig(engine="llamacpp", pools=(Pool(role=Role.MIXED, node_pool="local"),))
    return Candidate(config=config, load=Load(arrival=Arrival.CLOSED, value=concurrency))


def test_learning_starts_from_the_uncorrected_model_every_time() -> None:
    predictor = CalibratedPredictor(model=Doubling())
    assert predictor.predict([at(1), at(2)])[1].metrics == {"ttft_p50_ms": 20.0}
    measured = [(at(n), {"ttft_p50_ms": 20.0 * n}) for n in (1, 2, 4, 8)] * 10
    once = predictor.learned(measured)
    assert once.predict([at(4)])[0].metrics["ttft_p50_ms"] == pytest.approx(80, rel=0.05)
    assert once.learned(measured) == once
