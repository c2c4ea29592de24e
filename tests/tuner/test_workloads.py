"""Workloads in study files: conversations and traces, and what is said of those that cannot be."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from search_spaces.errors import InvalidValueError
from search_spaces.workload import Arrival
from tuner.study_errors import StudyFileError
from tuner.study_file import dump_study, load_study_file, parse_study
from tuner.wiring import loads_of, make_problem, make_space

REST = """
objectives: [output_tokens_per_s, ttft_p50_ms]
node_pools: {local: {cpus_per_node: 2}}
engines: [llamacpp]
measurement: {requests: 16}
"""


def study(workload: str) -> str:
    return f"name: w\nworkload: {workload}\n{REST}"


def mooncake(folder: Path, requests: int = 40, gap_ms: int = 250) -> Path:
    """A small trace in Mooncake's format: pairs of requests that share their first block."""
    path = folder / "trace.jsonl"
    rows = [
        {
            "timestamp": index * gap_ms,
            "input_length": 600,
            "output_length": 8,
            "hash_ids": [index // 2, 1000 + index],
        }
        for index in range(requests)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in random.Random(3).sample(rows, len(rows))))
    return path


def test_a_conversation_says_what_its_requests_hold(tmp_path: Path) -> None:
    del tmp_path
    file = parse_study(study("{isl: 32, osl: 8, concurrency: 2, turns: 4, think_time: 2s, shared_prefix: 0.5}"))
    workload = make_problem(file).workload
    prompts = [32 * k + 8 * (k - 1) for k in range(1, 5)]
    assert workload.isl.mean == round(sum(prompts) / 4)
    assert workload.longest_context == 4 * (32 + 8)
    assert workload.shared_prefix == pytest.approx((sum(prompts[:3]) + 16) / sum(prompts))
    assert workload.conversation is not None
    assert workload.conversation.think_time_s == 2.0
    assert parse_study(dump_study(file)) == file


def test_a_trace_says_what_its_requests_hold_and_how_fast_they_come(tmp_path: Path) -> None:
    mooncake(tmp_path)
    (tmp_path / "study.yaml").write_text(study("{trace: {file: trace.jsonl, format: mooncake, time_scale: [2, 0.5]}}"))
    file = load_study_file(tmp_path / "study.yaml")
    problem = make_problem(file)
    assert problem.workload.arrival is Arrival.TRACE
    assert problem.workload.isl.mean == 600
    assert problem.workload.longest_context == 608
    assert problem.workload.shared_prefix == pytest.approx(512 / 1200)
    assert loads_of(file, problem.workload) == (2.0, 8.0)
    assert [float(load) for load in make_space(file, problem).loads] == [2.0, 8.0]
    assert parse_study(dump_study(file)) == file


def test_a_window_is_cut_out_and_long_requests_left_out(tmp_path: Path) -> None:
    path = mooncake(tmp_path, requests=100)
    trace = f"{{file: {path}, format: mooncake, start: 5s, window: 15s}}"
    workload = make_problem(parse_study(study(f"{{trace: {trace}}}"))).workload
    assert workload.trace is not None
    assert workload.trace.requests == 60
    with pytest.raises(InvalidValueError, match="holds 60 requests, and 64 are measured after 7 of warm-up"):
        make_problem(parse_study(study(f"{{trace: {trace}}}") + "", ["measurement.requests=64"]))
    with pytest.raises(InvalidValueError, match="of at most 100 tokens"):
        make_problem(parse_study(study(f"{{trace: {{file: {path}, format: mooncake, longest: 100}}}}")))


@pytest.mark.parametrize(
    ("workload", "words"),
    [
        ("{osl: 8, concurrency: 1}", "workload.isl"),
        ("{isl: 8, osl: 8, concurrency: 1, think_time: 2s}", "goes with turns"),
        ("{isl: 8, osl: 8, concurrency: 1, turns: 1}", "is no conversation"),
        ("{isl: 8, osl: 8, arrival: trace, concurrency: 1}", "missing with arrival: trace"),
        ("{trace: {file: t, format: mooncake}, concurrency: 4}", "is what the trace says"),
        ("{trace: {file: t, format: mooncake}, isl: 4}", "is what the trace says"),
        ("{trace: {file: t, format: mooncake}, arrival: poisson}", "does not go with a trace"),
        ("{trace: {file: t, format: mooncake}, shared_prefix: 0.5}", "does not go with a trace"),
        ("{trace: {file: t, format: pcap}}", "format"),
        ("{trace: {file: t, format: azure, time_scale: 0}}", "time_scale"),
    ],
)
def test_workloads_that_cannot_be(workload: str, words: str) -> None:
    with pytest.raises(StudyFileError, match=words):
        parse_study(study(workload))


def test_a_trace_that_is_not_there_is_told_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(study("{trace: {file: none.jsonl, format: mooncake}}"))
    with pytest.raises(StudyFileError, match=r"workload\.trace\.file"):
        load_study_file(tmp_path / "study.yaml")
