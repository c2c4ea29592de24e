"""A study from its file to its end, with a real storage and a runner that measures by a formula."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from cluster.runner import TrialRequest
from search_spaces.hardware import Device, NodePool
from search_spaces.outcome import Failure, FailureReason, Outcome
from search_spaces.problem import Problem
from studies.errors import StudyFileChangedError
from studies.records import Origin, TrialStatus
from studies.stopping import StopReason
from tests.support.memory_runner import MemoryRunner, Silence, measured
from tuner.places import Place
from tuner.report import show
from tuner.session import Ended, run_study
from tuner.study_errors import StudyFileError
from tuner.study_file import dump_study, parse_study
from tuner.wiring import UNMEASURED_CORE, make_problem, make_space, trials_at_once

TEXT = """
name: toy
workload: {isl: 64, osl: 16, concurrency: [1, 2, 4]}
objectives: [output_tokens_per_s, ttft_p50_ms]
node_pools: {local: {cpus_per_node: 4, price_per_hour: 1.0}}
engines: {llamacpp: {threads: [1, 2], max_num_seqs: [1, 4], batch_size: 512, ubatch_size: 512, flash_attention: true,
  kv_cache_dtype: f16}}
budget: {trials: 6, confirm: 1}
"""


@dataclass
class MemoryCluster:
    """A cluster whose runners are in memory."""

    make_runner: Callable[[], MemoryRunner] = MemoryRunner
    runners: list[MemoryRunner] = field(default_factory=list)
    measured_pools: list[str] = field(default_factory=list)
    trials_at_once: int = 1

    def measure(self, pool: NodePool) -> Device:
        self.measured_pools.append(pool.name)
        return UNMEASURED_CORE

    def runner(self, _study: str) -> MemoryRunner:
        self.runners.append(self.make_runner())
        return self.runners[-1]

    @contextmanager
    def connect(self, _problem: Problem, _place: Place) -> Iterator[MemoryCluster]:
        yield self


@dataclass
class Bench:
    """A place for studies, and what is needed to run them there."""

    place: Place
    cluster: MemoryCluster = field(default_factory=MemoryCluster)
    observer: Silence = field(default_factory=Silence)

    def run(self, *overrides: str, stop: Callable[[], bool] = lambda: False, text: str = TEXT) -> Ended:
        file = parse_study(text, overrides)
        stopping = nullcontext(stop)
        return run_study(file, self.place, connect=self.cluster.connect, stop=stopping, observer=self.observer)

    @property
    def requests(self) -> list[TrialRequest]:
        return [request for runner in self.cluster.runners for request in runner.requests]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(place=Place(url=f"sqlite:///{tmp_path}/studies.db", directory=tmp_path))


def test_a_study_meets_its_budget_exactly_and_measures_nothing_twice(bench: Bench) -> None:
    ended = bench.run()
    assert ended.reason is StopReason.TRIALS
    trials = ended.report.trials
    assert [trial.status for trial in trials] == [TrialStatus.MEASURED] * 6
    assert len({trial.key for trial in trials}) == 6
    assert [request.candidate.key for request in bench.requests] == [trial.key for trial in trials]
    assert [trial.origin for trial in trials[:2]] == [Origin.DEFAULT, Origin.DEFAULT]
    assert bench.cluster.runners[0].closed
    assert ended.report.front
    assert bench.observer.begun_trials == bench.observer.ended_trials == list(range(6))


def test_every_trial_was_predicted_before_and_the_predictions_learn(bench: Bench) -> None:
    trials = bench.run("budget.trials=9").report.trials
    errors = []
    for trial in trials:
        assert trial.prediction is not None
        assert trial.measurement is not None
        measured_value = trial.measurement.metrics.flat()["ttft_p50_ms"]
        errors.append(abs(trial.prediction.metrics["ttft_p50_ms"] / measured_value - 1))
    assert sum(errors[-3:]) < sum(errors[:2]) * 1.5  # the stand-in core is wrong by orders of magnitude at first


def test_nodes_are_measured_once_per_study(bench: Bench) -> None:
    bench.run("budget.trials=2")
    bench.run("budget.trials=4")
    assert bench.cluster.measured_pools == ["local"]


def test_another_machine_with_the_storage_alone_measures_no_node_again(bench: Bench, tmp_path: Path) -> None:
    bench.run("budget.trials=2")
    bench.place = replace(bench.place, directory=tmp_path / "elsewhere")
    bench.run("budget.trials=4")
    assert bench.cluster.measured_pools == ["local"]


def test_what_the_devices_did_is_stored_with_the_study_and_adds_up_over_runs(bench: Bench) -> None:
    first = bench.run("budget.trials=3").report.device_use
    assert 0 < first.reserved_device_s < first.device_s
    both = bench.run("budget.trials=5").report.device_use
    assert both.device_s > first.device_s
    assert both.reserved_device_s > first.reserved_device_s
    console = Console(width=200, record=True, file=StringIO())
    console.print(show(bench.run("budget.trials=5").report))
    assert str(both) in console.export_text()


def test_a_second_run_of_a_finished_study_measures_nothing(bench: Bench) -> None:
    first = bench.run()
    again = bench.run()
    assert again.reason is StopReason.TRIALS
    assert [t.key for t in again.report.trials] == [t.key for t in first.report.trials]
    assert len(bench.cluster.runners) == 1
    assert any("has used its budget of 6 trials" in note for note in bench.observer.notes)


def test_a_raised_budget_goes_on_and_says_so(bench: Bench) -> None:
    bench.run("budget.trials=3")
    ended = bench.run("budget.trials=5")
    assert len(ended.report.measured) == 5
    assert any("budget.trials: 3 -> 5" in note for note in bench.observer.notes)


def test_another_study_file_is_refused_with_the_difference(bench: Bench) -> None:
    bench.run("budget.trials=2")
    with pytest.raises(StudyFileChangedError) as caught:
        bench.run("budget.trials=2", "seed=5", "slos={ttft_p50_ms: 100}")
    message = str(caught.value)
    for part in ("seed: 0 -> 5", "slos.ttft_p50_ms: not set -> 100.0", "tuner study resume toy", "--set name=toy-2"):
        assert part in message
    assert len(bench.cluster.runners) == 1


def test_a_stop_gives_back_what_is_in_flight_and_a_resume_measures_it(bench: Bench) -> None:
    bench.cluster.make_runner = lambda: MemoryRunner(polls=1000)
    polls = iter(range(1000))
    ended = bench.run(stop=lambda: next(polls) > 20)
    assert ended.reason is None
    assert bench.cluster.runners[0].stopped == ["toy-0"]
    assert not any(trial.status is TrialStatus.RUNNING for trial in ended.report.trials)
    interrupted = bench.requests[0].candidate.key
    bench.cluster.make_runner = MemoryRunner
    trials = bench.run().report.trials
    finished = Counter(trial.key for trial in trials if trial.is_finished)
    assert finished[interrupted] == 1
    assert finished.total() == 6
    assert set(finished.values()) == {1}


def fails_when(condition: Callable[[TrialRequest], bool], reason: FailureReason) -> Callable[[TrialRequest], Outcome]:
    def outcome_of(request: TrialRequest) -> Outcome:
        if condition(request):
            return Failure(reason=reason, detail="as arranged", log_tail="ggml: last words")
        return measured(request)

    return outcome_of


def test_a_failing_configuration_is_recorded_and_the_study_goes_on(bench: Bench) -> None:
    def two_threads(request: TrialRequest) -> bool:
        return any(pool.option("threads") == 2 for pool in request.candidate.config.pools)

    outcome_of = fails_when(two_threads, FailureReason.OUT_OF_MEMORY_AT_BOOT)
    bench.cluster.make_runner = lambda: MemoryRunner(outcome_of=outcome_of)
    report = bench.run().report
    assert report.count(TrialStatus.MEASURED) + report.count(TrialStatus.FAILED) == 6
    failed = [trial for trial in report.trials if trial.status is TrialStatus.FAILED]
    assert failed
    for trial in failed:
        assert trial.failure is not None
        assert (trial.failure.reason, trial.failure.log_tail) == ("out_of_memory_at_boot", "ggml: last words")


def test_faults_of_the_infrastructure_are_repeated_and_count_for_nothing(bench: Bench) -> None:
    tries: Counter[str] = Counter()

    def first_try_of_every_third(request: TrialRequest) -> bool:
        key = request.candidate.key
        tries[key] += 1
        return len(tries) % 3 == 0 and tries[key] == 1

    outcome_of = fails_when(first_try_of_every_third, FailureReason.TRANSPORT)
    bench.cluster.make_runner = lambda: MemoryRunner(outcome_of=outcome_of)
    report = bench.run().report
    assert report.count(TrialStatus.MEASURED) == 6
    lost = report.count(TrialStatus.LOST)
    assert lost >= 2
    assert len({trial.key for trial in report.measured}) == 6
    assert tries.total() == 6 + lost


def test_too_many_faults_in_a_row_end_the_run(bench: Bench) -> None:
    outcome_of = fails_when(lambda _: True, FailureReason.LOST_NODE)
    bench.cluster.make_runner = lambda: MemoryRunner(outcome_of=outcome_of)
    ended = bench.run()
    assert ended.reason is StopReason.INFRASTRUCTURE
    assert len(bench.requests) == 10


def test_the_end_of_the_space_ends_the_study(bench: Bench) -> None:
    ended = bench.run("budget.trials=100", "space.modes=aggregated", "workload.concurrency=2")
    assert ended.reason is StopReason.SPACE_EXHAUSTED
    assert len(ended.report.measured) == 4


def test_wall_time_ends_the_run_and_what_is_in_flight_is_still_told(bench: Bench) -> None:
    ended = bench.run("budget.wall_time=0.001")
    assert ended.reason is StopReason.WALL_TIME
    assert len(ended.report.measured) == len(bench.requests) <= 1


def test_a_question_that_nothing_can_answer_is_told_before_anything_starts(bench: Bench) -> None:
    with pytest.raises(StudyFileError, match="no configuration of study 'toy' can run") as caught:
        bench.run("workload.isl=100000")
    assert "shorten the workload" in str(caught.value)
    assert bench.cluster.runners == []


def test_what_lies_beside_the_study(bench: Bench) -> None:
    bench.run()
    assert list((bench.place.directory / "predictions").rglob("*.parquet"))
    assert len(list(bench.place.artifacts.iterdir())) == 6


def test_the_stored_file_keeps_the_order_of_node_pools_whose_first_is_the_default(bench: Bench) -> None:
    one, two = "second: {cpus_per_node: 2}", "first: {cpus_per_node: 2}"
    local = "local: {cpus_per_node: 4, price_per_hour: 1.0}"
    file = parse_study(TEXT.replace(local, f"{one}, {two}"), ())
    stored = parse_study(dump_study(file), name="stored")
    assert list(stored.node_pools) == list(file.node_pools) == ["second", "first"]
    spaces = [make_space(each, make_problem(each)) for each in (file, stored)]
    assert spaces[0].parameters == spaces[1].parameters
    assert spaces[0].default().config.pools[0].node_pool == "second"
    bench.run("budget.trials=2", text=TEXT.replace(local, f"{one}, {two}"))
    swapped = bench.run("budget.trials=4", text=TEXT.replace(local, f"{two}, {one}"))
    assert swapped.reason is StopReason.TRIALS, "the same question, in another order"


def test_trials_at_once_set_the_population_and_the_search(bench: Bench) -> None:
    bench.cluster.trials_at_once = 3
    bench.cluster.make_runner = lambda: MemoryRunner(polls=3)
    assert bench.run().reason is StopReason.TRIALS
    assert bench.cluster.runners[0].most_in_flight == 3
    assert any("trials held" in note for note in bench.observer.notes)


@pytest.mark.parametrize(
    ("wanted", "address", "expected"), [("auto", None, 1), ("auto", "10.0.0.1:6379", 5), ("3", None, 3)]
)
def test_how_many_trials_run_at_once(wanted: str, address: str | None, expected: int) -> None:
    file = parse_study(TEXT, (f"budget.parallel_trials={wanted}", "node_pools.local.nodes=5"))
    assert trials_at_once(file, make_problem(file), address) == expected
