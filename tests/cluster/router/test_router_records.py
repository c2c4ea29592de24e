"""What the router remembers, and what it reads of an engine's answers."""

from __future__ import annotations

import pytest

from cluster.router.records import KEPT, Ending, Record, Records, summary
from cluster.router.replies import last_timings

TIMINGS = b'"timings":{"cache_n":9,"prompt_n":1,"prompt_ms":2.5,"predicted_n":4,"predicted_ms":8.0}'


def test_summary_counts_completed_requests_only() -> None:
    records = [Record(started_ns=i, ending=Ending.COMPLETED, save_ms=float(i)) for i in range(1, 101)]
    records.append(Record(started_ns=0, ending=Ending.FAILED, save_ms=1e6))
    records.append(Record(started_ns=0, ending=Ending.COMPLETED, decode_prompt_n=1))
    figures = summary(records)
    assert figures["save_ms"] == pytest.approx(
        {"count": 100, "mean": 50.5, "max": 100, "p50": 50.5, "p90": 90.1, "p95": 95.05, "p99": 99.01}
    )
    assert figures["decode_prompt_n"]["count"] == 1
    assert "restore_ms" not in figures


def test_records_are_bounded_and_counted() -> None:
    records = Records()
    for number in range(KEPT + 5):
        records.add(Record(started_ns=number), Ending.COMPLETED)
    records.add(Record(started_ns=KEPT + 5), Ending.FAILED, "why")
    assert records.endings == {Ending.COMPLETED: KEPT + 5, Ending.FAILED: 1}
    assert len(records.since(0)) == KEPT
    (last,) = records.since(KEPT + 5)
    assert last.error == "why"


@pytest.mark.parametrize(
    "tail",
    [
        b'data: {"choices":[]}\n\ndata: {"choices":[],' + TIMINGS + b"}\n\ndata: [DONE]\n\n",
        b'{"choices":[],' + TIMINGS + b"}",
    ],
)
def test_timings_are_found_in_streamed_and_whole_answers(tail: bytes) -> None:
    timings = last_timings(tail)
    assert timings is not None
    assert (timings.prompt_n, timings.cache_n, timings.predicted_ms) == (1, 9, 8.0)


@pytest.mark.parametrize(
    "tail", [b"", b"data: [DONE]\n\n", b'ices":[],' + TIMINGS + b"}\n\n", b'data: {"timings":{"cache_n":1}}']
)
def test_a_tail_without_whole_timings_gives_none(tail: bytes) -> None:
    assert last_timings(tail) is None
