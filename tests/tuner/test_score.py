"""Scores under SLOs, by hand; and `study rescore`, which leaves the storage byte for byte as it was."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from search_spaces.slos import Slo
from studies.records import TrialRecord, TrialStatus
from tests.studies.toy import measure, toy_problem, wide_space
from tests.support.commands import Invoke, commands_in, stored_rows
from tests.support.reports import some_candidates, trial
from tuner.score import ranked
from tuner.study_errors import StudyFileError
from tuner.study_file import dump_study, parse_study
from tuner.wiring import make_problem

OBJECTIVES = ("output_tokens_per_s", "ttft_p50_ms")
FIGURES = ((100.0, 50.0, 300.0), (80.0, 25.0, 450.0), (40.0, 100.0, 100.0))
"""Tokens/s, TTFT p50 and TTFT p99 of three configurations."""


def three() -> list[TrialRecord]:
    problem = toy_problem()
    made = [trial(i, c, problem) for i, c in enumerate(some_candidates(wide_space(problem))[:3])]
    return [_with(record, *figures) for record, figures in zip(made, FIGURES, strict=True)]


def _with(record: TrialRecord, tokens: float, ttft: float, tail: float) -> TrialRecord:
    assert record.candidate is not None
    measurement = measure(record.candidate)
    latencies = replace(measurement.metrics.ttft_ms, p50=ttft, p99=tail)
    metrics = replace(measurement.metrics, output_tokens_per_s=tokens, ttft_ms=latencies)
    return replace(record, outcome=replace(measurement, metrics=metrics), values=(tokens, ttft))


def test_without_slos_the_nearest_to_the_best_of_all_objectives_is_first() -> None:
    first, second, third = ranked(three(), OBJECTIVES, ())
    assert [item.trial.number for item in (first, second, third)] == [1, 0, 2]
    assert first.score == pytest.approx(math.sqrt(0.8 * 1.0))
    assert second.score == pytest.approx(math.sqrt(1.0 * 0.5))
    assert third.score == pytest.approx(math.sqrt(0.4 * 0.25))


def test_a_soft_slo_changes_the_ranks_as_by_hand() -> None:
    slo = Slo(metric="ttft_p99_ms", threshold=300, hard=False, weight=0.5, steepness=1.0)
    found = ranked(three(), OBJECTIVES, (slo,))
    penalty = 0.5 * (math.exp(0.5) - 1)  # trial 1 is at 450: v = 0.5
    scores = {item.trial.number: item.score for item in found}
    assert scores[1] == pytest.approx(math.sqrt(0.8) * (1 - penalty))
    assert scores[0] == pytest.approx(math.sqrt(0.5))
    assert [item.trial.number for item in found] == [0, 1, 2]
    assert found[1].tiers == {"ttft_p99_ms": "error"}
    assert found[1].penalties == {"ttft_p99_ms": pytest.approx(penalty)}


def test_a_hard_slo_puts_what_fails_it_last() -> None:
    found = ranked(three(), OBJECTIVES, (Slo(metric="ttft_p99_ms", threshold=200),))
    assert [(item.trial.number, item.feasible) for item in found] == [(2, True), (1, False), (0, False)]
    within = ranked(three(), OBJECTIVES, (Slo(metric="ttft_p99_ms", threshold=200, fail_ratio=0.5, weight=0.1),))
    assert [(item.trial.number, item.feasible) for item in within] == [(0, True), (2, True), (1, False)]


def test_runs_of_one_configuration_are_one_entry_with_their_mean() -> None:
    first, *others = three()
    again = replace(_with(first, 200.0, 50.0, 300.0), number=9, repeat_of=0)
    found = {item.trial.number: item for item in ranked([first, *others, again], OBJECTIVES, ())}
    assert set(found) == {0, 1, 2}
    assert found[0].metrics["output_tokens_per_s"] == pytest.approx(150)
    assert found[0].runs == 2
    failed = replace(again, status=TrialStatus.FAILED, outcome=None, values=None)
    assert 0 not in {item.trial.number for item in ranked([first, *others, failed], OBJECTIVES, ())}


def test_an_slo_in_a_study_file_is_a_number_or_a_section() -> None:
    text = """
name: s
workload: {isl: 64, osl: 16, concurrency: 1}
objectives: [output_tokens_per_s, ttft_p50_ms]
node_pools: {local: {cpus_per_node: 1}}
engines: [llamacpp]
slos:
  ttft_p95_ms: 500
  tpot_p50_ms: {threshold: 50, kind: soft, weight: 0.5, steepness: 0.3, warning: 0.1, error: 0.5}
  e2e_p99_ms: {threshold: 9000, fail_ratio: 0.2}
"""
    study = parse_study(text)
    slos = {slo.metric: slo for slo in make_problem(study).slos}
    assert slos["ttft_p95_ms"] == Slo(metric="ttft_p95_ms", threshold=500)
    assert slos["tpot_p50_ms"] == Slo(
        metric="tpot_p50_ms", threshold=50, hard=False, weight=0.5, steepness=0.3, warning=0.1, error=0.5
    )
    assert slos["e2e_p99_ms"].limit == pytest.approx(10800)
    assert "ttft_p95_ms: 500.0\n" in dump_study(study), "the plain form stays plain"
    assert parse_study(dump_study(study)) == study


@pytest.mark.parametrize(
    ("slo", "parts"),
    [
        ("{kind: soft}", ["slos.ttft_p95_ms.threshold", "missing"]),
        ("{threshold: 5, kind: sft}", ["'sft' is no choice", "did you mean soft?"]),
        ("{threshold: 5, kind: soft, fail_ratio: 0.1}", ["fail_ratio", "goes with kind: hard"]),
        ("{threshold: 5, warning: 0.3}", ["warning", "0.3 is above error: 0.2"]),
        ("{threshold: 5, steepness: 0}", ["steepness", "must be above 0"]),
        ("many", ["slos.ttft_p95_ms", "'many' is a text"]),
    ],
)
def test_a_bad_slo_in_a_study_file_is_told(slo: str, parts: list[str]) -> None:
    text = f"""
name: s
workload: {{isl: 64, osl: 16, concurrency: 1}}
objectives: [output_tokens_per_s, ttft_p50_ms]
node_pools: {{local: {{cpus_per_node: 1}}}}
engines: [llamacpp]
slos: {{ttft_p95_ms: {slo}}}
"""
    with pytest.raises(StudyFileError) as caught:
        parse_study(text)
    for part in parts:
        assert part in str(caught.value)


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Invoke:
    return commands_in(tmp_path, monkeypatch, capsys)


def test_rescore_reads_only_and_ranks_by_the_new_slos(invoke: Invoke) -> None:
    assert invoke("study", "run", "study.yaml").code == 0
    before = stored_rows()
    plain = json.loads(invoke("study", "rescore", "toy", "--slo", "ttft_p99_ms=none", "--json").out)
    assert plain["slos"] == []
    assert all(item["multiplier"] == 1 for item in plain["ranks"])
    ttft = {item["trial"]: item["metrics"]["ttft_p99_ms"] for item in plain["ranks"]}
    limit = sorted(ttft.values())[1]
    hard = json.loads(invoke("study", "rescore", "toy", "--slo", f"ttft_p99_ms={limit}", "--json").out)
    assert {item["trial"] for item in hard["ranks"] if item["feasible"]} == {n for n, v in ttft.items() if v <= limit}
    soft = f"ttft_p99_ms={{threshold: {limit}, kind: soft, weight: 0.2}}"
    graded = json.loads(invoke("study", "rescore", "toy", "--slo", soft, "--by", "output_tokens_per_s", "--json").out)
    tokens = {item["trial"]: item["metrics"]["output_tokens_per_s"] for item in plain["ranks"]}
    for item in graded["ranks"]:
        violation = max(0.0, ttft[item["trial"]] / limit - 1)
        expected = tokens[item["trial"]] / max(tokens.values()) * (1 - min(1.0, 0.2 * math.expm1(violation)))
        assert item["score"] == pytest.approx(expected)
    assert stored_rows() == before


def test_rescore_as_a_table_and_with_bad_slos(invoke: Invoke) -> None:
    assert invoke("study", "run", "study.yaml").code == 0
    shown = invoke("study", "rescore", "toy", "--slo", "tpot_p50_ms={threshold: 1, kind: soft}")
    assert shown.code == 0
    assert "tpot_p50_ms at most 1 (soft, weight 1, steepness 1)" in shown.out
    assert "ttft_p99_ms at most 60" in shown.out
    for text, part in (
        ("tpot=3", "slos.tpot"),
        ("tpot_p50_ms", "write such as --slo"),
        ("tpot_p50_ms=[", "no valid YAML"),
        ("tpot_p75_ms=3", "no measurement of study toy has tpot_p75_ms; choose a mean, p50"),
    ):
        wrong = invoke("study", "rescore", "toy", "--slo", text)
        assert (wrong.code, part in wrong.err) == (2, True), wrong.err
