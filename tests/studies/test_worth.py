"""What candidates are worth, against closed forms."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest

from search_spaces.errors import InvalidValueError
from search_spaces.outcome import Failure, FailureReason, Prediction
from search_spaces.problem import Slo
from search_spaces.serving import Candidate, Mode
from studies.acquisition import REFERENCE_MARGIN
from studies.records import Origin, TrialRecord, TrialStatus
from studies.worth import Appraiser, Option, Worth
from tests.studies.toy import measure, toy_problem, wide_space

PROBLEM = toy_problem()
SPACE = wide_space(PROBLEM)
CANDIDATE = SPACE.default()
OTHERS = SPACE.same_config(CANDIDATE)
EXACT = 1e-6
HOLDS = 0.95


def predicted(rate: float, ttft_ms: float, spread: float = EXACT, **more: float) -> Prediction:
    metrics = {"output_tokens_per_s": rate, "ttft_p50_ms": ttft_ms} | more
    return Prediction(metrics=metrics, log_stddev=dict.fromkeys(metrics, spread))


def told(number: int, candidate: Candidate, rate: float, ttft_ms: float) -> TrialRecord:
    return TrialRecord(
        number=number,
        status=TrialStatus.MEASURED,
        candidate=candidate,
        key=candidate.key,
        origin=Origin.SEED,
        prediction=None,
        outcome=replace(measure(candidate), timings_s={"start": 3.0, "measure": 1.0}),
        values=(rate, ttft_ms),
    )


def options(*predictions: Prediction, warm: tuple[int, ...] = ()) -> list[Option]:
    return [Option(candidate=CANDIDATE, key=str(i), prediction=p, is_warm=i in warm) for i, p in enumerate(predictions)]


def rates(worth: Worth) -> dict[int, float]:
    return dict(zip(worth.order.tolist(), worth.rates.tolist(), strict=True))


def test_the_gain_of_an_exact_prediction_is_the_area_it_adds() -> None:
    """Two measured points span the front's box; a third between them adds a rectangle known by hand."""
    trials = [told(0, CANDIDATE, 100.0, 10.0), told(1, OTHERS[0], 200.0, 20.0)]
    worth = Appraiser(PROBLEM, trials).appraise(options(predicted(180.0, 12.0), predicted(90.0, 30.0)))
    seconds = 4.0 * CANDIDATE.config.devices
    # in units of the box (100 tokens/s, 10 ms) the point lies (0.2, 0.2) from the ideal, the front at (1, 0) and (0, 1)
    gain = (1.0 - 0.2) * (1.0 - 0.2)
    assert rates(worth)[0] == pytest.approx(HOLDS * gain / seconds, rel=1e-3)
    assert rates(worth)[1] == pytest.approx(0.0, abs=1e-9)
    edge = 1.0 + REFERENCE_MARGIN
    held = edge * REFERENCE_MARGIN + REFERENCE_MARGIN * edge - REFERENCE_MARGIN**2
    assert worth.gain == pytest.approx(HOLDS * gain / held, rel=1e-3)


def test_a_gain_counts_with_the_probability_of_meeting_every_slo() -> None:
    slos = (Slo(metric="ttft_p99_ms", threshold=100.0), Slo(metric="goodput_rps", threshold=2.0))
    trials = [told(0, CANDIDATE, 100.0, 10.0), told(1, OTHERS[0], 200.0, 20.0)]
    sure = predicted(180.0, 12.0, ttft_p99_ms=50.0, goodput_rps=9.0)
    spreads = {"output_tokens_per_s": EXACT, "ttft_p50_ms": EXACT, "ttft_p99_ms": 0.5, "goodput_rps": 0.5}
    unsure = replace(predicted(180.0, 12.0, ttft_p99_ms=80.0, goodput_rps=3.0), log_stddev=spreads)
    worth = Appraiser(replace(PROBLEM, slos=slos), trials).appraise(options(sure, unsure))
    normal = NormalDist()
    expected = normal.cdf(math.log(100 / 80) / 0.5) * normal.cdf(math.log(3 / 2) / 0.5)
    assert rates(worth)[1] / rates(worth)[0] == pytest.approx(expected, abs=0.05)


def test_both_ends_of_a_trade_off_and_uncertain_ties_are_worth_something() -> None:
    trials = [told(0, CANDIDATE, 100.0, 10.0)]
    found = rates(Appraiser(PROBLEM, trials).appraise(options(predicted(200.0, 20.0), predicted(50.0, 5.0))))
    assert min(found.values()) > 0.001
    known, unsure = (
        rates(
            Appraiser(PROBLEM, trials).appraise(
                [*options(predicted(100.0, 10.0, spread)), *options(predicted(200.0, 20.0))]
            )
        )[0]
        for spread in (EXACT, 0.3)
    )
    assert unsure > known + 0.0001


def test_noise_that_every_measurement_has_is_no_promise() -> None:
    trials = [told(0, CANDIDATE, 100.0, 10.0)]
    trade = predicted(200.0, 20.0)
    wide = predicted(100.0, 10.0, spread=0.3)
    noisy = replace(wide, log_noise=dict.fromkeys(wide.metrics, 0.3))
    found = rates(Appraiser(PROBLEM, trials).appraise(options(trade, wide, noisy)))
    assert found[2] < 0.01 * found[1]


def test_a_deployment_that_is_up_costs_its_measurement_only() -> None:
    trials = [told(0, CANDIDATE, 100.0, 10.0)]
    same = predicted(200.0, 20.0)
    worth = Appraiser(PROBLEM, trials).appraise(options(same, same, warm=(1,)))
    assert worth.order.tolist()[0] == 1
    assert rates(worth)[1] / rates(worth)[0] == pytest.approx(4.0)


def test_what_failed_counts_for_less() -> None:
    broken = SPACE.default(Mode.DISAGGREGATED)
    failure = Failure(reason=FailureReason.ENGINE_CRASH, detail="exit 139")
    failed = replace(told(1, broken, 0.0, 0.0), status=TrialStatus.FAILED, outcome=failure, values=None)
    appraiser = Appraiser(PROBLEM, [told(0, CANDIDATE, 100.0, 10.0), failed])
    good, bad = appraiser.holds([OTHERS[0], broken])
    assert bad < 0.3 < good


def test_without_any_feasible_prediction_the_likeliest_comes_first() -> None:
    problem = replace(PROBLEM, slos=(Slo(metric="ttft_p50_ms", threshold=1.0),))
    worth = Appraiser(problem, []).appraise(options(predicted(1.0, 1e6), predicted(1.0, 1e4)))
    assert worth.order.tolist()[0] == 1
    assert worth.gain is None, "nothing is held that it could be relative to"


def test_before_any_measurement_candidates_are_ranked_by_the_model_alone() -> None:
    worth = Appraiser(PROBLEM, []).appraise(options(predicted(100.0, 10.0), predicted(300.0, 5.0)))
    assert worth.order.tolist()[0] == 1
    assert np.isfinite(worth.rates).all()


def test_a_model_that_does_not_predict_an_objective_is_refused() -> None:
    with pytest.raises(InvalidValueError, match="does not predict objective ttft_p50_ms"):
        Appraiser(PROBLEM, []).appraise(options(Prediction(metrics={"output_tokens_per_s": 1.0})))
