"""Status, logs and stop of a study, called in this process while another one holds or has held its lease."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import optuna
import pytest

import tuner.wiring
from search_spaces.problem import Problem
from studies.coordinator import this_coordinator
from studies.history import STUDY_HASH
from studies.lease import Lease, take_lease, times_for
from studies.lease_record import LeaseRecord, Seen, StopOrder
from studies.records import Origin, TrialRecord, TrialStatus
from studies.stopping import StopReason
from studies.storage import open_storage
from tests.studies.toy import measure, small_space, toy_problem
from tests.support.commands import TEXT, Invoke, NoCluster
from tests.support.memory_runner import MemoryRunner
from tuner.places import Place
from tuner.status import State, status_json, status_of, status_text
from tuner.study_schema import BudgetSection

NOW_S = 1_000_000.0
BEGAN = datetime(2026, 11, 1, 12, 0, 0)  # noqa: DTZ001 - Optuna stores local times without a zone


def seen(**changes: object) -> Seen:
    holder = this_coordinator("me")
    values = {
        "version": 3,
        "run": 2,
        "holder": replace(holder, machine="another"),
        "since_s": NOW_S - 100.0,
        "renewed_s": NOW_S - 5.0,
        "expiry_s": 60.0,
    }
    return Seen(now_s=NOW_S, record=LeaseRecord(**(values | changes)))  # type: ignore[arg-type] # fields by name


def trial(number: int, status: TrialStatus, lease: str = "me", *, began_s: float, took_s: float = 20.0) -> TrialRecord:
    """A trial that began `began_s` after the first."""
    space = small_space(toy_problem())
    outcome = measure(space.default())
    measured = status is TrialStatus.MEASURED
    return TrialRecord(
        number=number,
        status=status,
        candidate=space.default(),
        key=f"key {number}",
        origin=Origin.SCREENED,
        prediction=None,
        outcome=outcome if measured else None,
        values=(1.0, 2.0) if measured else None,
        lease=lease,
        started_at=BEGAN + timedelta(seconds=began_s),
        ended_at=BEGAN + timedelta(seconds=began_s + took_s) if measured else None,
    )


TRIALS = (
    trial(0, TrialStatus.MEASURED, "before", began_s=-9000.0, took_s=5000.0),
    trial(1, TrialStatus.MEASURED, began_s=0.0),
    trial(2, TrialStatus.MEASURED, began_s=20.0),
    trial(3, TrialStatus.RUNNING, began_s=40.0),
)


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({}, State.RUNNING),
        ({"stop": StopOrder(at_s=NOW_S - 1, by="me@here")}, State.STOPPING),
        ({"renewed_s": NOW_S - 61}, State.DIED),
        ({"holder": None}, State.STOPPED),
    ],
)
def test_states(changes: dict[str, object], state: State) -> None:
    found = status_of("toy", "db", TRIALS, seen(**changes), BudgetSection(trials=10))
    assert found.state is state
    assert str(state) in status_text(found).splitlines()[0]
    assert status_json(found)["state"] == state.name.lower()


def test_a_study_without_a_coordinator_that_has_its_trials_is_finished() -> None:
    found = status_of("toy", "db", TRIALS, seen(holder=None), BudgetSection(trials=3))
    assert found.state is State.FINISHED
    assert "go on with" not in status_text(found)


def test_the_time_left_is_at_the_pace_of_this_run() -> None:
    """Two trials in 40 s, 7 of 10 left: 140 s. The slow trial of the run before does not count."""
    assert status_of("toy", "db", TRIALS, seen(), BudgetSection(trials=10)).eta_s == pytest.approx(140.0)
    limited = BudgetSection(trials=10, wall_time=130.0)
    assert status_of("toy", "db", TRIALS, seen(), limited).eta_s == pytest.approx(30.0)
    assert status_of("toy", "db", TRIALS[:1], seen(), BudgetSection(trials=10)).eta_s is None
    assert status_of("toy", "db", TRIALS, seen(holder=None), BudgetSection(trials=10)).eta_s is None


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Invoke:
    """Commands in an empty folder, with trials of 20 ms that are measured in memory."""

    class SlowRunner(MemoryRunner):
        def poll(self, handle: object) -> object:  # type: ignore[override] # passes on what it is given
            time.sleep(0.02)
            return super().poll(handle)  # type: ignore[arg-type]

    class SlowCluster(NoCluster):
        def runner(self, _study: str) -> MemoryRunner:
            return SlowRunner(polls=0)

    def connector(_address: object, _engines: object) -> object:
        @contextmanager
        def connect(_problem: Problem, _place: Place) -> Iterator[NoCluster]:
            yield SlowCluster()

        return connect

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TUNER_STORAGE", raising=False)
    monkeypatch.setattr(tuner.wiring, "connector", connector)
    (tmp_path / "study.yaml").write_text(TEXT)
    return Invoke(monkeypatch, capsys)


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Callable[[], Lease]]:
    """Takes the lease of the study `toy`; given back at the end."""
    leases: list[Lease] = []

    def take() -> Lease:
        (tmp_path / "tuner-data").mkdir(exist_ok=True)
        storage = open_storage(f"sqlite:///{tmp_path}/tuner-data/studies.db")
        leases.append(take_lease(storage, "toy", times_for(3.0)))
        return leases[-1]

    yield take
    for lease in leases:
        lease.release()


def test_a_finished_study(invoke: Invoke) -> None:
    assert invoke("study", "run", "study.yaml", "--set", "budget.trials=8").code == 0
    found = json.loads(invoke("study", "status", "toy", "--json").out)
    assert (found["state"], found["coordinator"]) == ("finished", None)
    assert (found["trials"]["finished"], found["trials"]["budget"]) == (8, 8)
    assert "8 of 8 (8 measured, 0 failed), 0 running" in invoke("study", "status", "toy").out
    lines = invoke("study", "logs", "toy").out.splitlines()
    assert "run 1 of study toy by process" in lines[0]
    assert lines[-1].endswith("the search ended: the budget of trials is used")
    assert sum(" measured: " in line for line in lines) == 8
    assert invoke("study", "logs", "toy", "--tail", "2").out.splitlines() == lines[-2:]
    assert invoke("study", "logs", "toy", "--tail", "0").out == ""
    stopped = invoke("study", "stop", "toy")
    assert (stopped.code, "nobody runs study 'toy'" in stopped.err) == (2, True)


def test_a_resume_keeps_its_budget_with_the_study(invoke: Invoke, tmp_path: Path) -> None:
    """The next resume by name alone, and whoever looks, go by the last budget, whether it was raised or lowered."""

    def stored_hash() -> str:
        with closing(sqlite3.connect(tmp_path / "tuner-data" / "studies.db")) as database:
            query = "SELECT value_json FROM study_user_attributes WHERE key = ?"
            return str(json.loads(database.execute(query, (STUDY_HASH,)).fetchone()[0]))

    invoke("study", "run", "study.yaml", "--set", "budget.trials=3")
    first = stored_hash()
    for budget, state in ((5, "finished"), (40, "stopped"), (7, "finished")):
        more = ("--set", "budget.wall_time=0.001") if state == "stopped" else ("--set", "budget.wall_time=1h")
        assert invoke("study", "resume", "toy", "--set", f"budget.trials={budget}", *more).code == 0
        found = json.loads(invoke("study", "status", "toy", "--json").out)
        assert (found["trials"]["budget"], found["state"]) == (budget, state)
        assert f" of {budget} trials" in invoke("study", "show", "toy").out
    assert "nothing to measure" in invoke("study", "resume", "toy").err
    assert stored_hash() != first


@pytest.mark.parametrize(
    ("limits", "reason", "state"),
    [
        (["budget.trials=500"], StopReason.SPACE_EXHAUSTED, "finished"),
        (["budget.trials=500", "budget.device_hours=0.001"], StopReason.DEVICE_HOURS, "finished"),
        (["budget.trials=500", "budget.wall_time=0.2"], StopReason.WALL_TIME, "stopped"),
    ],
)
def test_why_a_study_ended_is_told(invoke: Invoke, limits: list[str], reason: StopReason, state: str) -> None:
    assert invoke("study", "run", "study.yaml", *(part for limit in limits for part in ("--set", limit))).code == 0
    found = json.loads(invoke("study", "status", "toy", "--json").out)
    assert (found["ended"], found["state"]) == (reason, state)
    text = invoke("study", "status", "toy").out
    assert str(reason) in text
    assert ("go on with" in text) is (state == "stopped")
    assert f"({reason})" in invoke("study", "show", "toy").out


def test_a_study_that_is_only_being_made_is_told_of_and_made(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "tuner-data").mkdir()
    storage = open_storage(f"sqlite:///{tmp_path}/tuner-data/studies.db")
    optuna.create_study(study_name="toy", storage=storage.backend, directions=["maximize", "minimize"])
    assert json.loads(invoke("study", "status", "toy", "--json").out)["trials"]["finished"] == 0
    assert invoke("study", "run", "study.yaml", "--set", "budget.trials=1").code == 0
    assert json.loads(invoke("study", "status", "toy", "--json").out)["trials"]["finished"] == 1


@pytest.mark.parametrize("command", ["status", "logs", "stop"])
def test_a_study_that_is_not_there(invoke: Invoke, command: str) -> None:
    invoke("study", "run", "study.yaml", "--set", "budget.trials=1")
    done = invoke("study", command, "toi")
    assert (done.code, "has no study 'toi'; it has: toy" in done.err) == (2, True)


def test_a_run_is_refused_while_another_one_holds_the_lease(invoke: Invoke, held: Callable[[], Lease]) -> None:
    lease = held()
    done = invoke("study", "run", "study.yaml")
    assert done.code == 2
    assert "is run by process" in done.err
    found = json.loads(invoke("study", "status", "toy", "--json").out)
    assert (found["state"], found["trials"]["budget"]) == ("running", None)
    lease.release()
    assert invoke("study", "run", "study.yaml").code == 0


def test_a_run_may_wait_for_the_lease(
    invoke: Invoke, held: Callable[[], Lease], monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = held()
    monkeypatch.setenv("TUNER_LEASE_WAIT_S", "30")
    timer = threading.Timer(1.0, lease.release)
    timer.start()
    assert invoke("study", "run", "study.yaml").code == 0
    timer.join()


def test_a_stop_ends_a_run_and_a_follower_sees_it(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNER_LEASE_EXPIRY_S", "1.5")
    url = f"sqlite:///{tmp_path}/tuner-data/studies.db"

    def stop_when_begun() -> None:
        from studies.history import StudyHistory
        from studies.lease import order_stop

        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            time.sleep(0.05)
            with suppress(Exception):  # the study is not there yet
                if any(t.is_finished for t in StudyHistory(open_storage(url), "toy").trials()):
                    order_stop(open_storage(url), "toy")
                    return

    thread = threading.Thread(target=stop_when_begun, daemon=True)
    thread.start()
    done = invoke("study", "run", "study.yaml", "--set", "budget.trials=500", "--set", "workload.concurrency=[1,2,3,4]")
    thread.join(10)
    assert done.code == 143
    assert "go on with: tuner study resume toy" in done.err
    followed = invoke("study", "logs", "toy", "-f").out
    assert "the search ended: stopped on the order of" in followed
    assert json.loads(invoke("study", "status", "toy", "--json").out)["state"] == "stopped"


def test_detaching_needs_a_cluster_that_stays(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    done = invoke("study", "run", "study.yaml", "--detach")
    assert done.code == 2
    assert "--detach needs a Ray cluster that goes on when this command ends; give its address" in done.err


@pytest.mark.parametrize("wrong", ["postgresql:me:hush@db/x", "me:hush@db/x"])
def test_a_password_in_a_wrong_url_is_not_repeated(invoke: Invoke, wrong: str) -> None:
    for done in (
        invoke("study", "run", "study.yaml", "--set", f"storage='{wrong}'"),
        invoke("study", "run", "study.yaml", "--storage", wrong),
    ):
        assert done.code == 2
        assert "hush" not in done.err + done.out


def test_a_wrong_expiry_is_told(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNER_LEASE_EXPIRY_S", "soon")
    done = invoke("study", "run", "study.yaml")
    assert (done.code, "TUNER_LEASE_EXPIRY_S='soon' is no number of seconds; set such as 60" in done.err) == (2, True)
