"""What a candidate is worth, against closed forms."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest

from search_spaces.errors import InvalidValueError
from search_spaces.outcome import Measurement, Prediction
from search_spaces.problem import Slo
from search_spaces.serving import Candidate, Mode
from studies.pareto import hypervolume
from studies.records import Origin, TrialRecord, TrialStatus
from studies.scoring import UNKNOWN_LOG_STDDEV, Costs, Scorer, costs_of, residual_spreads
from tests.studies.toy import measure, toy_problem, wide_space

PROBLEM = toy_problem()
SPACE = wide_space(PROBLEM)
CANDIDATE = SPACE.default()
EXACT = 1e-9


def predicted(rate: float, ttft_ms: float, spread: float = EXACT, **more: float) -> Prediction:
    metrics = {"output_tokens_per_s": rate, "ttft_p50_ms": ttft_ms} | more
    return Prediction(metrics=metrics, log_stddev=dict.fromkeys(metrics, spread))


def told(number: int, candidate: Candidate, outcome: Measurement, prediction: Prediction | None = None) -> TrialRecord:
    metrics = outcome.metrics.flat()
    return TrialRecord(
        number=number,
        status=TrialStatus.MEASURED,
        candidate=candidate,
        key=candidate.key,
        origin=Origin.SEED,
        prediction=prediction,
        outcome=outcome,
        values=tuple(metrics[objective.metric] for objective in PROBLEM.objectives),
        violations={},
    )


def scored(trials: list[TrialRecord], predictions: list[Prediction]) -> list[float]:
    scores = Scorer(PROBLEM, trials).score([CANDIDATE] * len(predictions), predictions, [True] * len(predictions))
    return [score.improvement for score in scores]


def test_improvement_of_an_exact_prediction_is_the_area_it_adds() -> None:
    trial = told(0, CANDIDATE, measure(CANDIDATE))
    rate, ttft = trial.values or (0.0, 0.0)
    better, trade, same = predicted(2 * rate, ttft / 2), predicted(2 * rate, 2 * ttft), predicted(rate, ttft)
    gains = scored([trial], [better, trade, same, predicted(rate / 2, 2 * ttft)])
    # the reference lies a tenth of the range beyond the front {trial, better} of this pool: the predicted front is
    # `better` alone, so that the range goes from it to the trial
    reference = np.array([rate - 0.1 * rate, ttft + 0.1 * ttft / 2])
    axes = [objective.direction for objective in PROBLEM.objectives]
    before = hypervolume(np.array([[rate, ttft]]), reference, axes)
    after = hypervolume(np.array([[2 * rate, ttft / 2]]), reference, axes)
    assert gains[0] == pytest.approx((after - before) / np.prod(reference), rel=1e-5)
    assert gains[2:] == pytest.approx([0.0, 0.0], abs=1e-6)
    assert gains[1] == 0.0, "twice the latency is beyond the reference while a better point is known"


def test_both_ends_of_a_trade_off_are_worth_something() -> None:
    trial = told(0, CANDIDATE, measure(CANDIDATE))
    rate, ttft = trial.values or (0.0, 0.0)
    gains = scored([trial], [predicted(2 * rate, 2 * ttft), predicted(rate / 2, ttft / 2)])
    assert all(gain > 0.01 for gain in gains)


def test_uncertainty_makes_a_tie_worth_measuring() -> None:
    trial = told(0, CANDIDATE, measure(CANDIDATE))
    rate, ttft = trial.values or (0.0, 0.0)
    certain, unsure = scored([trial], [predicted(rate, ttft), predicted(rate, ttft, spread=0.3)])
    assert unsure > certain + 0.001


def test_feasibility_is_the_log_normal_probability_of_meeting_every_slo() -> None:
    slos = (Slo(metric="ttft_p50_ms", threshold=100.0), Slo(metric="goodput_rps", threshold=2.0))
    scorer = Scorer(replace(PROBLEM, slos=slos), [])
    prediction = predicted(1.0, 80.0, spread=0.5, goodput_rps=3.0)
    normal = NormalDist()
    expected = normal.cdf(math.log(100 / 80) / 0.5) * normal.cdf(math.log(3 / 2) / 0.5)
    assert scorer.feasibility(prediction) == pytest.approx(expected)
    assert scorer.feasibility(predicted(1.0, 0.0, goodput_rps=0.0)) == 0.0
    unknown = Prediction(metrics={"ttft_p50_ms": 100.0 * math.exp(UNKNOWN_LOG_STDDEV)})
    assert scorer.feasibility(unknown) == pytest.approx(normal.cdf(-1.0))


def test_the_spread_of_a_silent_model_is_learned_from_its_errors() -> None:
    outcome = measure(CANDIDATE)
    value = outcome.metrics.flat()["ttft_p50_ms"]
    trials = [
        told(i, CANDIDATE, outcome, predicted(1.0, value * math.exp(error))) for i, error in enumerate((0.2, -0.2, 0.2))
    ]
    assert residual_spreads(trials)["ttft_p50_ms"] == pytest.approx(0.2)
    assert residual_spreads(trials[:2]) == {}
    silent = Prediction(metrics={})
    assert Scorer(PROBLEM, trials).spread(silent, "ttft_p50_ms") == pytest.approx(0.2)
    assert Scorer(PROBLEM, []).spread(silent, "ttft_p50_ms") == UNKNOWN_LOG_STDDEV


def test_costs_are_medians_of_measured_timings_and_a_warm_deployment_pays_no_start() -> None:
    outcome = measure(CANDIDATE)
    timings = {"placement": 1.0, "start": 4.0, "warm_up": 0.5, "measure": 2.0, "stop": 1.0}
    cold = told(0, CANDIDATE, replace(outcome, timings_s=timings))
    warm = told(1, CANDIDATE, replace(outcome, timings_s={"warm_up": 0.5, "measure": 2.0}))
    costs = costs_of([cold, warm])
    twice_as_fast = predicted(1.0, 1.0, requests_per_s=2 * outcome.metrics.requests_per_s)
    assert costs.start_s == {Mode.AGGREGATED: 6.0}
    assert costs.of(CANDIDATE, predicted(1.0, 1.0), is_warm=False) == pytest.approx(6.0 + 2.5)
    assert costs.of(CANDIDATE, twice_as_fast, is_warm=True) == pytest.approx(1.25)
    other_mode = SPACE.default(Mode.DISAGGREGATED)
    assert costs.of(other_mode, twice_as_fast, is_warm=False) == pytest.approx(6.0 + 1.25), "the dearest known start"
    assert costs_of([]) == Costs(start_s={}, measure_s=1.0, requests=None)


def test_without_improvement_the_nearer_to_the_front_ranks_first() -> None:
    trial = told(0, CANDIDATE, measure(CANDIDATE))
    rate, ttft = trial.values or (0.0, 0.0)
    pool = [predicted(rate * 0.5, ttft * 1.5), predicted(rate * 0.95, ttft * 1.02)]
    far, near = Scorer(PROBLEM, [trial]).score([CANDIDATE] * 2, pool, [False, False])
    assert far.improvement == near.improvement == 0.0
    assert near.rank_key > far.rank_key


def test_a_model_that_does_not_predict_an_objective_is_refused() -> None:
    with pytest.raises(InvalidValueError, match="does not predict objective ttft_p50_ms"):
        Scorer(PROBLEM, []).points([Prediction(metrics={"output_tokens_per_s": 1.0})])
