"""What a study must do on every storage: subclass `StorageContract` and give it a `url` fixture."""

from __future__ import annotations

import math
import random
from pathlib import Path

import optuna
import pytest
from optuna.samplers import NSGAIISampler
from optuna.trial import TrialState as OptunaState

from search_spaces.outcome import Failure, FailureReason
from search_spaces.problem import Slo
from studies.constraints import HELD
from studies.errors import SpaceExhausted, StudyFileChangedError
from studies.history import StudyHistory, summaries
from studies.records import Origin, Proposal, TrialRecord, TrialStatus
from studies.screen import all_candidates
from studies.storage import open_storage
from studies.study import MAX_ATTEMPTS, Study, create_study, open_study
from tests.studies.toy import biased_model, measure, small_space, toy_problem, toy_setup, wide_space

OUT_OF_MEMORY = Failure(
    reason=FailureReason.OUT_OF_MEMORY_AT_BOOT, detail="the KV cache does not fit", log_tail="cudaMalloc failed"
)
LOST_NODE = Failure(reason=FailureReason.LOST_NODE, detail="node 3 left the cluster")


def run(study: Study, trials: int) -> list[TrialRecord]:
    """Ask, measure on the known surface and tell."""
    return [tell(study, study.ask()) for _ in range(trials)]


def tell(study: Study, proposal: Proposal) -> TrialRecord:
    return study.tell(proposal, measure(proposal.candidate))


def optuna_study(url: str) -> optuna.Study:
    """The study as Optuna itself sees it, through a connection of its own."""
    return optuna.load_study(study_name="toy", storage=open_storage(url).backend)


class StorageContract:
    """Behaviour of `Study` on the storage at `url`."""

    @pytest.fixture
    def study(self, url: str, tmp_path: Path) -> Study:
        return create_study(open_storage(url), toy_setup(tmp_path))

    def reopened(self, url: str, tmp_path: Path, **changes: object) -> Study:
        return open_study(open_storage(url), toy_setup(tmp_path, **changes))

    def test_a_measured_trial_reads_back_as_it_was_told(self, url: str, tmp_path: Path) -> None:
        log = tmp_path / "engine.log"
        log.write_text("listening\n")
        space = small_space(toy_problem((Slo(metric="ttft_p50_ms", threshold=30.0),)))
        study = create_study(open_storage(url), toy_setup(tmp_path, space=space, predict=biased_model()))
        proposal = study.ask()
        outcome = measure(proposal.candidate, artifacts={"engine log": str(log)})
        told = study.tell(proposal, outcome)
        (read,) = StudyHistory(open_storage(url), "toy").trials()
        assert read == told
        assert (read.candidate, read.outcome, read.origin) == (proposal.candidate, outcome, Origin.DEFAULT)
        assert read.prediction == proposal.prediction == biased_model()([proposal.candidate])[0]
        assert read.values == (outcome.metrics.output_tokens_per_s, outcome.metrics.ttft_ms.p50)
        assert read.violations[HELD] == 0
        assert read.violations["ttft_p50_ms"] == pytest.approx(outcome.metrics.ttft_ms.p50 / 30.0 - 1)
        stored = tmp_path / "artifacts" / read.artifact_ids["engine log"]
        assert stored.read_text() == "listening\n"

    def test_optuna_sees_names_values_metrics_and_constraints(self, url: str, study: Study) -> None:
        (record,) = run(study, 1)
        seen = optuna_study(url)
        (trial,) = seen.get_trials()
        assert seen.metric_names == ["output_tokens_per_s", "ttft_p50_ms"]
        assert trial.values == list(record.values or ())
        assert record.measurement is not None
        assert trial.user_attrs["metrics"] == record.measurement.metrics.flat()
        assert trial.constraints == {"0": 0.0}

    def test_a_configuration_fault_is_finished_finite_and_never_on_the_front(self, url: str, study: Study) -> None:
        run(study, 2)
        failed = study.tell(study.ask(), OUT_OF_MEMORY)
        assert failed.status is TrialStatus.FAILED
        assert failed.is_finished
        assert failed.values is None
        assert failed.failure == OUT_OF_MEMORY
        assert failed not in study.front()
        trial = optuna_study(url).get_trials()[failed.number]
        assert trial.state is OptunaState.COMPLETE
        assert all(math.isfinite(value) for value in trial.values)
        assert trial.constraints["0"] >= 1
        run(study, 1)
        assert study.trials()[-1].key != failed.key

    def test_a_fault_before_any_measurement_takes_the_predicted_values(self, url: str, tmp_path: Path) -> None:
        study = create_study(open_storage(url), toy_setup(tmp_path, predict=biased_model()))
        proposal = study.ask()
        study.tell(proposal, OUT_OF_MEMORY)
        assert proposal.prediction is not None
        predicted = proposal.prediction.metrics
        values = optuna_study(url).get_trials()[0].values
        assert values == [predicted["output_tokens_per_s"], predicted["ttft_p50_ms"]]

    def test_an_infrastructure_fault_is_tried_again_a_bounded_number_of_times(self, study: Study) -> None:
        first = study.ask()
        tries = [study.tell(first, LOST_NODE)]
        for attempt in range(2, MAX_ATTEMPTS + 1):
            again = study.ask()
            assert (again.candidate, again.attempt) == (first.candidate, attempt)
            tries.append(study.tell(again, LOST_NODE))
        assert [trial.status for trial in tries] == [TrialStatus.LOST] * MAX_ATTEMPTS
        assert [trial.retry_of for trial in tries] == [None, 0, 1]
        rest = _ask_everything(study)
        assert first.candidate not in [proposal.candidate for proposal in rest]

    def test_a_retried_trial_may_succeed_and_is_counted_once(self, study: Study) -> None:
        lost = study.tell(study.ask(), LOST_NODE)
        measured = tell(study, study.ask())
        assert (measured.key, measured.retry_of, measured.attempt) == (lost.key, lost.number, 2)
        assert (study.progress().finished, study.progress().lost) == (1, 1)

    def test_a_released_proposal_comes_back_without_a_try_counted(self, url: str, tmp_path: Path, study: Study) -> None:
        proposal = study.ask()
        assert study.release(proposal).status is TrialStatus.LOST
        study.close()
        again = self.reopened(url, tmp_path)
        assert again.reconcile() == ()
        second = again.ask()
        assert (second.candidate, second.attempt) == (proposal.candidate, 1)

    def test_a_small_space_is_measured_exactly_once_then_exhausted(self, study: Study) -> None:
        keys = {candidate.key for candidate in all_candidates(study.setup.space)}
        run(study, len(keys))
        with pytest.raises(SpaceExhausted, match="widen the space"):
            study.ask()
        assert sorted(trial.key or "" for trial in study.trials()) == sorted(keys)
        assert {trial.status for trial in study.trials()} == {TrialStatus.MEASURED}

    def test_queued_trials_breed(self, url: str, tmp_path: Path) -> None:
        """Every trial has its generation, and the first children come from the queued defaults and seeds."""
        space = wide_space(toy_problem())
        study = create_study(open_storage(url), toy_setup(tmp_path, space=space, predict=biased_model()))
        population = study.history.population
        run(study, population + 2)
        seen = optuna_study(url)
        generations = [trial.system_attrs["NSGAIISampler:generation"] for trial in seen.get_trials()]
        assert generations == [0] * population + [1, 1]
        parents = NSGAIISampler(population_size=population).get_parent_population(seen, 1)
        assert sorted(trial.number for trial in parents) == list(range(population))

    def test_a_trial_left_running_is_failed_once_and_proposed_again(
        self, url: str, tmp_path: Path, study: Study
    ) -> None:
        run(study, 1)
        orphan = study.ask()
        study.lease.abandon()
        resumed = self.reopened(url, tmp_path)
        (settled,) = resumed.reconcile()
        assert (settled.number, settled.status) == (orphan.trial_number, TrialStatus.LOST)
        assert settled.failure is not None
        assert settled.failure.reason is FailureReason.LOST_COORDINATOR
        assert resumed.reconcile() == ()
        again = resumed.ask()
        assert again.candidate == orphan.candidate
        assert resumed.trials()[again.trial_number].retry_of == orphan.trial_number

    def test_an_outcome_written_before_the_crash_is_not_measured_again(
        self, url: str, tmp_path: Path, study: Study, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        proposal = study.ask()
        with monkeypatch.context() as patch:
            patch.setattr(Study, "_finish", _die)
            with pytest.raises(InterruptedError):
                tell(study, proposal)
        study.lease.abandon()
        resumed = self.reopened(url, tmp_path)
        (settled,) = resumed.reconcile()
        assert settled.status is TrialStatus.MEASURED
        assert settled.outcome == measure(proposal.candidate)
        assert resumed.ask().candidate != proposal.candidate

    def test_a_lost_trial_whose_repeat_was_not_queued_is_queued_on_resume(
        self, url: str, tmp_path: Path, study: Study, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        proposal = study.ask()
        with monkeypatch.context() as patch:
            patch.setattr(Study, "_requeue", _die)
            with pytest.raises(InterruptedError):
                study.tell(proposal, LOST_NODE)
        study.lease.abandon()
        resumed = self.reopened(url, tmp_path)
        resumed.reconcile()
        resumed.reconcile()
        again = resumed.ask()
        assert (again.candidate, again.attempt) == (proposal.candidate, 2)
        assert [trial.retry_of for trial in resumed.trials()].count(proposal.trial_number) == 1

    def test_eight_trials_in_flight_are_asked_and_told_in_any_order(self, url: str, tmp_path: Path) -> None:
        """As many as a busy cluster has: no candidate twice, none stranded, every generation full before the next."""
        space = wide_space(toy_problem())
        setup = toy_setup(tmp_path, space=space, in_flight=8, budget_trials=60)
        with create_study(open_storage(url), setup) as study:
            order = random.Random(3)
            flying: list[Proposal] = []
            while study.progress().finished < 60:
                while len(flying) < 8 and study.progress().finished + len(flying) < 60:
                    flying.append(study.ask(warm=tuple(proposal.candidate.config for proposal in flying[:2])))
                assert study.progress().running == len(flying)
                proposal = flying.pop(order.randrange(len(flying)))
                lost = order.random() < 0.1 and proposal.attempt == 1
                told = study.tell(proposal, LOST_NODE) if lost else tell(study, proposal)
                assert told.status is (TrialStatus.LOST if lost else TrialStatus.MEASURED)
        trials = StudyHistory(open_storage(url), "toy").trials()
        finished = [trial.key for trial in trials if trial.is_finished]
        assert len(finished) == len(set(finished)) == 60
        lost_trials = [trial for trial in trials if trial.status is TrialStatus.LOST]
        assert len(lost_trials) >= 3
        assert {trial.retry_of for trial in trials} - {None} == {trial.number for trial in lost_trials}
        assert {trial.lease for trial in trials} == {study.lease.id}
        bred = [trial.system_attrs["NSGAIISampler:generation"] for trial in optuna_study(url).get_trials()]
        assert bred == sorted(bred)
        assert max(bred) == 1

    def test_another_study_file_is_refused_with_the_difference(self, url: str, tmp_path: Path, study: Study) -> None:
        study.close()
        with pytest.raises(StudyFileChangedError, match="-budget: 12\n\\+budget: 13"):
            self.reopened(url, tmp_path, study_file="model: toy\nbudget: 13\n")

    def test_a_study_is_listed(self, url: str, study: Study) -> None:
        run(study, 1)
        study.tell(study.ask(), OUT_OF_MEMORY)
        study.tell(study.ask(), LOST_NODE)
        (summary,) = summaries(open_storage(url))
        assert (summary.name, summary.objectives) == ("toy", ("output_tokens_per_s", "ttft_p50_ms"))
        assert (summary.measured, summary.failed, summary.lost, summary.open) == (1, 1, 1, 1)


def _ask_everything(study: Study) -> list[Proposal]:
    proposals = []
    while True:
        try:
            proposals.append(study.ask())
        except SpaceExhausted:
            return proposals


def _die(*_: object, **__: object) -> None:
    raise InterruptedError
