"""Recorded requests: read, cut, scaled, and what they share."""

from __future__ import annotations

import json
from itertools import islice, pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.load.arrivals import traced_times_s
from cluster.load.prompts import sessions_of
from cluster.load.traces import TracedRequest, held_share, traced_requests, traced_workload
from search_spaces.errors import InvalidValueError
from search_spaces.workload import Arrival, Load, TraceFormat

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.2224670,879,0
2024-05-10 00:00:00.009930+00:00,2162,5
"""


def test_azures_csv(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(AZURE)
    workload = traced_workload(str(path), TraceFormat.AZURE, window_s=60)
    assert workload.trace is not None
    requests = traced_requests(workload.trace)
    assert [r.input_tokens for r in requests] == [374, 396, 879]
    assert [r.output_tokens for r in requests] == [44, 109, 2], "at least two tokens are asked for"
    assert [r.at_s for r in requests] == pytest.approx([0, 4.314579, 4.541877])
    assert workload.shared_prefix == 0.0
    assert workload.trace.request_rate == pytest.approx(2 / 4.541877)


def test_mooncakes_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "mooncake.jsonl"
    rows = [
        {"timestamp": 3000, "input_length": 1030, "output_length": 5, "hash_ids": [1, 2, 4]},
        {"timestamp": 1000, "input_length": 1030, "output_length": 5, "hash_ids": [1, 2, 3]},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    workload = traced_workload(str(path), TraceFormat.MOONCAKE)
    assert workload.trace is not None
    first, second = traced_requests(workload.trace)
    assert (first.at_s, second.at_s) == (0.0, 2.0)
    assert second.blocks == (1, 2, 4)
    assert workload.shared_prefix == pytest.approx(1024 / 2060)
    sessions = sessions_of(workload, range(100, 900), 7, (first, second))
    (one,), (other,), (again,) = (sessions.session(number) for number in range(3))
    assert len(one.prompt) == len(other.prompt) == 1030
    assert one.prompt[:1024] == other.prompt[:1024]
    assert one.prompt[1024:] != other.prompt[1024:]
    assert again.prompt[:512] != one.prompt[:512], "the next round has tokens of its own"
    (same,) = sessions_of(workload, range(100, 900), 7, (first, second)).session(1)
    assert same == other


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        (TraceFormat.MOONCAKE, '{"timestamp": 1, "input_length": 3}\n', r"line 1: no request"),
        (TraceFormat.MOONCAKE, "[]\n", "line 1"),
        (TraceFormat.MOONCAKE, '{"timestamp": 1, "input_length": 0, "output_length": 3}\n', "0 input"),
        (TraceFormat.AZURE, "a,b\n1,2\n", "has the columns"),
        (TraceFormat.AZURE, AZURE.replace("396", "many"), "line 3"),
        (TraceFormat.AZURE, AZURE.splitlines()[0] + "\n", "has 0 requests"),
    ],
)
def test_what_is_no_trace_is_told_with_its_line(kind: TraceFormat, text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(InvalidValueError, match=words):
        traced_workload(str(path), kind)


@settings(deadline=None)  # other processes may have the machine
@given(st.lists(st.floats(0, 1e5), min_size=2, max_size=30, unique=True), st.floats(0.01, 1000))
def test_a_scaled_trace_has_the_rate_that_is_asked_for(times: list[float], rate: float) -> None:
    times = sorted(times)
    if times[-1] - times[0] < 1e-3:
        return
    load = Load(arrival=Arrival.TRACE, value=rate)
    sent = list(islice(traced_times_s(load, times), 3 * len(times)))
    assert sent[0] == 0.0
    assert sent == sorted(sent)
    assert (len(times) - 1) / sent[len(times) - 1] == pytest.approx(rate)
    assert 3 * len(times) / (sent[-1] + 1 / rate) == pytest.approx(rate), "over all rounds too"
    gaps = [(b - a) / (times[-1] - times[0]) for a, b in pairwise(times)]
    scaled = [(b - a) / sent[len(times) - 1] for a, b in pairwise(sent[: len(times)])]
    assert scaled == pytest.approx(gaps, abs=1e-6), "gaps keep their proportions"


def test_a_closed_loop_follows_no_trace() -> None:
    with pytest.raises(InvalidValueError, match="cannot follow"):
        traced_times_s(Load(arrival=Arrival.CLOSED, value=4), [0.0, 1.0])
    with pytest.raises(InvalidValueError, match="cannot follow"):
        traced_times_s(Load(arrival=Arrival.TRACE, value=4), [1.0, 1.0])


def test_what_an_earlier_request_held_counts_once_for_each_request() -> None:
    requests = [TracedRequest(0, 512, 2, (1,)), TracedRequest(1, 600, 2, (1, 2)), TracedRequest(2, 600, 2, (1, 2))]
    assert held_share(requests) == pytest.approx((512 + 600) / 1712)
    assert held_share([]) == 0.0
