"""Conversations and traces against a server that records what it is sent."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from cluster.load.driver import LoadRun, run_load
from cluster.load.measure import LoadMeasurement, measure
from cluster.load.prompts import Conversations
from cluster.load.timings import Phase
from cluster.load.traces import traced_workload
from search_spaces.measuring import MeasurementRule
from search_spaces.outcome import Failure, FailureReason
from search_spaces.workload import Arrival, Conversation, Length, Load, TraceFormat, Workload
from tests.support.timed_server import Behaviour, Truth, timed_server

pytestmark = pytest.mark.timing

SHAPE = Conversation(
    turns=Length(mean=3, spread=0.4), new_isl=Length(mean=20, spread=0.5), osl=Length(mean=6), shared_prefix=0.4
)


def conversations(**changes: object) -> Conversations:
    values = {"conversation": SHAPE, "vocabulary": range(10, 500), "seed": 3} | changes
    return Conversations(**values)  # type: ignore[arg-type]  # keywords of the class


def test_a_turn_begins_with_all_that_was_said() -> None:
    for number in range(20):
        turns = conversations().session(number)
        assert 2 <= len(turns) <= 4
        for before, after in pairwise(turns):
            assert after.prompt[: len(before.prompt)] == before.prompt
            new = len(after.prompt) - len(before.prompt) - before.output_tokens
            assert SHAPE.new_isl.shortest <= new <= SHAPE.new_isl.longest
        assert conversations().session(number) == turns


def test_conversations_share_only_their_common_prefix() -> None:
    firsts = [conversations().session(number)[0].prompt for number in range(50)]
    shortest = min(round(0.4 * len(prompt)) for prompt in firsts)
    assert len({tuple(prompt[:shortest]) for prompt in firsts}) == 1
    assert len({prompt[round(0.4 * len(prompt))] for prompt in firsts}) == len(firsts)


def test_the_figures_of_a_conversation_are_those_of_what_is_drawn() -> None:
    drawn = [turn for number in range(3000) for turn in conversations().session(number)]
    mean, _ = SHAPE.inputs
    assert sum(len(turn.prompt) for turn in drawn) / len(drawn) == pytest.approx(mean, rel=0.1)
    assert max(len(turn.prompt) + turn.output_tokens for turn in drawn) <= SHAPE.longest_context


def run_of(url: str, folder: Path, workload: Workload, load: Load, **rule: float) -> LoadRun:
    return LoadRun(
        url=url,
        model_name="timed",
        workload=workload,
        load=load,
        vocab_size=1000,
        seed=5,
        rule=MeasurementRule(**{"requests": 16, "lateness_limit_ms": 2000.0} | rule),  # type: ignore[arg-type]  # numbers
        limit_s=60.0,
        timings_path=folder / "timings.parquet",
    )


def closed(concurrency: int) -> Load:
    return Load(arrival=Arrival.CLOSED, value=concurrency)


def sessions(truths: list[Truth]) -> list[list[Truth]]:
    """Requests of each conversation in the order in which they came: a turn holds the prompt of the one before."""
    found: list[list[Truth]] = []
    for truth in sorted(truths, key=lambda t: t.received_ns):
        for turns in found:
            last = turns[-1].prompt
            if len(truth.prompt) > len(last) and truth.prompt[: len(last)] == last:
                turns.append(truth)
                break
        else:
            found.append([truth])
    return found


async def test_a_turn_is_sent_when_the_answer_has_ended_and_was_thought_about(tmp_path: Path) -> None:
    talk = replace(SHAPE, think_time_s=0.15)
    with timed_server(Behaviour(ttft_ms=20, itl_ms=2)) as server:
        await run_load(run_of(server.url, tmp_path, talk.workload(Arrival.CLOSED), closed(2)))
        found = sessions(server.truths())
    assert any(len(turns) >= 2 for turns in found)
    for turns in found:
        for before, after in pairwise(turns):
            assert before.end_ns is not None
            waited_s = (after.received_ns - before.end_ns) / 1e9
            assert 0.145 <= waited_s < 1.0


async def test_conversations_arrive_so_that_requests_come_at_the_rate(tmp_path: Path) -> None:
    """30 requests/s are 10 conversations/s of 3 turns: over 90 requests the mean is known to some 20%."""
    talk = replace(SHAPE, turns=Length(mean=3))
    load = Load(arrival=Arrival.CONSTANT, value=30.0)
    with timed_server(Behaviour(ttft_ms=5, itl_ms=1)) as server:
        result = await run_load(run_of(server.url, tmp_path, talk.workload(Arrival.CONSTANT), load, requests=80))
    sent = [timing.sent_ns / 1e9 for timing in result.timings.of_phase(Phase.MEASURED)]
    assert (len(sent) - 1) / (sent[-1] - sent[0]) == pytest.approx(30, rel=0.25)


def trace_file(folder: Path) -> Path:
    """Bursts of four requests 20 ms apart, one burst a second."""
    path = folder / "bursts.jsonl"
    rows = [
        {"timestamp": 1000 * burst + 20 * number, "input_length": 40 + number, "output_length": 3}
        for burst in range(12)
        for number in range(4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


async def test_a_trace_is_replayed_as_recorded_at_the_speed_that_is_asked_for(tmp_path: Path) -> None:
    workload = traced_workload(str(trace_file(tmp_path)), TraceFormat.MOONCAKE)
    assert workload.trace is not None
    four_times = Load(arrival=Arrival.TRACE, value=4 * workload.trace.request_rate)
    with timed_server(Behaviour(ttft_ms=3, itl_ms=1)) as server:
        run = run_of(server.url, tmp_path, workload, four_times, requests=36)
        (tmp_path / "bursts.jsonl").unlink()  # the run carries its requests to where the file is not
        result = await run_load(run)
    requests = result.timings.requests[:40]
    due = [timing.scheduled_ns / 1e9 for timing in requests]
    recorded = [burst + 0.02 * number for burst in range(12) for number in range(4)][:40]
    assert due == pytest.approx([at / 4 for at in recorded], abs=1e-6)
    assert [timing.input_tokens for timing in requests] == [40 + number for _ in range(10) for number in range(4)]
    assert [timing.planned_tokens for timing in requests] == [3] * 40


def test_a_client_that_falls_behind_its_trace_measures_nothing(tmp_path: Path) -> None:
    """No client is on time to a microsecond: with that for a limit the lateness of its sends is no measurement."""
    workload = traced_workload(str(trace_file(tmp_path)), TraceFormat.MOONCAKE)
    load = Load(arrival=Arrival.TRACE, value=200.0)
    with timed_server(Behaviour(ttft_ms=1, itl_ms=1)) as server:
        run = run_of(server.url, tmp_path, workload, load, lateness_limit_ms=0.001)
        outcome = measure(run, slos=(), devices=1, price_per_hour=0.0)
    assert isinstance(outcome, Failure), outcome
    assert outcome.reason is FailureReason.LATE_CLIENT
    assert not isinstance(outcome, LoadMeasurement)
