"""Noise, drift and intervals, against figures worked out by other means."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
from scipy import stats

from studies.noise import Basis, Noise, interval_of, is_tie, noise_of, quantile, stability_of
from studies.records import Origin, TrialRecord
from studies.repeats import Runs, runs_by_key
from tests.studies.test_repeats import CANDIDATES, START, run

RATE = "output_tokens_per_s"


def runs_of(factors: list[float], which: int = 0) -> Runs:
    """Runs of one candidate, its throughput off by `factors`."""
    repeats = [run(n, CANDIDATES[which], factor=f, repeat_of=0 if n else None) for n, f in enumerate(factors)]
    return Runs(first=repeats[0], finished=tuple(repeats))


def test_the_quantile_is_students() -> None:
    for degrees in (1, 2, 7, 60):
        assert quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees))


def test_noise_is_pooled_over_candidates() -> None:
    one, two, single = runs_of([1.0, 1.1, 0.9]), runs_of([1.0, 1.3], which=1), runs_of([1.0], which=2)
    variances = [statistics.variance([math.log(f) for f in factors]) for factors in ([1.0, 1.1, 0.9], [1.0, 1.3])]
    found = noise_of([one, two, single], RATE)
    assert found is not None
    assert found.degrees == 3
    assert found.log_stddev == pytest.approx(math.sqrt((2 * variances[0] + variances[1]) / 3))
    assert noise_of([single], RATE) is None


def test_noise_is_found_again_and_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """400 studies of 5 candidates with 4 runs each, log-normal noise of 5%."""
    generator = np.random.default_rng(1)
    deviations, held_own, held_pooled = [], 0, 0
    base = runs_of([1.0]).values_of(RATE)[0]
    for _ in range(400):
        factors = np.exp(0.05 * generator.standard_normal((5, 4)))
        runs = [runs_of(row.tolist(), which) for which, row in enumerate(factors)]
        noise = noise_of(runs, RATE)
        assert noise is not None
        deviations.append(noise.log_stddev)
        own, fresh = interval_of(runs[0], RATE, noise), runs_of([float(np.exp(0.05 * generator.standard_normal()))])
        pooled = interval_of(fresh, RATE, noise)
        assert own is not None
        assert pooled is not None
        assert (own.basis, own.runs, pooled.basis, pooled.runs) == (Basis.REPEATS, 4, Basis.STUDY_NOISE, 1)
        held_own += own.low <= base <= own.high
        held_pooled += pooled.low <= base <= pooled.high
    assert math.sqrt(statistics.fmean(d**2 for d in deviations)) == pytest.approx(0.05, rel=0.05)
    assert 0.92 <= held_own / 400 <= 0.98
    assert 0.92 <= held_pooled / 400 <= 0.98


def test_without_repeats_there_is_no_interval() -> None:
    assert interval_of(runs_of([1.0]), RATE, None) is None
    assert interval_of(runs_of([1.0, 1.1, 1.2]), RATE, None) is not None, "its own runs need no noise of the study"
    assert interval_of(runs_of([1.0]), "output_tokens_per_dollar_of_nothing", Noise(log_stddev=0.1, degrees=2)) is None


def test_a_metric_of_zero_has_a_linear_interval_from_its_own_runs_alone() -> None:
    runs = runs_of([1.0, 1.0, 1.0])
    found = interval_of(runs, "error_rate", Noise(log_stddev=0.1, degrees=5))
    assert found is not None
    assert (found.mean, found.low, found.high) == (0.0, 0.0, 0.0)
    assert interval_of(runs_of([1.0]), "error_rate", Noise(log_stddev=0.1, degrees=5)) is None


def controls(factors: list[float]) -> list[TrialRecord]:
    """A default and its controls, an hour apart."""
    return [
        replace(
            run(n, CANDIDATES[0], factor=f, origin=Origin.CONTROL if n else Origin.DEFAULT, repeat_of=0 if n else None),
            ended_at=START + timedelta(hours=n),
        )
        for n, f in enumerate(factors)
    ]


def test_drift_is_that_of_a_straight_line_with_its_t_interval() -> None:
    factors = [1.0, 0.97, 0.95, 0.90]
    found = stability_of(controls(factors), [RATE]).drift[RATE]
    line = stats.linregress(range(4), np.log(factors))
    wide = stats.t.ppf(0.975, 2) * line.stderr
    assert found.change == pytest.approx(math.expm1(3 * line.slope))
    assert found.low == pytest.approx(math.expm1(3 * (line.slope - wide)))
    assert found.high == pytest.approx(math.expm1(3 * (line.slope + wide)))
    assert (found.hours, found.runs) == (pytest.approx(3.0), 4)
    assert found.is_clear


def test_noise_alone_is_no_clear_drift() -> None:
    found = stability_of(controls([1.0, 1.05, 0.96, 1.01]), [RATE]).drift[RATE]
    assert not found.is_clear
    assert stability_of(controls([1.0, 1.05]), [RATE]).drift == {}, "two runs tell no noise from drift"


def test_confirmations_of_the_control_say_nothing_of_drift() -> None:
    trials = controls([1.0, 1.0, 1.0])
    lucky = replace(run(3, CANDIDATES[0], factor=0.5, repeat_of=0, origin=Origin.CONFIRM), ended_at=START)
    found = stability_of([*trials, lucky], [RATE])
    assert found.drift[RATE].change == pytest.approx(0.0)
    assert (found.control, found.control_runs, found.repeats) == (0, 4, 3)
    assert found.noise[RATE].log_stddev > 0.1


def test_ties_are_differences_within_the_noise() -> None:
    noise = Noise(log_stddev=0.02, degrees=6)
    base, near, far = runs_of([1.0, 1.0, 1.0]), runs_of([1.03, 1.03, 1.03]), runs_of([1.1, 1.1, 1.1])
    assert is_tie(base, near, RATE, noise) is True
    assert is_tie(base, far, RATE, noise) is False
    assert is_tie(base, near, RATE, None) is None
    assert is_tie(base, base, RATE, None) is True
    reach = quantile(6) * 0.02 * math.sqrt(1 / 3 + 1)
    assert is_tie(base, runs_of([math.exp(0.999 * reach)]), RATE, noise) is True
    assert is_tie(base, runs_of([math.exp(1.001 * reach)]), RATE, noise) is False


def test_the_stability_of_a_study_without_repeats_is_unknown() -> None:
    found = stability_of([run(0, CANDIDATES[0], origin=Origin.DEFAULT), run(1, CANDIDATES[1])], [RATE])
    assert (found.noise, found.drift, found.control, found.control_runs, found.repeats) == ({}, {}, 0, 1, 0)
    assert runs_by_key([]) == {}
