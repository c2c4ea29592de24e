"""Violations: signs, sizes and what Optuna makes of the stored list."""

from __future__ import annotations

import optuna
from optuna.samplers import NSGAIISampler
from optuna.storages import InMemoryStorage

from search_spaces.problem import Slo
from studies.constraints import HELD, constraint_names, failed_violations, measured_violations, write_constraints

SLOS = (
    Slo(metric="ttft_p99_ms", threshold=200.0),
    Slo(metric="output_tokens_per_s", threshold=100.0),
    Slo(metric="ttft_p99_ms", threshold=100.0),
)


def test_violations_are_relative_and_signed_for_both_directions() -> None:
    violations = measured_violations(SLOS, {"ttft_p99_ms": 150.0, "output_tokens_per_s": 125.0})
    assert violations == {HELD: 0.0, "ttft_p99_ms": 0.5, "output_tokens_per_s": -0.25}
    assert constraint_names(SLOS) == (HELD, "ttft_p99_ms", "output_tokens_per_s")


def test_a_failed_configuration_ranks_just_behind_everything_measured() -> None:
    measured = [{HELD: 0.0, "a": 3.0, "b": 0.5}, {HELD: 0.0, "a": -1.0}]
    first = failed_violations(measured)
    assert first == {HELD: 4.5}
    assert failed_violations([*measured, first]) == first, "failures do not push each other further back"
    assert failed_violations([]) == {HELD: 1.0}


def test_optuna_reads_the_stored_list_once() -> None:
    storage = InMemoryStorage()
    study = optuna.create_study(directions=["minimize"] * 2, storage=storage, sampler=NSGAIISampler(seed=1))
    for violation in (2.0, 0.0):
        trial = study.ask()
        trial.suggest_float("x", 0, 1)
        trial_id = storage.get_trial_id_from_study_id_trial_number(0, trial.number)
        write_constraints(storage, trial_id, (HELD, "ttft_p99_ms"), {HELD: 0.0, "ttft_p99_ms": violation})
        study.tell(trial, [0.0, 0.0] if violation else [1.0, 1.0])
    assert [trial.constraints for trial in study.get_trials()] == [{"0": 0.0, "1": 2.0}, {"0": 0.0, "1": 0.0}]
    assert [trial.number for trial in study.best_trials] == [1], "the infeasible trial dominates by its values only"
