"""A study that measures again on purpose: on real storages, killed and resumed, and as NSGA-II sees it."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path

import optuna
import pytest

from search_spaces.outcome import Failure, FailureReason
from studies.codec import from_json
from studies.history import STABILITY, StudyHistory
from studies.noise import Stability
from studies.pareto import front
from studies.records import Origin, Proposal, TrialRecord, TrialStatus
from studies.repeats import RepeatRule, candidates_of, runs_by_key
from studies.samplers import SamplerKind
from studies.storage import Storage, open_storage
from studies.study import Study, create_study, open_study
from tests.studies.test_repeats import scaled
from tests.studies.toy import biased_model, measure, small_space, toy_problem, toy_setup, wide_space

RULE = RepeatRule(control_every=4, confirm=3)
WIDE = wide_space(toy_problem())


@pytest.fixture(params=["sqlite", "journal"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    url = {"sqlite": f"sqlite:///{tmp_path}/s.db", "journal": f"journal://{tmp_path}/s.journal"}[request.param]
    return open_storage(url)


def tell(study: Study, proposal: Proposal, factor: float = 1.0) -> TrialRecord:
    return study.tell(proposal, scaled(measure(proposal.candidate), factor))


def search(study: Study, candidates: int) -> None:
    """Ask and tell until so many candidates are finished."""
    while study.progress().finished < candidates:
        tell(study, study.ask(), factor=1.0 + 0.01 * (len(study.trials()) % 3))


def confirm(study: Study) -> list[TrialRecord]:
    told = []
    while (proposal := study.ask_repeat()) is not None:
        told.append(tell(study, proposal, factor=1.0 + 0.02 * (len(study.trials()) % 2)))
    return told


def test_controls_come_in_between_and_confirmations_at_the_end(tmp_path: Path, storage: Storage) -> None:
    study = create_study(storage, toy_setup(tmp_path, space=WIDE, predict=biased_model(), repeats=RULE))
    search(study, 9)
    first = study.trials()[0]
    controls = [trial for trial in study.trials() if trial.origin is Origin.CONTROL]
    assert [trial.number for trial in controls] == [4, 9]
    assert all(trial.repeat_of == 0 and trial.candidate == first.candidate for trial in controls)
    told = confirm(study)
    assert {trial.origin for trial in told} == {Origin.CONFIRM}
    runs = runs_by_key(study.trials())
    assert all(len(runs[member.key or ""].measured) == 3 for member in study.front() if member.key != first.key)
    firsts = [trial.key for trial in study.trials() if not trial.is_repeat]
    assert len(firsts) == len(set(firsts)) == 9, "a candidate is measured again by intent alone"
    assert study.ask_repeat() is None
    study.close()


def test_the_noise_and_the_drift_are_stored_with_the_study(tmp_path: Path, storage: Storage) -> None:
    study = create_study(storage, toy_setup(tmp_path, repeats=RepeatRule(control_every=2)))
    search(study, 6)
    study.close()
    stored = optuna.load_study(study_name="toy", storage=storage.backend).user_attrs[STABILITY]
    found = from_json(Stability, stored)
    assert found == study.stability()
    assert (found.control_runs, found.repeats) == (3, 2)
    values = runs_by_key(study.trials())[study.trials()[0].key or ""].values_of("output_tokens_per_s")
    assert 0 < found.noise["output_tokens_per_s"].log_stddev < statistics.stdev(values)
    assert "output_tokens_per_s" in found.drift
    assert optuna.load_study(study_name="toy", storage=storage.backend).trials[2].state.name == "COMPLETE"


def test_nsga2_meets_every_candidate_once_with_the_means_of_its_runs(tmp_path: Path, storage: Storage) -> None:
    setup = toy_setup(tmp_path, space=WIDE, repeats=RepeatRule(control_every=3))
    study = create_study(storage, setup)
    search(study, 8)
    for generations in (study._generations, _reopened(study, storage)):
        copied = generations.study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
        seen = [trial for trial in candidates_of(study.trials()) if trial.status is TrialStatus.MEASURED]
        assert [trial.values for trial in copied] == [pytest.approx(list(trial.values or ())) for trial in seen]
        assert copied[0].values[0] != study.trials()[0].values[0]  # type: ignore[index]  # it was measured
        assert len({str(sorted(trial.params.items())) for trial in copied}) == len(copied)
    stored = optuna.load_study(study_name="toy", storage=storage.backend).trials
    of_generations = [t.number for t in stored if "NSGAIISampler:generation" in t.system_attrs]
    assert of_generations == [t.number for t in study.trials() if not t.is_repeat]


def _reopened(study: Study, storage: Storage) -> object:
    study.close()
    again = open_study(storage, study.setup)
    again.close()
    return again._generations


def test_a_repeat_that_fails_makes_its_candidate_infeasible_for_nsga2_too(tmp_path: Path, storage: Storage) -> None:
    study = create_study(storage, toy_setup(tmp_path, repeats=RepeatRule(control_every=1)))
    tell(study, study.ask())
    repeat = study.ask()
    assert (repeat.origin, repeat.repeat_of) == (Origin.CONTROL, 0)
    record = study.tell(repeat, Failure(reason=FailureReason.ENGINE_CRASH, detail="exit 139"))
    assert record.status is TrialStatus.FAILED
    (individual,) = study._generations.study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    assert individual.system_attrs["constraints"][0] == 0.5
    assert individual.values == list(study.trials()[0].values or ())
    assert study.front() == ()


def test_a_lost_repeat_is_made_again_as_the_same_repeat(tmp_path: Path, storage: Storage) -> None:
    study = create_study(storage, toy_setup(tmp_path, repeats=RepeatRule(control_every=1)))
    tell(study, study.ask())
    lost = study.ask()
    study.tell(lost, Failure(reason=FailureReason.LOST_NODE, detail="gone"))
    again = study.ask()
    assert (again.origin, again.repeat_of, again.attempt) == (Origin.CONTROL, 0, 2)
    study.release(again)
    released = study.ask()
    assert (released.origin, released.repeat_of, released.attempt) == (Origin.CONTROL, 0, 2)


def test_a_killed_study_goes_on_confirming_where_it_was(tmp_path: Path, storage: Storage) -> None:
    setup = toy_setup(tmp_path, repeats=RepeatRule(control_every=0, confirm=3))
    study = create_study(storage, setup)
    search(study, 6)
    first, second = study.ask_repeat(), study.ask_repeat()
    assert first is not None
    assert second is not None
    tell(study, first)
    study.lease.release()  # as after a kill: nothing was told of the second
    again = open_study(storage, setup)
    assert [trial.number for trial in again.reconcile()] == [second.trial_number]
    confirm(again)
    counts = Counter(trial.key for trial in again.trials() if trial.is_finished)
    assert {counts[member.key] for member in again.front()} == {3}
    assert max(counts.values()) == 3, "nothing is confirmed more often for having been killed"


def test_what_waits_and_is_no_repeat_stays_where_it_is_while_confirming(tmp_path: Path, storage: Storage) -> None:
    space = small_space(toy_problem())
    seed = space.neighbours(space.default())[0]
    study = create_study(storage, toy_setup(tmp_path, space=space, seeds=(seed,), repeats=RULE))
    tell(study, study.ask())
    confirm(study)
    waiting = [trial for trial in study.trials() if trial.status is TrialStatus.WAITING]
    assert [trial.candidate for trial in waiting] == [seed]


def test_without_a_rule_nothing_is_measured_twice(tmp_path: Path, storage: Storage) -> None:
    study = create_study(storage, toy_setup(tmp_path))
    search(study, 6)
    assert study.ask_repeat() is None
    assert not any(trial.is_repeat for trial in study.trials())
    assert study.front() == front(study.history.trials(), study.directions)


@pytest.mark.parametrize("sampler", [SamplerKind.TPE, SamplerKind.RANDOM])
def test_other_samplers_search_with_repeats_too(tmp_path: Path, sampler: SamplerKind) -> None:
    setup = toy_setup(tmp_path, space=WIDE, sampler=sampler, repeats=RepeatRule(control_every=3))
    study = create_study(open_storage(f"journal://{tmp_path}/t.journal"), setup)
    search(study, 10)
    assert sum(trial.is_repeat for trial in study.trials()) == 3
    candidates = [trial for trial in study.trials() if not trial.is_repeat]
    assert len({trial.key for trial in candidates}) == 10


def test_a_setup_without_repeats_reads_a_study_with_them(tmp_path: Path, storage: Storage) -> None:
    study = create_study(storage, toy_setup(tmp_path, repeats=RULE))
    search(study, 5)
    study.close()
    trials = StudyHistory(storage, "toy").trials()
    assert trials == study.trials()
    again = open_study(storage, replace(study.setup, repeats=RepeatRule(control_every=0, confirm=1)))
    assert again.progress().repeats == 1
