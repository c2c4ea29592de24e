"""Arrival schedules: constant spacing, exponential gaps of the right mean, repeatable."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from scipy import stats

from cluster.load.arrivals import arrival_times_s
from search_spaces.errors import InvalidValueError
from search_spaces.workload import Arrival, Load


def gaps_s(arrival: Arrival, rate: float, count: int, seed: int = 3) -> np.ndarray:
    times = arrival_times_s(Load(arrival=arrival, value=rate), seed)
    return np.diff(list(islice(times, count + 1)))


def test_constant_arrivals_are_evenly_spaced_without_drift() -> None:
    times = list(islice(arrival_times_s(Load(arrival=Arrival.CONSTANT, value=3.0), 0), 30_001))
    assert times[0] == 0.0
    assert np.allclose(np.diff(times), 1 / 3)
    assert times[-1] == pytest.approx(10_000, abs=1e-9)


def test_poisson_gaps_are_exponential_with_the_mean_of_the_rate() -> None:
    gaps = gaps_s(Arrival.POISSON, 25.0, 20_000)
    assert gaps.mean() == pytest.approx(1 / 25, rel=0.03)
    assert stats.kstest(gaps, "expon", args=(0, 1 / 25)).pvalue > 0.01
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 0.03


def test_rates_below_one_request_per_second_are_ordinary() -> None:
    assert gaps_s(Arrival.POISSON, 0.05, 5000).mean() == pytest.approx(20, rel=0.05)


def test_a_schedule_follows_from_its_seed() -> None:
    assert (gaps_s(Arrival.POISSON, 5.0, 50, seed=1) == gaps_s(Arrival.POISSON, 5.0, 50, seed=1)).all()
    assert (gaps_s(Arrival.POISSON, 5.0, 50, seed=1) != gaps_s(Arrival.POISSON, 5.0, 50, seed=2)).all()


def test_a_closed_loop_has_no_schedule() -> None:
    with pytest.raises(InvalidValueError, match="concurrency=4 is a closed loop"):
        arrival_times_s(Load(arrival=Arrival.CLOSED, value=4), 0)
