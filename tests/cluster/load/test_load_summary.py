"""Figures held against timings worked out by hand, and against laws."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.load.summary import (
    NothingMeasuredError,
    failed_by_class,
    meets,
    percentiles,
    request_latency,
    summarise,
)
from cluster.load.timings import ErrorClass, Phase, RequestTiming
from search_spaces.metrics import METRICS, ServingMetrics
from search_spaces.problem import Slo
from tests.support.load_timings import timing


def figures(*timings: RequestTiming, slos: tuple[Slo, ...] = ()) -> ServingMetrics:
    return summarise(timings, slos=slos, devices=2, price_per_hour=7.2)


def test_latencies_of_one_request() -> None:
    latency = request_latency(timing(100, [150, 160, 175, 180]))
    assert latency.ttft_ms == 50
    assert latency.e2e_ms == 80
    assert latency.tpot_ms == pytest.approx(10)  # (80 - 50) / (4 - 1)
    assert latency.itl_ms == (10, 15, 5)


def test_tpot_divides_by_tokens_and_itl_by_events_where_an_event_carries_several_tokens() -> None:
    latency = request_latency(timing(0, [50, 90, 130], output_tokens=9))
    assert latency.tpot_ms == pytest.approx(10)  # (130 - 50) / (9 - 1)
    assert latency.itl_ms == (40, 40)


def test_a_request_of_one_token_has_no_tpot() -> None:
    assert request_latency(timing(0, [50])).tpot_ms is None


def test_percentiles_interpolate_linearly() -> None:
    figure = percentiles([10, 20, 30, 40, 50])
    assert (figure.mean, figure.p50) == (30, 30)
    assert (figure.p90, figure.p95, figure.p99) == pytest.approx((46, 48, 49.6))


def test_latency_figures_pool_the_measured_completed_requests_only() -> None:
    metrics = figures(
        timing(0, [900, 990], phase=Phase.WARM_UP),
        timing(1000, [1010, 1030]),
        timing(1000, [1030, 1040]),
        timing(1000, [1500], error=ErrorClass.STREAM),
        timing(1010, [1039], phase=Phase.AFTER, error=ErrorClass.ABANDONED, planned_tokens=2),
    )
    assert metrics.ttft_ms.mean == pytest.approx(20)
    assert metrics.itl_ms.mean == pytest.approx(15)
    assert metrics.e2e_ms.p50 == pytest.approx(35)
    assert (metrics.requests, metrics.errors) == (2, 1)
    assert metrics.error_rate == pytest.approx(1 / 3)


def test_rates_count_what_arrives_within_the_measured_window() -> None:
    metrics = figures(
        timing(0, [400, 800, 1200, 1600], phase=Phase.WARM_UP),  # two of its four tokens are inside
        timing(1000, [1500, 2000, 2500, 3000]),
        timing(2000, [2900, 3100, 3300, 3500], phase=Phase.AFTER),  # one of four
        timing(2500, [2750, 2990], phase=Phase.AFTER, error=ErrorClass.ABANDONED, planned_tokens=8),  # two of eight
        timing(1000, [1100, 1200], phase=Phase.AFTER, error=ErrorClass.STREAM),  # failed: counts nowhere
    )
    assert metrics.duration_s == pytest.approx(2.0)
    assert metrics.output_tokens_per_s == pytest.approx((2 + 4 + 1 + 2) / 2)
    assert metrics.requests_per_s == pytest.approx((0.5 + 1 + 0.25 + 0.25) / 2)
    assert metrics.input_tokens_per_s == pytest.approx(100 * 2.0 / 2)


def test_a_token_at_the_start_of_the_window_is_outside_and_one_at_its_end_inside() -> None:
    metrics = figures(timing(0, [500, 1000], phase=Phase.WARM_UP), timing(1000, [1500, 2000]))
    assert metrics.output_tokens_per_s == pytest.approx(2.0)


def test_events_of_several_tokens_weigh_their_tokens() -> None:
    metrics = figures(
        timing(0, [500, 1000], output_tokens=8),
        timing(800, [990], phase=Phase.AFTER, error=ErrorClass.ABANDONED, planned_tokens=8),
    )
    assert metrics.output_tokens_per_s == pytest.approx(8 + 4)
    assert metrics.requests_per_s == pytest.approx(1.5)


def lockstep(concurrency: int, rounds: int, osl: int) -> list[RequestTiming]:
    """A closed loop whose requests all start and end together: TTFT 50 ms, ITL 10 ms; a first round of warm-up."""
    cycle_ms = 50 + 10 * (osl - 1)
    return [
        timing(
            r * cycle_ms + slot * 1e-3,
            [r * cycle_ms + 50 + 10 * k + slot * 1e-3 for k in range(osl)],
            phase=Phase.WARM_UP if r == 0 else Phase.MEASURED if r <= rounds else Phase.AFTER,
        )
        for r in range(rounds + 2)
        for slot in range(concurrency)
    ]


def test_requests_in_step_do_not_bias_the_rate() -> None:
    metrics = figures(*lockstep(concurrency=16, rounds=1, osl=50))
    assert metrics.requests_per_s == pytest.approx(16 / 0.540, rel=0.03)
    assert metrics.output_tokens_per_s == pytest.approx(16 * 50 / 0.540, rel=0.03)


def test_the_rate_is_unbiased_for_requests_out_of_step() -> None:
    """Closed loops of random lengths: the mean over runs of 32 measured requests is that of one endless run."""
    random = np.random.default_rng(5)
    rates = [figures(*_random_closed_loop(random)).requests_per_s for _ in range(150)]
    endless = 8 / (0.030 + 0.010 * (np.arange(10, 71).mean() - 1))
    assert np.mean(rates) == pytest.approx(endless, rel=0.03)


def _random_closed_loop(random: np.random.Generator) -> list[RequestTiming]:
    """Eight slots, TTFT 30 ms, ITL 10 ms, 10 to 70 tokens; 80 of warm-up, 32 measured, and what overlaps them."""
    free_ms = list(random.uniform(0, 400, size=8))
    requests = []
    for index in range(80 + 32 + 60):
        slot = int(np.argmin(free_ms))
        sent_ms = free_ms[slot]
        tokens_ms = sent_ms + 30 + 10 * np.arange(random.integers(10, 71))
        free_ms[slot] = float(tokens_ms[-1])
        phase = Phase.WARM_UP if index < 80 else Phase.MEASURED if index < 112 else Phase.AFTER
        requests.append(timing(sent_ms, tokens_ms.tolist(), phase=phase))
    return requests


def test_an_overloaded_open_loop_shows_what_the_server_does_and_not_what_is_sent() -> None:
    """One request of 10 tokens is served each 100 ms, two are sent: the queue grows, the rate does not."""
    requests = [
        timing(
            50 * index,
            [100 * index + 10 * k for k in range(1, 11)],
            phase=Phase.WARM_UP if index < 20 else Phase.MEASURED if index < 60 else Phase.AFTER,
        )
        for index in range(120)
    ]
    metrics = figures(*requests)
    assert metrics.requests_per_s == pytest.approx(10, rel=0.02)
    assert metrics.output_tokens_per_s == pytest.approx(100, rel=0.02)


def test_goodput_counts_requests_that_meet_every_slo() -> None:
    requests = [
        timing(0, [40, 50, 60], index=0),
        timing(0, [40, 70, 100], index=1),  # TPOT 30
        timing(0, [90, 95, 100], index=2),  # TTFT 90
        timing(0, [50, 60, 70], index=3),  # exactly at both limits
    ]
    slos = (Slo(metric="ttft_p99_ms", threshold=50), Slo(metric="tpot_mean_ms", threshold=10))
    metrics = figures(*requests, slos=slos)
    assert metrics.goodput_rps == pytest.approx(metrics.requests_per_s * 2 / 4)


def test_an_slo_on_itl_judges_that_statistic_of_the_requests_own_gaps() -> None:
    latency = request_latency(timing(0, [10, 20, 30, 40, 110]))  # gaps 10 10 10 70
    assert meets(latency, (Slo(metric="itl_p50_ms", threshold=10),))
    assert meets(latency, (Slo(metric="itl_mean_ms", threshold=25),))
    assert not meets(latency, (Slo(metric="itl_mean_ms", threshold=24.9),))
    assert not meets(latency, (Slo(metric="itl_p99_ms", threshold=60),))


def test_an_slo_on_an_aggregate_leaves_goodput_alone() -> None:
    requests = (timing(0, [40, 50, 60]), timing(0, [40, 70, 100]))
    slos = (Slo(metric="output_tokens_per_s", threshold=1e9), Slo(metric="error_rate", threshold=1e-9))
    assert figures(*requests, slos=slos).goodput_rps == figures(*requests).requests_per_s


@pytest.mark.parametrize("metric", [name for name in METRICS if name.split("_")[0] in {"ttft", "tpot", "itl", "e2e"}])
def test_every_latency_metric_can_be_an_slo(metric: str) -> None:
    latency = request_latency(timing(0, [100, 110, 120]))
    assert meets(latency, (Slo(metric=metric, threshold=1000),))
    assert not meets(latency, (Slo(metric=metric, threshold=1),))


def test_nothing_completed_is_said_and_not_divided_by() -> None:
    with pytest.raises(NothingMeasuredError, match=r"none of 1 measured requests completed \(1 failed\)"):
        figures(timing(0, [50, 60], phase=Phase.WARM_UP), timing(10, [], error=ErrorClass.STATUS))
    with pytest.raises(NothingMeasuredError, match="none of 0 measured requests"):
        figures()


def test_an_answer_in_one_piece_is_no_stream() -> None:
    with pytest.raises(NothingMeasuredError, match="must stream its tokens"):
        figures(timing(0, [500], output_tokens=20))


def test_abandoned_requests_are_no_errors() -> None:
    failed = [timing(0, [], error=kind) for kind in ErrorClass]
    counts = failed_by_class(failed)
    assert ErrorClass.ABANDONED not in counts
    assert set(counts) == set(ErrorClass) - {ErrorClass.ABANDONED}


requests_made_up = st.lists(
    st.tuples(
        st.floats(0, 5000),
        st.lists(st.floats(0.1, 200), min_size=2, max_size=20),
        st.sampled_from([None, None, None, ErrorClass.STREAM, ErrorClass.ABANDONED]),
        st.sampled_from(list(Phase)),
    ),
    max_size=12,
)


def _made(specs: list[tuple[float, list[float], ErrorClass | None, Phase]]) -> list[RequestTiming]:
    sure = timing(1000, [1100, 1200, 1300])
    return [sure] + [
        timing(sent, (sent + np.cumsum(gaps)).tolist(), error=error, phase=phase) for sent, gaps, error, phase in specs
    ]


@given(specs=requests_made_up, ttft=st.floats(1, 300), itl=st.floats(1, 300))
@settings(max_examples=100, deadline=None)
def test_laws_of_the_figures(
    specs: list[tuple[float, list[float], ErrorClass | None, Phase]], ttft: float, itl: float
) -> None:
    requests = _made(specs)
    slos = (Slo(metric="ttft_p95_ms", threshold=ttft), Slo(metric="itl_p95_ms", threshold=itl))
    metrics = figures(*requests, slos=slos)
    assert 0 <= metrics.goodput_rps <= metrics.requests_per_s
    assert figures(*requests).goodput_rps == metrics.requests_per_s
    assert 0 <= metrics.error_rate < 1
    for figure in (metrics.ttft_ms, metrics.tpot_ms, metrics.itl_ms, metrics.e2e_ms):
        assert figure.p50 <= figure.p90 <= figure.p95 <= figure.p99
    assert metrics.e2e_ms.mean == pytest.approx(
        metrics.ttft_ms.mean
        + np.mean([sum(request_latency(t).itl_ms) for t in requests if t.phase is Phase.MEASURED and t.completed])
    )


@given(specs=requests_made_up, shift_ns=st.integers(0, 10**12))
@settings(max_examples=50, deadline=None)
def test_figures_do_not_depend_on_when_the_run_began(
    specs: list[tuple[float, list[float], ErrorClass | None, Phase]], shift_ns: int
) -> None:
    requests = _made(specs)
    shifted = [
        replace(t, sent_ns=t.sent_ns + shift_ns, token_ns=tuple(at + shift_ns for at in t.token_ns)) for t in requests
    ]
    assert figures(*shifted).flat() == pytest.approx(figures(*requests).flat())
