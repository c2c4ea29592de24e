"""The search loop by itself, with several trials in flight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.runner import TrialHandle, TrialRequest
from perf_model.calibration import CalibratedPredictor
from search_spaces.measuring import MeasurementRule, TimeLimits
from search_spaces.outcome import Prediction
from search_spaces.serving import ServingConfig
from studies.records import Proposal, TrialStatus
from studies.stopping import Budget, StopReason
from studies.storage import open_storage
from studies.study import Study, create_study
from tests.studies.toy import biased_model, toy_problem, toy_setup, wide_space
from tests.support.memory_runner import MemoryRunner, Silence
from tuner.loop import LearningModel, Search, SearchPlan, recent_gain, sampled


class Biased:
    """The toy surface, wrong by a factor of three."""

    def predict(self, candidates: object) -> list[Prediction]:
        return biased_model(3.0)(candidates)  # type: ignore[arg-type]  # candidates


def search(study: Study, runner: MemoryRunner, folder: Path, in_flight: int, model: LearningModel) -> Search:
    plan = SearchPlan(
        problem=study.setup.problem,
        rule=MeasurementRule(),
        limits=TimeLimits(),
        budget=Budget(trials=study.setup.budget_trials),
        work_dir=folder / "work",
        seed=7,
        in_flight=in_flight,
    )
    return Search(study, runner, model, plan, Silence(), sleep=lambda _: None)


def make_study(folder: Path, model: LearningModel, trials: int, in_flight: int) -> Study:
    space = wide_space(toy_problem())
    setup = toy_setup(folder, space=space, predict=model.predict, budget_trials=trials, in_flight=in_flight)
    return create_study(open_storage(f"sqlite:///{folder}/s.db"), setup)


@pytest.mark.parametrize("in_flight", [1, 3])
def test_the_budget_is_met_exactly_with_any_number_in_flight(tmp_path: Path, in_flight: int) -> None:
    model = LearningModel(CalibratedPredictor(model=Biased()))
    study = make_study(tmp_path, model, 7, in_flight)
    runner = MemoryRunner(polls=2)
    assert search(study, runner, tmp_path, in_flight, model).run() is StopReason.TRIALS
    assert [trial.status for trial in study.trials()] == [TrialStatus.MEASURED] * 7
    assert len({trial.key for trial in study.trials()}) == 7
    assert runner.most_in_flight == in_flight
    assert list((tmp_path / "work").iterdir()) == []


def test_every_measurement_corrects_the_model(tmp_path: Path) -> None:
    model = LearningModel(CalibratedPredictor(model=Biased()))
    study = make_study(tmp_path, model, 12, 1)
    search(study, MemoryRunner(polls=0), tmp_path, 1, model).run()
    first, last = study.trials()[0], study.trials()[-1]
    for trial, error in ((first, 2.0), (last, 0.6)):
        assert trial.prediction is not None
        assert trial.measurement is not None
        ratio = trial.prediction.metrics["ttft_p50_ms"] / trial.measurement.metrics.flat()["ttft_p50_ms"]
        assert abs(ratio - 1) <= error + 1e-9
    assert first.prediction is not None
    assert first.prediction.log_stddev["ttft_p50_ms"] > last.prediction.log_stddev["ttft_p50_ms"]  # type: ignore[union-attr]  # asserted above


def test_what_is_learnt_from_is_bounded_and_has_the_latest_in_full() -> None:
    numbers = list(range(1000))
    assert sampled(numbers[:400], 400) == numbers[:400]  # type: ignore[type-var]  # any items will do
    chosen = sampled(numbers, 400)  # type: ignore[type-var]  # as above
    assert chosen[200:] == numbers[800:]
    assert chosen[:200] == numbers[0:800:4]
    assert len(sampled(numbers[:401], 400)) == 400  # type: ignore[type-var]  # as above


def test_a_large_study_learns_anew_when_a_hundredth_more_was_measured(tmp_path: Path) -> None:
    fits: list[int] = []

    class Counted(CalibratedPredictor):
        def learned(self, measured: object) -> CalibratedPredictor:
            fits.append(len(measured))  # type: ignore[arg-type]  # a sequence
            return self

        def believing(self, candidates: object) -> CalibratedPredictor:
            believed.append(len(candidates))  # type: ignore[arg-type]  # a sequence
            return self

    believed: list[int] = []
    model = LearningModel(Counted(model=Biased()))
    study = make_study(tmp_path, model, 6, 1)
    search(study, MemoryRunner(polls=0), tmp_path, 1, model).run()
    one = study.trials()[0]
    many = [replace(one, number=number) for number in range(300)]
    fits.clear(), believed.clear()
    for count in range(250, 260):
        model.learn(many[:count])
        model.predict([one.candidate])  # type: ignore[list-item]  # it was measured and has one
    assert fits == [250, 253, 256, 259]
    assert believed == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0], "what is not learnt yet is believed as predicted"


@pytest.mark.parametrize(("in_flight", "thinks"), [(1, False), (2, True)])
def test_the_loop_thinks_ahead_only_with_several_trials_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_flight: int, thinks: bool
) -> None:
    """A single one may be measured on the coordinator's own cores, which must be left alone."""
    thoughts: list[int] = []

    def think_ahead(study: Study, *_: object) -> Iterator[None]:
        thoughts.append(len(study.trials()))
        yield

    monkeypatch.setattr(Study, "think_ahead", think_ahead)
    model = LearningModel(CalibratedPredictor(model=Biased()))
    study = make_study(tmp_path, model, 5, in_flight)
    assert search(study, MemoryRunner(polls=2), tmp_path, in_flight, model).run() is StopReason.TRIALS
    assert bool(thoughts) is thinks


def test_an_exception_leaves_no_trial_in_flight(tmp_path: Path) -> None:
    model = LearningModel(CalibratedPredictor(model=Biased()))
    study = make_study(tmp_path, model, 5, 2)
    runner = MemoryRunner(polls=5)
    running = search(study, runner, tmp_path, 2, model)
    polled = 0

    def explode(_: object) -> object:
        nonlocal polled
        polled += 1
        if polled > 4:
            raise OSError("disk full")
        return MemoryRunner.poll(runner, _)  # type: ignore[arg-type]  # a handle

    runner.poll = explode  # type: ignore[method-assign,assignment]  # the fault under test
    with pytest.raises(OSError, match="disk full"):
        running.run()
    assert len(runner.stopped) == 2
    assert not any(trial.status is TrialStatus.RUNNING for trial in study.trials())


def test_all_free_places_are_asked_for_at_once_as_far_as_the_budget_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    ask_batch = Study.ask_batch

    def noted(
        study: Study, most: int, warm: Sequence[ServingConfig] = (), crowded: frozenset[str] = frozenset()
    ) -> tuple[Proposal, ...]:
        found = ask_batch(study, most, warm, crowded)
        asked.append((most, len(found)))
        return found

    monkeypatch.setattr(Study, "ask_batch", noted)
    model = LearningModel(CalibratedPredictor(model=Biased()))
    study = make_study(tmp_path, model, 10, 4)
    runner = MemoryRunner(polls=2)
    assert search(study, runner, tmp_path, 4, model).run() is StopReason.TRIALS
    assert asked == [(4, 4), (4, 4), (2, 2)]
    assert runner.most_in_flight == 4
    assert len({trial.key for trial in study.trials()}) == 10


def test_what_was_asked_for_and_could_not_be_started_is_given_back(tmp_path: Path) -> None:
    model = LearningModel(CalibratedPredictor(model=Biased()))
    study = make_study(tmp_path, model, 10, 4)
    runner = MemoryRunner()
    running = search(study, runner, tmp_path, 4, model)

    def explode(request: TrialRequest) -> TrialHandle:
        if len(runner.requests) == 2:
            raise OSError("too many open files")
        return MemoryRunner.start(runner, request)

    runner.start = explode  # type: ignore[method-assign]  # the fault under test
    with pytest.raises(OSError, match="too many open files"):
        running.run()
    statuses = [trial.status for trial in study.trials()]
    assert statuses == [TrialStatus.LOST] * 4 + [TrialStatus.WAITING] * 4
    assert list((tmp_path / "work").iterdir()) == []


def test_the_recent_gain_needs_something_to_grow_from() -> None:
    assert recent_gain([]) is None
    assert recent_gain([1.0] * 5) is None
    assert recent_gain([0.0] * 6) is None
    assert recent_gain([2.0, 0, 0, 0, 0, 3.0]) == pytest.approx(0.5)
