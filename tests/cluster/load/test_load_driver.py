"""A whole run against a server of known timing: loads, phases, limits, the validity gate."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from cluster.load.driver import LoadResult, LoadRun, run_load, warm_up_requests
from cluster.load.measure import LoadMeasurement, judge, measure
from cluster.load.timings import ErrorClass, Phase, RequestTiming, Timings, read_timings
from search_spaces.errors import InvalidValueError
from search_spaces.measuring import MeasurementRule
from search_spaces.outcome import Failure, FailureReason
from search_spaces.problem import Slo
from search_spaces.workload import Arrival, Length, Load, Workload
from tests.support.load_timings import timing
from tests.support.timed_server import Behaviour, Fault, TimedServer, Truth, timed_server

pytestmark = pytest.mark.timing

ON_TIME_ENOUGH_MS = 2000.0
"""For runs that are not about punctuality: a busy machine must not fail them."""


def load_run(
    url: str, path: Path, load: Load, *, requests: int = 16, osl: int = 8, limit_s: float = 60.0, **rule: float
) -> LoadRun:
    return LoadRun(
        url=url,
        model_name="timed",
        workload=Workload(isl=Length(mean=64, spread=0.25), osl=Length(mean=osl)),
        load=load,
        vocab_size=1000,
        seed=11,
        rule=MeasurementRule(requests=requests, **{"lateness_limit_ms": ON_TIME_ENOUGH_MS, **rule}),
        limit_s=limit_s,
        timings_path=path / "timings.parquet",
        request_limit_s=20.0,
    )


def closed(concurrency: int) -> Load:
    return Load(arrival=Arrival.CLOSED, value=concurrency)


def judged(run: LoadRun, slos: Sequence[Slo] = ()) -> LoadMeasurement | Failure:
    return measure(run, slos=slos, devices=2, price_per_hour=3.6)


def in_flight(truths: Sequence[Truth]) -> int:
    """Most requests that the server held at once."""
    marks = sorted([(t.received_ns, 1) for t in truths] + [(t.end_ns, -1) for t in truths if t.end_ns])
    return int(max(np.cumsum([step for _, step in marks])))


def by_index(truths: Sequence[Truth]) -> dict[int, Truth]:
    return {int(truth.request_id.rpartition("-")[2]): truth for truth in truths}


@pytest.mark.parametrize("concurrency", [1, 5])
async def test_a_closed_loop_keeps_exactly_its_concurrency_in_flight(concurrency: int, tmp_path: Path) -> None:
    with timed_server(Behaviour(ttft_ms=20, itl_ms=5)) as server:
        result = await run_load(load_run(server.url, tmp_path, closed(concurrency)))
        truths = server.truths()
    assert in_flight(truths) == concurrency
    assert all(timing.completed for timing in result.timings.of_phase(Phase.MEASURED))


async def test_requests_are_those_of_the_seed(tmp_path: Path) -> None:
    prompts = []
    for _ in range(2):
        with timed_server(Behaviour(ttft_ms=1, itl_ms=1)) as server:
            await run_load(load_run(server.url, tmp_path, closed(4)))
            truths = by_index(server.truths())
            prompts.append([truths[index].prompt for index in range(20)])
    assert prompts[0] == prompts[1]
    assert {len(prompt) for prompt in prompts[0]} <= set(range(48, 81))


async def test_an_open_loop_sends_on_schedule_whatever_the_server_does(tmp_path: Path) -> None:
    """40 requests a second to a server that takes 1.5 s for each: 60 in flight, sent evenly all the same."""
    load = Load(arrival=Arrival.CONSTANT, value=40)
    with timed_server(Behaviour(ttft_ms=1500, itl_ms=1)) as server:
        result = await run_load(load_run(server.url, tmp_path, load, requests=60))
        truths = server.truths()
    measured = result.timings.of_phase(Phase.MEASURED)
    assert np.diff([timing.scheduled_ns for timing in measured]) == pytest.approx(25e6, abs=1)
    assert np.median(np.diff([timing.sent_ns for timing in measured])) == pytest.approx(25e6, rel=0.1)
    assert 0 <= np.median([timing.lateness_ns for timing in measured]) < 5e6
    assert in_flight(truths) > 50


async def test_poisson_arrivals_reach_the_server_at_the_rate(tmp_path: Path) -> None:
    load = Load(arrival=Arrival.POISSON, value=100)
    with timed_server(Behaviour(ttft_ms=1, itl_ms=1)) as server:
        result = await run_load(load_run(server.url, tmp_path, load, requests=300, osl=2))
        received = sorted(truth.received_ns for truth in server.truths())
    gaps_s = np.diff(received) / 1e9
    planned_s = np.diff([timing.scheduled_ns for timing in result.timings.requests]) / 1e9
    assert gaps_s.mean() == pytest.approx(0.010, rel=0.2)  # three standard errors of 300 exponential gaps
    assert gaps_s.mean() == pytest.approx(planned_s.mean(), rel=0.02)
    assert gaps_s.std() == pytest.approx(planned_s.std(), rel=0.2)


@pytest.mark.parametrize(
    ("share", "requests", "load", "expected"),
    [
        (0.1, 64, closed(4), 7),
        (0.1, 64, closed(32), 32),
        (0.0, 64, closed(1), 1),
        (0.25, 10, Load(arrival=Arrival.POISSON, value=100), 3),
        (0.0, 10, Load(arrival=Arrival.CONSTANT, value=5), 0),
    ],
)
def test_the_warm_up_is_the_larger_of_share_and_requests_in_flight(
    share: float, requests: int, load: Load, expected: int
) -> None:
    assert warm_up_requests(MeasurementRule(requests=requests, warm_up_share=share), load) == expected


async def test_phases_follow_the_rule_and_the_load_goes_on_until_the_last_measured_request_has_ended(
    tmp_path: Path,
) -> None:
    with timed_server(Behaviour(ttft_ms=20, itl_ms=5, jitter=0.4, seed=3)) as server:
        result = await run_load(load_run(server.url, tmp_path, closed(4), requests=12, warm_up_share=0.5))
    phases = [timing.phase for timing in result.timings.requests]
    assert phases[:18] == [Phase.WARM_UP] * 6 + [Phase.MEASURED] * 12
    assert set(phases[18:]) == {Phase.AFTER}
    measured = result.timings.of_phase(Phase.MEASURED)
    assert all(timing.completed for timing in measured)
    last_end = max(timing.end_ns for timing in measured)
    sent = sum(timing.sent_ns < last_end for timing in result.timings.requests)
    ended = sum(timing.end_ns < last_end - 50_000_000 for timing in result.timings.requests)
    assert sent >= 4 + ended  # four at first, and one more for each that ended, though nothing was left to measure
    assert len(result.timings.of_phase(Phase.AFTER)) >= 2
    assert {timing.error for timing in result.timings.of_phase(Phase.AFTER)} <= {None, ErrorClass.ABANDONED}


async def test_progress_counts_every_request_of_warm_up_and_measurement(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    with timed_server(Behaviour(ttft_ms=2, itl_ms=1)) as server:
        await run_load(load_run(server.url, tmp_path, closed(3)), lambda done, total: seen.append((done, total)))
    assert seen == [(done, 19) for done in range(1, 20)]


def test_a_measurement_has_every_figure_and_its_raw_timings(tmp_path: Path) -> None:
    with timed_server(Behaviour(ttft_ms=20, itl_ms=4)) as server:
        outcome = judged(
            load_run(server.url, tmp_path, closed(4), requests=24, osl=20), [Slo(metric="ttft_p99_ms", threshold=5000)]
        )
    assert isinstance(outcome, LoadMeasurement), outcome
    metrics = outcome.metrics
    assert metrics.requests == 24
    assert metrics.goodput_rps == metrics.requests_per_s
    assert metrics.requests_per_s == pytest.approx(4 / (metrics.e2e_ms.mean / 1e3), rel=0.1)
    assert metrics.input_tokens_per_s == pytest.approx(64 * metrics.requests_per_s, rel=0.1)
    assert metrics.output_tokens_per_s == pytest.approx(20 * metrics.requests_per_s, rel=0.01)
    assert metrics.devices == 2
    assert outcome.errors_by_class == {}
    assert outcome.connect_p99_ms == 0
    assert outcome.warm_up_s > 0.09
    assert outcome.measure_s == pytest.approx(metrics.duration_s, abs=0.05)
    stored = read_timings(outcome.timings_path)
    assert len(stored.requests) == outcome.requests_sent
    assert abs(stored.start_epoch_ns / 1e9 - time.time()) < 60


def test_few_errors_are_counted_and_left_out_of_the_latencies(tmp_path: Path) -> None:
    behaviour = Behaviour(ttft_ms=20, itl_ms=2, fault=Fault.DROP, fault_every=8)
    with timed_server(behaviour) as server:
        outcome = judged(load_run(server.url, tmp_path, closed(4), requests=32, error_limit=0.2))
    assert isinstance(outcome, LoadMeasurement), outcome
    assert outcome.errors_by_class == {ErrorClass.STREAM: 4}
    assert (outcome.metrics.requests, outcome.metrics.errors) == (28, 4)
    assert outcome.metrics.error_rate == pytest.approx(0.125)
    assert outcome.metrics.e2e_ms.p50 > 34


def test_many_errors_are_a_failure_that_names_the_first_and_spares_the_rest(tmp_path: Path) -> None:
    behaviour = Behaviour(ttft_ms=20, itl_ms=2, fault=Fault.HTTP_500, fault_every=2)
    with timed_server(behaviour) as server:
        run = load_run(server.url, tmp_path, closed(2), requests=1000)
        failure = judged(run)
    assert isinstance(failure, Failure)
    assert failure.reason is FailureReason.REQUESTS_FAILED
    assert "51 of 1000 measured requests failed (51 status)" in failure.detail
    assert "injected failure" in failure.detail
    assert failure.timings_s["warm_up"] > 0
    stored = read_timings(Path(failure.artifacts["request_timings"]))
    assert len(stored.requests) < 220


def test_answers_that_are_too_short_are_errors(tmp_path: Path) -> None:
    async def short(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        event = 'data: {"choices": [{"text": "a", "finish_reason": "stop"}], "usage": {"completion_tokens": 1}}\n\n'
        await reader.readuntil(b"max_tokens")
        writer.write(f"HTTP/1.1 200 OK\r\n\r\n{event}data: [DONE]\n\n".encode())
        writer.close()

    async def main() -> LoadResult:
        server = await asyncio.start_server(short, "127.0.0.1", 0)
        async with server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            return await run_load(load_run(url, tmp_path, closed(1), requests=4, error_limit=1))

    measured = asyncio.run(main()).timings.of_phase(Phase.MEASURED)
    assert {timing.error for timing in measured} == {ErrorClass.SHORT}
    assert "1 of 8 tokens came; the engine must heed ignore_eos" in measured[0].error_text


def test_a_server_that_is_gone_is_a_matter_of_transport(tmp_path: Path) -> None:
    with timed_server() as server:
        url = server.url
    failure = judged(load_run(url, tmp_path, closed(4)))
    assert isinstance(failure, Failure)
    assert failure.reason is FailureReason.TRANSPORT
    assert failure.retryable
    assert "no connection to 127.0.0.1:" in failure.detail


def test_a_run_over_its_limit_ends_there_and_says_how_far_it_came(tmp_path: Path) -> None:
    with timed_server(Behaviour(ttft_ms=300, itl_ms=1)) as server:
        began = time.monotonic()
        failure = judged(load_run(server.url, tmp_path, closed(1), requests=500, limit_s=1.5, warm_up_share=0))
    assert time.monotonic() - began < 60, "500 requests of 300 ms one after another take 150 s"
    assert isinstance(failure, Failure)
    assert failure.reason is FailureReason.MEASUREMENT_TIMEOUT
    assert "of 500 measured requests (and 1 of 1 of the warm-up) had ended after 1.5 s" in failure.detail
    assert 0 < len(read_timings(tmp_path / "timings.parquet").requests) <= 6


def test_a_limit_that_strikes_in_the_warm_up_tells_of_its_errors(tmp_path: Path) -> None:
    with timed_server(Behaviour(ttft_ms=5, itl_ms=1, fault=Fault.SILENT, fault_every=2)) as server:
        failure = judged(load_run(server.url, tmp_path, closed(2), limit_s=0.8))
    assert isinstance(failure, Failure)
    assert failure.reason is FailureReason.MEASUREMENT_TIMEOUT
    assert set(failure.timings_s) == {"warm_up", "measure"}


@pytest.mark.parametrize(("answers", "is_measured"), [([[5, 5, 5], [9, 9, 9]], False), ([[5, 5, 5], [9, 9, 12]], True)])
def test_answers_that_were_read_at_one_moment_are_no_measurement(
    answers: list[list[float]], is_measured: bool, tmp_path: Path
) -> None:
    requests = tuple(timing(0, at) for at in answers)
    result = LoadResult(timings=Timings(start_epoch_ns=0, start_monotonic_ns=0, requests=requests), loop_lag_ns=())
    outcome = judge(load_run("http://127.0.0.1:1", tmp_path, closed(1)), result, slos=(), devices=1, price_per_hour=0.0)
    if is_measured:
        assert isinstance(outcome, LoadMeasurement)
        assert outcome.metrics.flat()["output_tokens_per_s_per_user"] > 0
    else:
        assert isinstance(outcome, Failure)
        assert outcome.reason is FailureReason.LATE_CLIENT
        assert "all events of each of 2 answers were read at one moment" in outcome.detail


def test_a_late_client_is_no_measurement(tmp_path: Path) -> None:
    """The callback holds the event loop up, as a starved machine would."""
    with timed_server(Behaviour(ttft_ms=5, itl_ms=2)) as server:
        run = load_run(server.url, tmp_path, closed(2), requests=12, lateness_limit_ms=20)
        failure = measure(run, slos=(), devices=1, price_per_hour=0, progress=lambda *_: time.sleep(0.06))
    assert isinstance(failure, Failure)
    assert failure.reason is FailureReason.LATE_CLIENT
    assert failure.retryable
    assert "over its limit of 20 ms" in failure.detail


async def test_a_cancelled_run_ends_at_once(tmp_path: Path) -> None:
    with timed_server(Behaviour(ttft_ms=60_000)) as server:
        task = asyncio.create_task(run_load(load_run(server.url, tmp_path, closed(8))))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 2.0)
    assert len(asyncio.all_tasks()) == 1


async def test_a_callback_that_raises_ends_the_run_with_its_error(tmp_path: Path) -> None:
    def broken(done: int, total: int) -> None:
        raise RuntimeError(f"no place for {done}/{total}")

    with (
        timed_server(Behaviour(ttft_ms=2, itl_ms=1)) as server,
        pytest.raises(RuntimeError, match=r"no place for \d/20"),
    ):
        await asyncio.wait_for(run_load(load_run(server.url, tmp_path, closed(4)), broken), 10)


async def test_the_collector_is_still_while_the_load_is_on_and_runs_again_after(tmp_path: Path) -> None:
    states: list[bool] = []
    with timed_server(Behaviour(ttft_ms=2, itl_ms=1)) as server:
        await run_load(load_run(server.url, tmp_path, closed(2)), lambda *_: states.append(gc.isenabled()))
    assert not any(states)
    assert gc.isenabled()


def test_a_run_with_impossible_limits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match="limit_s=0 must be above 0"):
        load_run("http://127.0.0.1:1", tmp_path, closed(1), limit_s=0)


def errors_ms(server: TimedServer, timings: Sequence[RequestTiming]) -> np.ndarray:
    """What the client adds to each request's TTFT: its own, less the server's."""
    truths = by_index(server.truths())
    own = [timing.token_ns[0] - timing.sent_ns for timing in timings]
    true = [truths[timing.index].token_ns[0] - truths[timing.index].received_ns for timing in timings]
    return (np.array(own) - np.array(true)) / 1e6


def gaps_ms(streams: Sequence[Sequence[int]]) -> np.ndarray:
    return np.concatenate([np.diff(stream) for stream in streams]) / 1e6


async def test_at_concurrency_16_ttft_is_within_3_ms_and_itl_within_2_percent_of_the_servers_truth(
    tmp_path: Path,
) -> None:
    """The claim is about the client's own error, so it is held against what the server did, request by request."""
    with timed_server(Behaviour(ttft_ms=50, itl_ms=10, jitter=0.2, seed=1)) as server:
        result = await run_load(load_run(server.url, tmp_path, closed(16), requests=96, osl=40))
        measured = result.timings.of_phase(Phase.MEASURED)
        errors = errors_ms(server, measured)
        truths = by_index(server.truths())
    assert 0 < np.median(errors) < 3
    assert np.mean(errors) < 3
    own = gaps_ms([timing.token_ns for timing in measured])
    true = gaps_ms([truths[timing.index].token_ns for timing in measured])
    assert np.median(own) == pytest.approx(np.median(true), rel=0.02)
    assert np.mean(own) == pytest.approx(np.mean(true), rel=0.02)
    assert np.percentile(own, 90) == pytest.approx(np.percentile(true, 90), rel=0.05)
