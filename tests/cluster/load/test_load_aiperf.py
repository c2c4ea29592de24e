"""AIPerf as a second client: what it is told, how its records are read, and a run of it where it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.load.agreement import agreement, agreements
from cluster.load.aiperf import Aiperf, AiperfError, aiperf_measure, find_aiperf, timings_of
from cluster.load.client import completion_body
from cluster.load.driver import LoadRun
from cluster.load.measure import LoadMeasurement, measure
from cluster.load.prompts import Prompts, ordinary_ids
from cluster.load.summary import request_latency
from cluster.load.timings import ErrorClass, Phase
from search_spaces.errors import InvalidValueError
from search_spaces.measuring import MeasurementRule
from search_spaces.workload import Arrival, Conversation, Length, Load, Workload
from tests.support.timed_server import Behaviour, timed_server

pytestmark = pytest.mark.timing

WORKLOAD = Workload(isl=Length(mean=64, spread=0.25), osl=Length(mean=16))


def run_of(url: str, folder: Path, workload: Workload = WORKLOAD, **changes: Any) -> LoadRun:
    values = {
        "url": url,
        "model_name": "timed",
        "workload": workload,
        "load": Load(arrival=Arrival.CLOSED, value=2),
        "vocab_size": 1000,
        "seed": 4,
        "rule": MeasurementRule(requests=16, lateness_limit_ms=2000.0),
        "limit_s": 120.0,
        "timings_path": folder / "timings.parquet",
    }
    return LoadRun(**values | changes)  # type: ignore[arg-type]  # keywords of the class


def record(start_ms: float, ttft_ms: float, gaps_ms: list[float], error: object = None) -> str:
    metrics = {
        "time_to_first_token": {"value": ttft_ms, "unit": "ms"},
        "inter_chunk_latency": {"value": gaps_ms, "unit": "ms"},
        "output_sequence_length": {"value": len(gaps_ms) + 1, "unit": "tokens"},
        "input_sequence_length": {"value": 64, "unit": "tokens"},
        "http_req_connecting": {"value": 0.5, "unit": "ms"},
    }
    start_ns = 1_700_000_000_000_000_000 + round(start_ms * 1e6)
    metadata = {
        "request_start_ns": start_ns,
        "credit_issued_ns": start_ns - 2_000_000,
        "request_end_ns": start_ns + 10**9,
    }
    return json.dumps({"metadata": metadata, "metrics": {} if error else metrics, "error": error})


def test_records_are_read_in_our_terms(tmp_path: Path) -> None:
    run = run_of("http://127.0.0.1:1", tmp_path, rule=MeasurementRule(requests=2, warm_up_share=0.0))
    lines = [record(30, 50, [10, 12]), record(0, 40, [9, 9]), record(10, 45, [11]), record(20, 0, [], {"code": 500})]
    timings = timings_of([*lines, record(40, 51, [10])], run).requests
    assert [t.phase for t in timings] == [Phase.WARM_UP] * 2 + [Phase.MEASURED] * 2 + [Phase.AFTER]
    assert [t.error for t in timings] == [None, None, ErrorClass.STATUS, None, None]
    first = request_latency(timings[0])
    assert (first.ttft_ms, first.tpot_ms, first.e2e_ms) == (40.0, 9.0, 58.0)
    assert request_latency(timings[3]).itl_ms == (10.0, 12.0)
    assert {t.lateness_ns for t in timings} == {2_000_000}
    assert timings[0].connect_ns == 500_000


@pytest.mark.parametrize("line", ['{"metadata": {}}', '{"metadata": {"request_start_ns": 1, "credit_issued_ns": 1}}'])
def test_records_of_another_version_are_told(line: str, tmp_path: Path) -> None:
    with pytest.raises(AiperfError, match=r"use AIPerf 0\.13\.0"):
        timings_of([line], run_of("http://127.0.0.1:1", tmp_path))
    with pytest.raises(AiperfError, match="recorded no request"):
        timings_of([], run_of("http://127.0.0.1:1", tmp_path))


def test_loads_that_it_cannot_put_on(tmp_path: Path) -> None:
    nowhere = Aiperf(program="/nonexistent/aiperf")
    talk = Conversation(turns=Length(mean=2), new_isl=Length(mean=8), osl=Length(mean=4), think_time_s=1.0)
    for changes, words in (
        ({"workload": talk.workload(Arrival.CLOSED)}, "think"),
        ({"api_key": "secret"}, "command line"),
    ):
        run = run_of("http://127.0.0.1:1", tmp_path, **changes)
        with pytest.raises(InvalidValueError, match=words):
            aiperf_measure(run, nowhere, tmp_path, slos=(), devices=1, price_per_hour=0.0)


def test_where_it_is_missing_the_way_to_it_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("TUNER_AIPERF", raising=False)
    with pytest.raises(AiperfError, match=r"scripts/aiperf_env\.sh"):
        find_aiperf()
    monkeypatch.setenv("TUNER_AIPERF", "/nonexistent/aiperf")
    with pytest.raises(AiperfError, match="/nonexistent/aiperf is no program"):
        find_aiperf()


def test_two_clients_agree_within_their_noise_and_not_beyond() -> None:
    same = agreement("ttft_p50_ms", [50.0, 51.0, 49.0], [50.5, 49.5, 51.5])
    assert (same.within_noise, same.verdict) == (True, "within noise")
    close = agreement("tpot_p50_ms", [10.0, 10.001, 9.999], [10.1, 10.101, 10.099])
    assert (close.within_noise, close.verdict) == (False, "within 2%")
    other = agreement("ttft_p50_ms", [50.0, 51.0, 49.0], [60.0, 61.0, 59.0])
    assert (other.within_noise, other.verdict) == (False, "differ")
    assert other.low < other.ratio < other.high
    assert other.ratio == pytest.approx(1.2, rel=0.01)
    with pytest.raises(InvalidValueError, match="two runs"):
        agreement("ttft_p50_ms", [50.0], [50.0])


def installed() -> Aiperf:
    try:
        return find_aiperf()
    except AiperfError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_aiperf_sends_the_same_requests_and_sees_the_same_server(tmp_path: Path) -> None:
    aiperf = installed()
    with timed_server(Behaviour(ttft_ms=60, itl_ms=8)) as server:
        run = run_of(server.url, tmp_path)
        theirs = aiperf_measure(run, aiperf, tmp_path / "aiperf", slos=(), devices=1, price_per_hour=0.0)
        sent = [truth.prompt for truth in server.truths()]
        server.reset()
        ours = measure(run, slos=(), devices=1, price_per_hour=0.0)
    assert isinstance(theirs, LoadMeasurement), theirs
    assert isinstance(ours, LoadMeasurement), ours
    prompts = Prompts(workload=WORKLOAD, vocabulary=ordinary_ids(1000), seed=4)
    planned = [prompts.request(index).prompt for index in range(len(sent))]
    assert len(sent) == 2 + 16 + 2
    assert sorted(map(tuple, sent)) == sorted(map(tuple, planned))
    assert theirs.metrics.requests == ours.metrics.requests == 16
    assert theirs.metrics.errors == 0
    assert theirs.metrics.tpot_ms.p50 == pytest.approx(ours.metrics.tpot_ms.p50, rel=0.1)
    assert 55 <= theirs.metrics.ttft_ms.p50 <= 60 + 150, "its client adds some, and a busy machine more"
    assert len(agreements([ours.metrics.flat()] * 2, [theirs.metrics.flat()] * 2)) == 6
    assert completion_body("timed", [1], 2), "the bodies are those of the built-in client"
