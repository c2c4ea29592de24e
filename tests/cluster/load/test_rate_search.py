"""The search for the highest request rate: its bisection by laws, and against a server of known capacity."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from cluster.load import rate_search
from cluster.load.driver import LoadRun
from cluster.load.measure import LoadMeasurement
from cluster.load.rate_search import MOST_PROBES, Bracket, RateRun, search_rate
from search_spaces.errors import InvalidValueError
from search_spaces.measuring import MeasurementRule
from search_spaces.outcome import Failure, FailureReason, Measurement, Probe
from search_spaces.problem import Slo
from search_spaces.workload import Arrival, Length, Load, RateSearch, Workload
from tests.studies.toy import measure, small_space, toy_problem

pytestmark = pytest.mark.timing

SEARCH = RateSearch(lowest=0.05, highest=100.0, tolerance=0.1)


def bisect(search: RateSearch, capacity: float, first: float | None = None) -> tuple[Bracket, list[float]]:
    """Search a server that meets every rate up to `capacity`."""
    bracket, rates = Bracket(search=search, first=first), []
    while (rate := bracket.next_rate()) is not None:
        rates.append(rate)
        assert len(rates) <= MOST_PROBES
        bracket = bracket.told(rate, met=rate <= capacity)
    return bracket, rates


searches = st.builds(
    lambda lowest, decades, tolerance: RateSearch(lowest=lowest, highest=lowest * 10**decades, tolerance=tolerance),
    st.floats(0.001, 1.0),
    st.floats(0.1, 4.0),
    st.floats(0.02, 0.5),
)


@given(searches, st.floats(0.0, 1.0), st.none() | st.floats(1e-4, 1e4))
def test_the_interval_holds_the_capacity_and_is_narrow(search: RateSearch, share: float, first: float | None) -> None:
    capacity = search.lowest * (search.highest / search.lowest) ** share
    bracket, rates = bisect(search, capacity, first)
    assert all(search.lowest * (1 - 1e-9) <= rate <= search.highest * (1 + 1e-9) for rate in rates)
    assert len(set(rates)) == len(rates), "no rate is run twice"
    if bracket.met is not None and bracket.missed is not None:
        assert bracket.met <= capacity < bracket.missed <= bracket.met * (1 + search.tolerance) * (1 + 1e-9)
    elif bracket.missed is None:
        assert bracket.met == pytest.approx(search.highest)


@given(searches)
def test_nothing_and_everything_that_is_met_is_found_so(search: RateSearch) -> None:
    nothing, _ = bisect(search, search.lowest / 2)
    assert (nothing.met, nothing.missed) == (None, pytest.approx(search.lowest))
    everything, _ = bisect(search, 2 * search.highest)
    assert (everything.met, everything.missed) == (pytest.approx(search.highest), None)


def test_a_good_expectation_saves_runs() -> None:
    _, blind = bisect(SEARCH, 7.0)
    _, told = bisect(SEARCH, 7.0, first=6.5)
    assert told[0] == 6.5
    assert len(told) <= 5 < len(blind)


def test_rates_below_one_a_second_are_found() -> None:
    bracket, _ = bisect(SEARCH, 0.13)
    assert bracket.met is not None
    assert bracket.missed is not None
    assert bracket.met <= 0.13 < bracket.missed < 0.15


def test_impossible_searches_are_refused() -> None:
    with pytest.raises(InvalidValueError, match="max=1 must be above min=2"):
        RateSearch(lowest=2, highest=1)
    with pytest.raises(InvalidValueError, match="tolerance=0"):
        RateSearch(lowest=1, highest=2, tolerance=0)
    with pytest.raises(InvalidValueError, match="arrival=closed has none"):
        Workload(isl=Length(mean=8), osl=Length(mean=4), rate_search=SEARCH)


def test_the_interval_of_a_measurement() -> None:
    measurement = measure(small_space(toy_problem()).default())
    assert measurement.highest_rate == (None, None)
    probes = tuple(Probe(request_rate=r, met=m) for r, m in ((4.0, False), (2.0, True), (3.0, None), (2.8, True)))
    assert replace(measurement, probes=probes).highest_rate == (2.8, 4.0)
    assert isinstance(measurement, Measurement)


@contextmanager
def one_line(service_s: float, fail_above: int | None = None) -> Iterator[str]:
    """The URL of a server that answers one request after another: its capacity is 1 / `service_s`.

    With more than `fail_above` requests at once it answers 503.
    """
    loop = asyncio.new_event_loop()
    address: list[str] = []
    ready = threading.Event()

    async def serve() -> web.AppRunner:
        lock, waiting = asyncio.Lock(), [0]

        async def complete(request: web.Request) -> web.StreamResponse:
            body = await request.json()
            if fail_above is not None and waiting[0] >= fail_above:
                return web.Response(status=503, text="too busy")
            waiting[0] += 1
            answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            try:
                async with lock:
                    await asyncio.sleep(service_s)
                await answer.prepare(request)
                for _ in range(body["max_tokens"]):
                    await answer.write(b'data: {"choices": [{"text": "a", "finish_reason": null}]}\n\n')
                    await asyncio.sleep(0.001)
                await answer.write(b"data: [DONE]\n\n")
                await answer.write_eof()
            finally:
                waiting[0] -= 1
            return answer

        app = web.Application()
        app.router.add_post("/v1/completions", complete)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        address.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
        return runner

    def run() -> None:
        asyncio.set_event_loop(loop)
        runner = loop.run_until_complete(serve())
        ready.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait(30)
    try:
        yield address[0]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)


def wanted(url: str, path: Path, *, limit_s: float = 120.0, slo_ms: float = 120.0, **rule: float) -> RateRun:
    run = LoadRun(
        url=url,
        model_name="m",
        workload=Workload(isl=Length(mean=8), osl=Length(mean=4), arrival=Arrival.CONSTANT),
        load=Load(arrival=Arrival.CONSTANT, value=400.0),
        vocab_size=1000,
        seed=3,
        rule=MeasurementRule(**({"requests": 30, "lateness_limit_ms": 2000.0} | rule)),  # type: ignore[arg-type]
        limit_s=limit_s,
        timings_path=path / "request_timings.parquet",
    )
    return RateRun(
        run=run,
        search=RateSearch(lowest=8.0, highest=400.0, tolerance=0.3),
        slos=(Slo(metric="ttft_p99_ms", threshold=slo_ms),),
        devices=2,
        price_per_hour=1.0,
        first=20.0,
    )


def test_the_capacity_of_a_server_is_found_as_an_interval(tmp_path: Path) -> None:
    """Served one by one in 20 ms, 30 requests at 60/s and more wait beyond 120 ms; at 30/s none waits."""
    prepared: list[int] = []
    with one_line(0.02) as url:
        found = search_rate(replace(wanted(url, tmp_path), prepare=lambda: prepared.append(1)))
    assert isinstance(found, LoadMeasurement), found
    assert 3 <= len(found.probes) <= 8
    assert len(prepared) == len(found.probes) - 1, "the deployment is made ready between runs"
    measured = Measurement(metrics=found.metrics, client_lateness_ms=0.0, probes=found.probes)
    met, missed = measured.highest_rate
    assert met is not None
    assert missed is not None
    assert 10 < met < missed <= 1.3 * met * 1.001
    assert missed < 120, "beyond the capacity of 50/s by the few requests that a short run lets wait"
    assert found.metrics == next(p.metrics for p in found.probes if p.request_rate == met)
    assert found.metrics.ttft_ms.p99 <= 120
    assert found.timings_path == tmp_path / "request_timings.parquet"
    assert found.timings_path.is_file()
    assert found.requests_sent >= 33 * len(found.probes), "30 measured and 3 of the warm-up each"


def test_a_server_that_never_meets_the_slo_is_measured_at_the_lowest_rate(tmp_path: Path) -> None:
    with one_line(0.02) as url:
        found = search_rate(wanted(url, tmp_path, slo_ms=10.0, requests=6))
    assert isinstance(found, LoadMeasurement), found
    assert {probe.met for probe in found.probes} == {False}
    assert found.probes[-1].request_rate == 8.0
    assert found.metrics.ttft_ms.p99 > 10


def test_a_server_that_refuses_under_load_is_not_met_there(tmp_path: Path) -> None:
    with one_line(0.02, fail_above=4) as url:
        found = search_rate(wanted(url, tmp_path))
    assert isinstance(found, LoadMeasurement), found
    refused = [probe for probe in found.probes if probe.metrics is None]
    assert refused
    assert all(probe.met is False and "503" in probe.detail for probe in refused)
    assert any(probe.met for probe in found.probes)


def test_a_search_ends_with_what_it_has_when_its_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 0.0, 1e6])
    with one_line(0.005) as url, monkeypatch.context() as patched:
        patched.setattr(rate_search, "time", SimpleNamespace(monotonic=lambda: next(times)))
        found = search_rate(wanted(url, tmp_path))
    assert isinstance(found, LoadMeasurement), found
    assert [probe.request_rate for probe in found.probes] == [20.0]


def test_a_search_whose_first_run_takes_too_long_is_a_timeout(tmp_path: Path) -> None:
    with one_line(0.005) as url:
        none = search_rate(replace(wanted(url, tmp_path, limit_s=1.0), first=8.0))
    assert isinstance(none, Failure)
    assert none.reason is FailureReason.MEASUREMENT_TIMEOUT


def test_a_late_client_says_nothing_of_the_rate(tmp_path: Path) -> None:
    with one_line(0.005) as url:
        found = search_rate(wanted(url, tmp_path, lateness_limit_ms=1e-6, requests=4))
    assert isinstance(found, Failure)
    assert found.reason is FailureReason.LATE_CLIENT


def test_a_server_that_is_gone_fails_the_search(tmp_path: Path) -> None:
    with one_line(0.005) as url:
        pass
    found = search_rate(wanted(url, tmp_path, requests=4))
    assert isinstance(found, Failure)
    assert found.reason is FailureReason.TRANSPORT


def test_a_deployment_that_cannot_be_made_ready_fails_the_search(tmp_path: Path) -> None:
    broken = Failure(reason=FailureReason.TRANSPORT, detail="no reset")
    with one_line(0.005) as url:
        found = search_rate(replace(wanted(url, tmp_path, requests=4), prepare=lambda: broken))
    assert found == broken
