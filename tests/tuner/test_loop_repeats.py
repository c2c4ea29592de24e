"""The search with repeats: controls in between, confirmations at the end, in time, stopped and resumed."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.runner import TrialRequest
from perf_model.calibration import CalibratedPredictor
from search_spaces.measuring import MeasurementRule, TimeLimits
from search_spaces.outcome import Failure, FailureReason, Measurement, Outcome
from search_spaces.serving import ServingConfig
from studies.records import Origin
from studies.repeats import RepeatRule
from studies.stopping import Budget, StopReason
from studies.storage import open_storage
from studies.study import Study, create_study
from tests.studies.toy import measure, toy_problem, toy_setup, wide_space
from tests.support.memory_runner import MemoryRunner, Silence
from tests.tuner.test_loop import Biased
from tests.tuner.test_session import Bench, bench
from tuner.loop import LearningModel, Search, SearchPlan

__all__ = ["bench"]  # a fixture

OVERRIDES = ("budget.trials=8", "budget.confirm=3", "budget.control_every=3")


def noisy(request: TrialRequest) -> Outcome:
    """The toy surface, all of a run's figures off by the same few percent, as its seed says."""
    return shaken(measure(request.candidate), request.seed)


def shaken(measurement: Measurement, seed: int) -> Measurement:
    factor = 1.0 + random.Random(seed).uniform(-0.04, 0.04)
    metrics = measurement.metrics
    slower = {
        name: replace(getattr(metrics, name), p50=getattr(metrics, name).p50 * factor)
        for name in ("ttft_ms", "tpot_ms")
    }
    return replace(
        measurement,
        metrics=replace(metrics, output_tokens_per_s=metrics.output_tokens_per_s / factor, **slower),
    )


def test_the_front_is_confirmed_before_it_is_reported(bench: Bench) -> None:
    bench.cluster.make_runner = lambda: MemoryRunner(outcome_of=noisy)
    ended = bench.run(*OVERRIDES)
    assert ended.reason is StopReason.TRIALS
    report = ended.report
    assert {report.spreads.count(member) for member in report.front} == {3}
    keys = [trial.key for trial in report.trials if not trial.is_repeat]
    assert len(set(keys)) == len(keys) == 8, "the budget counts candidates"
    origins = Counter(trial.origin for trial in report.trials if trial.is_repeat)
    assert origins[Origin.CONTROL] == 2
    assert origins[Origin.CONFIRM] >= 2
    assert len({request.seed for request in bench.requests}) == len(report.trials), "arrivals differ between runs"
    assert any("confirming the front: 3 runs of each member" in note for note in bench.observer.notes)
    noise = report.spreads.stability.noise["output_tokens_per_s"]
    assert 0.005 < noise.log_stddev < 0.05
    assert report.status == f"finished, 8 of 8 trials, {sum(origins.values())} repeats"


def test_a_confirmed_study_has_nothing_to_measure_until_more_is_asked(bench: Bench) -> None:
    bench.cluster.make_runner = lambda: MemoryRunner(outcome_of=noisy)
    first = bench.run(*OVERRIDES).report
    measured = len(bench.requests)
    bench.run(*OVERRIDES)
    assert len(bench.requests) == measured
    assert any("nothing to measure" in note for note in bench.observer.notes)
    again = bench.run(*OVERRIDES[:1], "budget.confirm=4", OVERRIDES[2]).report
    assert {again.spreads.count(member) for member in again.front} == {4}
    assert all(trial.origin is Origin.CONFIRM for trial in again.trials[len(first.trials) :])


@pytest.mark.parametrize(
    "stopped_at",
    [
        3,
        pytest.param(12, marks=pytest.mark.long),
        pytest.param(9, marks=pytest.mark.long),
        pytest.param(14, marks=pytest.mark.long),
    ],
)
def test_a_stopped_study_is_confirmed_by_its_resume(bench: Bench, stopped_at: int) -> None:
    bench.cluster.make_runner = lambda: MemoryRunner(outcome_of=noisy)
    stopped = bench.run(*OVERRIDES, stop=lambda: len(bench.observer.ended_trials) >= stopped_at)
    assert stopped.reason is None
    report = bench.run(*OVERRIDES).report
    assert {report.spreads.count(member) for member in report.front} == {3}
    assert max(report.spreads.count(trial) for trial in report.measured if trial.number) == 3
    assert sum(trial.is_finished and not trial.is_repeat for trial in report.trials) == 8


@pytest.mark.long
def test_a_front_that_its_confirmation_changes_is_confirmed_too(bench: Bench) -> None:
    """Whatever was measured first turns out three times worse: others take its place, and are confirmed."""
    seen: Counter[str] = Counter()

    def sobering(request: TrialRequest) -> Outcome:
        seen[request.candidate.key] += 1
        outcome = measure(request.candidate)
        if seen[request.candidate.key] == 1:
            return outcome
        rate = outcome.metrics.output_tokens_per_s / (3.0 if request.candidate.load.value == 4.0 else 1.0)
        return replace(outcome, metrics=replace(outcome.metrics, output_tokens_per_s=rate))

    bench.cluster.make_runner = lambda: MemoryRunner(outcome_of=sobering)
    report = bench.run("budget.trials=8", "budget.confirm=3").report
    assert {report.spreads.count(member) for member in report.front} == {3}
    confirmed = {trial.key for trial in report.trials if trial.origin is Origin.CONFIRM}
    assert confirmed > {member.key for member in report.front}, "some members left the front"


@pytest.mark.long
def test_nothing_is_confirmed_where_the_infrastructure_fails(bench: Bench) -> None:
    def outcome(request: TrialRequest) -> Outcome:
        if len(bench.requests) <= 3:
            return measure(request.candidate)
        return Failure(reason=FailureReason.LOST_NODE, detail="gone")

    bench.cluster.make_runner = lambda: MemoryRunner(outcome_of=outcome)
    ended = bench.run(*OVERRIDES)
    assert ended.reason is StopReason.INFRASTRUCTURE
    assert not any(trial.origin is Origin.CONFIRM for trial in ended.report.trials)


class Clock:
    """Time that passes by what is measured: a measurement of the toy takes 1 s, the start of its deployment 2 s."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.up: ServingConfig | None = None

    def __call__(self) -> float:
        return self.now_s


def timed_search(study: Study, folder: Path, wall_s: float | None, at_once: int = 1) -> tuple[Search, Clock]:
    clock = Clock()

    def outcome(request: TrialRequest) -> Outcome:
        is_warm = clock.up == request.candidate.config
        clock.up = request.candidate.config
        clock.now_s += 1.0 if is_warm else 3.0
        timings = {} if is_warm else {"start": 2.0}
        timings |= {"warm_up": 0.0, "measure": 1.0}
        return replace(shaken(measure(request.candidate), request.seed), timings_s=timings)

    plan = SearchPlan(
        problem=study.setup.problem,
        rule=MeasurementRule(),
        limits=TimeLimits(),
        budget=Budget(trials=study.setup.budget_trials, wall_s=wall_s),
        work_dir=folder / "work",
        seed=7,
        in_flight=at_once,
    )
    model = LearningModel(CalibratedPredictor(model=Biased()))
    runner = MemoryRunner(outcome_of=outcome, polls=0)
    return Search(study, runner, model, plan, Silence(), clock=clock, sleep=lambda _: None), clock


def limited(folder: Path, rule: RepeatRule, trials: int = 500) -> Study:
    setup = toy_setup(folder, space=wide_space(toy_problem()), budget_trials=trials, repeats=rule)
    return create_study(open_storage(f"journal://{folder}/s.journal"), setup)


def test_the_search_leaves_time_to_confirm_and_none_is_overrun(tmp_path: Path) -> None:
    study = limited(tmp_path, RepeatRule(control_every=0, confirm=3))
    search, clock = timed_search(study, tmp_path, wall_s=60.0)
    assert search.run() is StopReason.WALL_TIME
    candidates = sum(not trial.is_repeat for trial in study.trials())
    repeats = len(study.trials()) - candidates
    assert repeats >= 2
    assert candidates >= 2 / 3 * 60 / 3 - 1, "confirming takes a third of the time at most"
    assert clock.now_s <= 60 + 3
    order = [trial.is_repeat for trial in study.trials()]
    assert order == sorted(order), "the search does not begin again"


def test_without_confirmations_the_search_has_all_the_time(tmp_path: Path) -> None:
    study = limited(tmp_path, RepeatRule(control_every=0, confirm=1))
    search, _ = timed_search(study, tmp_path, wall_s=30.0)
    search.run()
    assert len(study.trials()) >= 10
    assert not any(trial.is_repeat for trial in study.trials())


def test_several_confirmations_are_in_flight_together(tmp_path: Path) -> None:
    study = limited(tmp_path, RepeatRule(control_every=5, confirm=3), trials=14)
    search, _ = timed_search(study, tmp_path, wall_s=None, at_once=3)
    assert search.run() is StopReason.TRIALS
    counts = Counter(trial.key for trial in study.trials() if trial.is_finished)
    control = study.trials()[0].key
    assert {counts[member.key] for member in study.front() if member.key != control} == {3}
    assert sum(not trial.is_repeat for trial in study.trials()) == 14
