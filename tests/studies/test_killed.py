"""A coordinator killed with SIGKILL before each single write of a study, and a second one that goes on."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from optuna.storages import BaseStorage

from search_spaces.outcome import Failure, FailureReason, Outcome
from studies.records import TrialStatus
from studies.stopping import Budget, stop_reason
from studies.storage import open_storage
from studies.study import Study, create_study, open_study
from tests.studies.toy import measure, toy_setup

BUDGET = Budget(trials=7)
"""One more than the toy setup's population, so that the last trial is bred."""
STRIDE = 1 if os.environ.get("TUNER_TEST_EVERY_WRITE") else 7
WRITES = (
    "create_new_trial",
    "set_trial_param",
    "set_trial_user_attr",
    "set_trial_system_attr",
    "set_trial_state_values",
    "set_study_user_attr",
    "set_study_system_attr",
)


def outcome_of(study: Study, number: int) -> Outcome:
    """Measured, but the second trial fails by its configuration and the third first by its node."""
    trial = study.trials()[number]
    if number == 1:
        return Failure(reason=FailureReason.ENGINE_CRASH, detail="exit code -11")
    if number == 2:
        return Failure(reason=FailureReason.LOST_NODE, detail="node 1 left")
    assert trial.candidate is not None
    return measure(trial.candidate)


def drive(study: Study, seen: Path) -> None:
    """The loop: reconcile, then ask, measure and tell up to the budget; every measurement leaves a line in `seen`."""
    study.reconcile()
    while stop_reason(BUDGET, study.progress(), elapsed_s=0.0) is None:
        proposal = study.ask()
        outcome = outcome_of(study, proposal.trial_number)
        with seen.open("a") as lines:
            lines.write(f"{proposal.candidate.key}\n")
        study.tell(proposal, outcome)
    study.close()


def arm(backend: BaseStorage, fatal_write: int) -> None:
    """Let this process be killed right before write number `fatal_write` of `backend`."""
    count = 0

    def fatal(method: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal count
            count += 1
            if count == fatal_write:
                os.kill(os.getpid(), signal.SIGKILL)
            return method(*args, **kwargs)

        return call

    for name in WRITES:
        setattr(backend, name, fatal(getattr(backend, name)))


def coordinate(url: str, folder: Path, fatal_write: int) -> None:
    """A coordinator in a process of its own."""
    storage = open_storage(url)
    study = create_study(storage, toy_setup(folder))
    arm(storage.direct, fatal_write)
    drive(study, folder / "seen")


def killed_before(url: str, folder: Path, fatal_write: int) -> bool:
    """Run a coordinator that dies before write `fatal_write`; False where it made fewer writes and ended well."""
    process = multiprocessing.get_context("fork").Process(target=coordinate, args=(url, folder, fatal_write))
    process.start()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL), f"coordinator ended with {process.exitcode}"
    return process.exitcode != 0


def check_resumed(url: str, folder: Path) -> None:
    study = open_study(open_storage(url), toy_setup(folder))
    drive(study, folder / "seen")
    trials = study.trials()
    finished = [trial.key for trial in trials if trial.is_finished]
    assert len(finished) == len(set(finished)) == BUDGET.trials
    assert {trial.status for trial in trials} <= {TrialStatus.MEASURED, TrialStatus.FAILED, TrialStatus.LOST}
    lost = {trial.number for trial in trials if trial.status is TrialStatus.LOST and trial.key is not None}
    assert {trial.retry_of for trial in trials} - {None} == lost
    measured = Counter((folder / "seen").read_text().split())
    assert set(measured) == set(finished)
    assert measured.total() <= BUDGET.trials + 2, "one more for the lost node, at most one for the kill"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "first"), [pytest.param("sqlite", 1, marks=pytest.mark.long), pytest.param("journal", 7)]
)
def test_a_kill_before_any_write_loses_repeats_and_strands_nothing(tmp_path: Path, kind: str, first: int) -> None:
    """Every `STRIDE`-th write of a study; `TUNER_TEST_EVERY_WRITE=1` takes them all (minutes)."""
    kills, killed = 0, True
    fatal_write = first
    while killed:
        folder = tmp_path / str(fatal_write)
        url = f"sqlite:///{folder}/s.db" if kind == "sqlite" else f"journal://{folder}/s.journal"
        killed = killed_before(url, folder, fatal_write)
        check_resumed(url, folder)
        kills += killed
        fatal_write += STRIDE
    assert kills >= 40 // STRIDE, "the sweep must have gone through a whole study"


def test_a_kill_between_ask_and_tell_loses_repeats_and_strands_nothing(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    ready, _ = pipe = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_ask_and_hang, args=(url, tmp_path, pipe[1]))
    process.start()
    number = ready.recv()
    process.kill()
    process.join(60)
    study = open_study(open_storage(url), toy_setup(tmp_path))
    assert study.trials()[number].status is TrialStatus.RUNNING
    assert [trial.number for trial in study.reconcile()] == [number]
    study.close()
    check_resumed(url, tmp_path)


def _ask_and_hang(url: str, folder: Path, ready: multiprocessing.connection.Connection) -> None:  # type: ignore[name-defined] # typeshed
    study = create_study(open_storage(url), toy_setup(folder))
    ready.send(study.ask().trial_number)
    signal.pause()
