"""Studies that search the highest request rate: their file, their predictions, what they ask and what they show."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.load.rate_search import Bracket
from cluster.runner import TrialRequest
from search_spaces.outcome import Measurement, Outcome, Probe
from tests.studies.toy import measure
from tests.support.memory_runner import MemoryRunner
from tests.tuner.test_report import text_of
from tests.tuner.test_session import Bench, bench
from tuner.report import front_json, front_table
from tuner.study_errors import StudyFileError
from tuner.study_file import dump_study, parse_study
from tuner.wiring import make_predictor, make_problem, make_space

__all__ = ["bench"]  # a fixture

TEXT = """
name: rates
workload: {isl: 64, osl: 16, rate_search: {min: 0.1, max: 64, tolerance: 20%}}
slos: {ttft_p99_ms: 400}
objectives: [goodput_rps_per_gpu, tpot_p50_ms]
node_pools: {local: {cpus_per_node: 4, price_per_hour: 1.0}}
engines: {llamacpp: {threads: [1, 2], max_num_seqs: [1, 4], batch_size: 512, ubatch_size: 512, flash_attention: true,
  kv_cache_dtype: f16}}
space: {modes: aggregated, replicas: [1, 2]}
budget: {trials: 5, confirm: 2, control_every: 3}
"""


def served(request: TrialRequest) -> Outcome:
    """A deployment that serves 1.5 requests/s for each of its devices, found as the load generator finds it."""
    search = request.problem.workload.rate_search
    assert search is not None
    assert request.candidate.load.value == search.highest
    capacity = 1.5 * request.candidate.config.devices
    bracket, probes = Bracket(search=search, first=request.first_rate), []
    while (rate := bracket.next_rate()) is not None:
        probes.append(_probe(request, rate, met=rate <= capacity))
        bracket = bracket.told(rate, met=rate <= capacity)
    best = max((probe for probe in probes if probe.met), key=lambda probe: probe.request_rate)
    assert best.metrics is not None
    return replace(_base(request), metrics=best.metrics, probes=tuple(probes))


def _base(request: TrialRequest) -> Measurement:
    return measure(request.candidate)


def _probe(request: TrialRequest, rate: float, *, met: bool) -> Probe:
    metrics = _base(request).metrics
    ttft = replace(metrics.ttft_ms, p99=100.0 if met else 900.0)
    return Probe(
        request_rate=rate,
        met=met,
        metrics=replace(metrics, ttft_ms=ttft, requests_per_s=rate, goodput_rps=rate if met else 0.0),
    )


def test_the_goodput_at_the_slo_is_searched_and_shown_as_an_interval(bench: Bench) -> None:
    bench.cluster.make_runner = lambda: MemoryRunner(outcome_of=served)
    report = bench.run(text=TEXT).report
    assert report.front
    for member in report.front:
        assert member.candidate is not None
        assert member.measurement is not None
        capacity = 1.5 * member.candidate.config.devices
        met, missed = report.spreads.highest_rate(member) or (None, None)
        assert met is not None
        assert missed is not None
        assert met <= capacity < missed
        assert report.spreads.count(member) >= 2
    assert all(request.first_rate is not None and request.first_rate > 0 for request in bench.requests)
    text = text_of(front_table(report))
    assert "at its highest rate" in text
    assert "request_rate=64" not in text
    assert "/s" in text
    front = front_json(report)["front"]
    assert all(member["highest_rate"]["probes"] for member in front)  # type: ignore[index,call-overload,union-attr]  # JSON


def test_expectations_save_runs_as_the_model_learns(bench: Bench) -> None:
    bench.cluster.make_runner = lambda: MemoryRunner(outcome_of=served)
    report = bench.run("budget.trials=8", "budget.confirm=1", "budget.control_every=0", text=TEXT).report
    firsts = [request.first_rate for request in bench.requests]
    capacities = [1.5 * request.candidate.config.devices for request in bench.requests]
    misses = [max(rate / c, c / rate) for rate, c in zip(firsts, capacities, strict=True) if rate]
    assert max(misses[-3:]) < misses[0] or max(misses) < 1.3
    assert len(report.measured) == len(misses)


def test_the_model_predicts_the_rate_that_it_expects_to_be_met() -> None:
    study = parse_study(TEXT)
    problem = make_problem(study)
    space = make_space(study, problem)
    assert space.loads == (64.0,)
    predictor = make_predictor(problem, study)
    default = space.default()
    slow, fast = (predictor.predict([c])[0] for c in (default, max(space.neighbours(default), key=_devices)))
    for prediction in (slow, fast):
        assert prediction.metrics["ttft_p99_ms"] <= 400 * (1 + 1e-9)
        assert 0.1 <= prediction.metrics["requests_per_s"] <= 64 * 1.001
    assert parse_study(dump_study(study)) == study


def _devices(candidate: object) -> int:
    return candidate.config.devices  # type: ignore[attr-defined,no-any-return]  # a Candidate


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["workload.rate_search.max=0.05"], "is not above min, 0.1"),
        (["workload.arrival=closed"], "does not go with arrival: closed; choose poisson or constant"),
        (["workload.request_rate=[1, 2]"], "is what rate_search looks for"),
        (["workload.rate_search.tolerance=0"], "tolerance"),
        (["slos={tpot_p50_ms: 50}"], "needs an SLO on TTFT or E2E"),
    ],
)
def test_files_that_ask_for_what_cannot_be_are_refused(overrides: list[str], told: str) -> None:
    with pytest.raises(StudyFileError, match=told):
        parse_study(TEXT, overrides)


def test_arrivals_of_a_searched_rate_are_poisson_unless_told() -> None:
    assert parse_study(TEXT).workload.arrival == "poisson"
    assert parse_study(TEXT, ["workload.arrival=constant"]).workload.arrival == "constant"
