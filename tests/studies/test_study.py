"""Ask and tell on real storages."""

from __future__ import annotations

from pathlib import Path

import pytest

from studies.errors import SpaceExhausted, StudyExistsError, StudyFileChangedError, StudyNotFoundError
from studies.records import Origin, TrialStatus
from studies.screen import all_candidates
from studies.storage import open_storage
from studies.study import Study, create_study, open_study
from tests.studies.toy import biased_model, measure, small_space, toy_problem, toy_setup, wide_space


def run(study: Study, trials: int) -> None:
    """Ask, measure on the known surface and tell `trials` times."""
    for _ in range(trials):
        proposal = study.ask()
        study.tell(proposal, measure(proposal.candidate))


def test_defaults_of_every_mode_are_measured_first(tmp_path: Path) -> None:
    space = wide_space(toy_problem())
    storage = open_storage(f"sqlite:///{tmp_path}/s.db")
    with create_study(storage, toy_setup(tmp_path, space=space, predict=biased_model())) as study:
        run(study, 3)
        first, second, third = study.trials()
    assert first.candidate == space.default(space.modes[0])
    assert second.candidate == space.default(space.modes[1])
    assert [first.origin, second.origin, third.origin] == [Origin.DEFAULT, Origin.DEFAULT, Origin.SEED]


def test_a_small_space_is_measured_exactly_once_then_exhausted(tmp_path: Path) -> None:
    space = small_space(toy_problem())
    keys = {candidate.key for candidate in all_candidates(space)}
    storage = open_storage(f"sqlite:///{tmp_path}/s.db")
    with create_study(storage, toy_setup(tmp_path, space=space)) as study:
        run(study, len(keys))
        with pytest.raises(SpaceExhausted):
            study.ask()
        trials = study.trials()
    assert sorted(trial.key or "" for trial in trials) == sorted(keys)
    assert {trial.status for trial in trials} == {TrialStatus.MEASURED}


def test_open_refuses_another_study_file_and_shows_the_difference(tmp_path: Path) -> None:
    storage = open_storage(f"sqlite:///{tmp_path}/s.db")
    create_study(storage, toy_setup(tmp_path)).close()
    with pytest.raises(StudyFileChangedError, match="-budget: 12\n\\+budget: 13"):
        open_study(storage, toy_setup(tmp_path, study_file="model: toy\nbudget: 13\n"))
    open_study(storage, toy_setup(tmp_path)).close()


def test_names_are_taken_once_and_must_exist(tmp_path: Path) -> None:
    storage = open_storage(f"sqlite:///{tmp_path}/s.db")
    create_study(storage, toy_setup(tmp_path)).close()
    with pytest.raises(StudyExistsError, match="resume it"):
        create_study(storage, toy_setup(tmp_path))
    with pytest.raises(StudyNotFoundError, match="it has: toy"):
        open_study(storage, toy_setup(tmp_path, name="other"))
