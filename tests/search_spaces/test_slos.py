"""SLOs: violations, the penalty's shape, tiers and what makes a deployment infeasible."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search_spaces.errors import InvalidValueError
from search_spaces.slos import Slo, Tier, feasible, multiplier

SHAPES = st.builds(
    Slo,
    metric=st.just("ttft_p95_ms"),
    threshold=st.floats(0.1, 1e4),
    hard=st.booleans(),
    fail_ratio=st.floats(0, 1),
    weight=st.floats(0.01, 10),
    steepness=st.floats(0.01, 10),
)


def test_the_penalty_is_the_formula() -> None:
    slo = Slo(metric="ttft_p95_ms", threshold=500, hard=False, weight=0.5, steepness=0.4)
    assert slo.violation(600) == pytest.approx(0.2)
    assert slo.penalty(600) == pytest.approx(0.5 * (math.exp(0.2 / 0.4) - 1))
    assert slo.penalty(500) == 0
    assert slo.penalty(5) == 0
    assert slo.penalty(1e12) == 1


@settings(deadline=None)
@given(slo=SHAPES, low=st.floats(0, 1e6), high=st.floats(0, 1e6))
def test_the_penalty_is_bounded_and_never_falls(slo: Slo, low: float, high: float) -> None:
    low, high = sorted((low, high))
    assert 0 <= slo.penalty(low) <= slo.penalty(high) <= 1
    if low <= slo.threshold:
        assert slo.penalty(low) == 0


@settings(deadline=None)
@given(slo=SHAPES, value=st.floats(0, 1e6))
def test_the_limit_divides_feasible_from_infeasible(slo: Slo, value: float) -> None:
    limit = slo.limit
    if limit is None:
        assert not slo.hard
        assert slo.excess(value) <= 0
    elif abs(value - limit) > 1e-9 * limit:
        assert (slo.excess(value) > 0) == (value > limit)


def test_more_is_better_for_some_metrics() -> None:
    slo = Slo(metric="goodput_rps", threshold=10, fail_ratio=0.2)
    assert slo.violation(9) == pytest.approx(0.1)
    assert slo.limit == pytest.approx(8)
    assert (slo.tier(11), slo.tier(9.5), slo.tier(7.9)) == (Tier.MET, Tier.WARNING, Tier.FAILED)


def test_tiers() -> None:
    soft = Slo(metric="tpot_p50_ms", threshold=100, hard=False, warning=0.1, error=0.3)
    assert [soft.tier(v) for v in (90, 105, 111, 131, 1000)] == [
        Tier.MET,
        Tier.MET,
        Tier.WARNING,
        Tier.ERROR,
        Tier.ERROR,
    ]
    assert Slo(metric="tpot_p50_ms", threshold=100).tier(100.1) is Tier.FAILED


def test_several_slos_multiply_and_only_hard_ones_make_infeasible() -> None:
    soft = Slo(metric="ttft_p95_ms", threshold=100, hard=False)
    hard = Slo(metric="tpot_p50_ms", threshold=10, fail_ratio=0.5)
    metrics = {"ttft_p95_ms": 110.0, "tpot_p50_ms": 12.0}
    expected = (1 - math.expm1(0.1)) * (1 - math.expm1(0.2))
    assert multiplier([soft, hard], metrics) == pytest.approx(expected)
    assert feasible([soft, hard], metrics)
    assert not feasible([soft, hard], metrics | {"tpot_p50_ms": 15.1})
    assert feasible([soft], {"ttft_p95_ms": 1e9})


@pytest.mark.parametrize(
    "wrong", [{"threshold": 0}, {"weight": 0}, {"steepness": -1}, {"fail_ratio": -0.1}, {"warning": 0.5, "error": 0.2}]
)
def test_a_bad_slo_is_told(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidValueError, match=next(iter(wrong))):
        Slo(**({"metric": "ttft_p95_ms", "threshold": 1.0} | wrong))  # type: ignore[arg-type]  # built for the test
