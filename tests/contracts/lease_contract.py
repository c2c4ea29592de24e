"""What a lease must do on every storage: subclass `LeaseContract` and give it a `url` fixture."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from search_spaces.outcome import FailureReason
from studies.errors import LeaseLostError, StudyBusyError, StudyNotFoundError
from studies.lease import is_free, order_stop, read_lease, take_lease, times_for
from studies.records import TrialStatus
from studies.storage import open_lease_book, open_storage
from studies.study import create_study, open_study
from tests.contracts.storage_contract import optuna_study
from tests.studies.toy import measure, toy_setup
from tests.support.coordinators import (
    LOST,
    QUICK,
    WENT_ON,
    ask_and_wait,
    context,
    hold,
    leave_dead_holder,
    open_at_once,
    process,
    race,
)


class LeaseContract:
    """Behaviour of leases on the storage at `url`."""

    def test_of_racing_starters_exactly_one_wins(self, url: str) -> None:
        """Five starters, eight studies: some never run, some left by a dead coordinator."""
        studies = [f"study-{number}" for number in range(8)]
        for study in studies[::2]:
            leave_dead_holder(url, study)
        line, results = context().Barrier(5), context().Queue()
        runners = [context().Process(target=race, args=(url, studies, line, results)) for _ in range(5)]
        for runner in runners:
            runner.start()
        told = [results.get(timeout=120) for _ in range(5 * len(studies))]
        for runner in runners:
            runner.join(60)
            assert runner.exitcode == 0
        for study in studies:
            winners = [pid for name, pid, _ in told if name == study and pid]
            losers = [text for name, pid, text in told if name == study and not pid]
            assert len(winners) == 1
            assert all(f"is run by process {winners[0]} on host" in text for text in losers)

    def test_processes_may_open_a_new_storage_at_once(self, url: str) -> None:
        line, results = context().Barrier(6), context().Queue()
        runners = [context().Process(target=open_at_once, args=(url, line, results)) for _ in range(6)]
        for runner in runners:
            runner.start()
        assert [results.get(timeout=120) for _ in runners] == [""] * 6
        for runner in runners:
            runner.join(60)

    def test_a_killed_holder_is_followed_at_once_and_a_living_one_never(self, url: str) -> None:
        storage = open_storage(url)
        held = context().Event()
        with process(hold, url, "toy", held) as holder:
            assert held.wait(60)
            deadline = time.monotonic() + 1.5 * QUICK.expiry_s
            while time.monotonic() < deadline:
                with pytest.raises(StudyBusyError, match=f"is run by process {holder.pid} on host .* since 20"):
                    take_lease(storage, "toy", QUICK)
                seen = read_lease(storage, "toy")
                assert seen.record is not None
                assert seen.record.age_s(seen.now_s) < QUICK.expiry_s - QUICK.margin_s
                time.sleep(0.2)
            os.kill(holder.pid or 0, signal.SIGKILL)
            holder.join(30)
            began = time.monotonic()
            lease = take_lease(storage, "toy", QUICK)
            assert time.monotonic() - began < QUICK.expiry_s / 2
            assert lease.run == 2
            lease.release()

    def test_a_paused_holder_that_was_followed_stops_and_writes_nothing(self, url: str, tmp_path: Path) -> None:
        create_study(open_storage(url), toy_setup(tmp_path)).close()
        asked, go_on = context().Event(), context().Event()
        with process(ask_and_wait, url, tmp_path, asked, go_on) as holder:
            assert asked.wait(60)
            os.kill(holder.pid or 0, signal.SIGSTOP)
            storage = open_storage(url)
            with pytest.raises(StudyBusyError):
                open_study(storage, toy_setup(tmp_path))
            time.sleep(QUICK.expiry_s + 0.2)
            study = open_study(storage, toy_setup(tmp_path), take_lease(storage, "toy", QUICK))
            (settled,) = study.reconcile()
            assert settled.failure is not None
            assert settled.failure.reason is FailureReason.LOST_COORDINATOR
            again = study.ask()
            assert study.trials()[again.trial_number].retry_of == settled.number
            before = study.trials()
            os.kill(holder.pid or 0, signal.SIGCONT)
            go_on.set()
            holder.join(60)
            assert holder.exitcode == LOST
            assert study.trials() == before
            assert study.tell(again, measure(again.candidate)).status is TrialStatus.MEASURED
            study.close()

    def test_a_paused_holder_that_nobody_followed_goes_on(self, url: str, tmp_path: Path) -> None:
        create_study(open_storage(url), toy_setup(tmp_path)).close()
        asked, go_on = context().Event(), context().Event()
        with process(ask_and_wait, url, tmp_path, asked, go_on) as holder:
            assert asked.wait(60)
            os.kill(holder.pid or 0, signal.SIGSTOP)
            time.sleep(QUICK.expiry_s + 0.2)
            assert is_free(read_lease(open_storage(url), "toy"))
            os.kill(holder.pid or 0, signal.SIGCONT)
            go_on.set()
            holder.join(60)
            assert holder.exitcode == WENT_ON
        with open_study(open_storage(url), toy_setup(tmp_path)) as study:
            assert [trial.status for trial in study.trials()[:1]] == [TrialStatus.MEASURED]

    def test_a_lost_lease_fences_every_write(self, url: str, tmp_path: Path) -> None:
        storage = open_storage(url)
        study = create_study(storage, toy_setup(tmp_path))
        proposal = study.ask()
        trial_id, study_id = study._mirror.trial_id(proposal.trial_number), study._writer.study_id
        before = stored(url)
        study.lease.abandon()
        for write in (
            study.ask,
            lambda: study.tell(proposal, measure(proposal.candidate)),
            lambda: study.release(proposal),
            study.reconcile,
            lambda: study._writer.lose(trial_id, None),
            lambda: storage.backend.set_trial_user_attr(trial_id, "late", 1),
            lambda: storage.backend.set_study_user_attr(study_id, "late", 1),
            lambda: storage.backend.create_new_trial(study_id),
        ):
            with pytest.raises(LeaseLostError, match="does not run study 'toy' any more: it was abandoned"):
                write()
        study.close()
        assert stored(url) == before

    def test_a_stop_order_reaches_the_holder_and_only_this_one(self, url: str) -> None:
        storage = open_storage(url)
        with pytest.raises(StudyNotFoundError, match="nobody runs study 'toy'"):
            order_stop(storage, "toy")
        lease = take_lease(storage, "toy", QUICK)
        assert lease.stop_order is None
        order_stop(open_storage(url), "toy")
        wait_for(lambda: lease.stop_order is not None)
        assert lease.stop_order is not None
        assert "@" in lease.stop_order.by
        lease.release()
        after = take_lease(storage, "toy", QUICK)
        time.sleep(3 * QUICK.poll_s)
        assert after.stop_order is None
        after.release()
        with pytest.raises(StudyNotFoundError):
            order_stop(storage, "toy")

    def test_the_log_is_read_by_others_without_secrets(self, url: str) -> None:
        storage = open_storage(url)
        first = take_lease(storage, "toy", QUICK)
        first.note("trial 0 begun\ntrial 0 measured")
        book = open_lease_book(open_storage(url))
        wait_for(lambda: len(book.events("toy")) == 2)
        first.note("kept in postgresql://me:hush@db/x?password=hush2&a=1")
        first.release()
        second = take_lease(storage, "toy", QUICK)
        second.note("trial 1 begun")
        second.release()
        other = take_lease(storage, "other", QUICK)
        other.note("unrelated")
        other.release()
        events = book.events("toy")
        assert [(event.number, event.run) for event in events] == [(1, 1), (2, 1), (3, 1), (4, 2)]
        assert events[2].text == "kept in postgresql://me:***@db/x?password=***&a=1"
        assert [event.text for event in book.events("toy", after=3)] == ["trial 1 begun"]
        assert abs(events[0].at_s - time.time()) < 60
        book.close()

    def test_a_lease_goes_with_its_study(self, url: str, tmp_path: Path) -> None:
        """A study that became garbage, as in a notebook, holds nothing."""
        create_study(open_storage(url), toy_setup(tmp_path))
        open_study(open_storage(url), toy_setup(tmp_path)).close()

    def test_leases_of_other_machines_count_until_they_run_out(self, url: str) -> None:
        book = open_lease_book(open_storage(url))
        take_lease(open_storage(url), "toy", times_for(1.5)).abandon()
        record = book.read("toy").record
        assert record is not None
        assert record.holder is not None
        elsewhere = replace(record, version=record.version + 1, holder=replace(record.holder, machine="another"))
        assert book.swap("toy", record.version, elsewhere)
        with pytest.raises(StudyBusyError, match=r"its lease runs out in [012] s"):
            take_lease(open_storage(url), "toy")
        time.sleep(2.0)
        take_lease(open_storage(url), "toy").release()
        book.close()


def stored(url: str) -> list[object]:
    """Everything that Optuna has of the study."""
    study = optuna_study(url)
    return [study.user_attrs, *((t.number, t.state, t.params, t.user_attrs, t.values) for t in study.get_trials())]


def wait_for(condition: Callable[[], bool], limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_s} s"
        time.sleep(0.02)
