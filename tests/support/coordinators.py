"""Coordinators in processes of their own, for tests of leases: each function here is the whole life of one."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path

from studies.coordinator import this_coordinator
from studies.errors import LeaseLostError, StorageError, StudyBusyError
from studies.lease import LeaseTimes, take_lease
from studies.lease_record import LeaseRecord
from studies.storage import open_lease_book, open_storage
from studies.study import open_study
from tests.studies.toy import measure, toy_setup

QUICK = LeaseTimes(expiry_s=3.0, renew_s=0.5, poll_s=0.1)
"""A lease for tests: void after 3 s."""
WENT_ON, LOST = 0, 3


def context() -> ForkServerContext:
    """Processes forked from a server without threads that has everything imported: they start in milliseconds."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.support.coordinators"])
    return server


@contextmanager
def process(target: Callable[..., None], *args: object) -> Iterator[ForkServerProcess]:
    """A running process, killed at the end if it still runs."""
    child = context().Process(target=target, args=args)
    child.start()
    try:
        yield child
    finally:
        child.kill()
        child.join(30)


def leave_dead_holder(url: str, study: str) -> None:
    """Write the lease of a coordinator of this machine whose process number nobody has."""
    book = open_lease_book(open_storage(url))
    seen = book.read(study)
    holder = replace(this_coordinator("dead"), pid=2**22 + 1)
    record = LeaseRecord(
        version=1, run=1, holder=holder, since_s=seen.now_s, renewed_s=seen.now_s, expiry_s=QUICK.expiry_s
    )
    assert book.swap(study, 0, record)
    book.close()


def race(url: str, studies: list[str], line: Barrier, results: Queue[tuple[str, int, str]]) -> None:
    """Try to take each of `studies` at the same moment as the others; tell who won, or what the loser was told."""
    storage = open_storage(url)
    for study in studies:
        line.wait(60)
        try:
            lease = take_lease(storage, study, QUICK)
        except StudyBusyError as error:
            results.put((study, 0, str(error)))
            lease = None
        else:
            results.put((study, os.getpid(), lease.id))
        line.wait(60)
        if lease is not None:
            lease.release()


def open_at_once(url: str, line: Barrier, results: Queue[str]) -> None:
    """Open a storage that nobody has made yet, at the same moment as others; tell what was wrong, if anything."""
    line.wait(60)
    try:
        open_storage(url)
    except StorageError as error:
        results.put(str(error))
    else:
        results.put("")


def hold(url: str, study: str, held: Event) -> None:
    """Take the lease and keep it."""
    lease = take_lease(open_storage(url), study, QUICK)
    held.set()
    while True:
        lease.ensure()
        held.wait(0.05)


def ask_and_wait(url: str, folder: Path, asked: Event, go_on: Event) -> None:
    """Ask for a trial, wait, and tell it; exits with `LOST` where the lease was lost in between, else `WENT_ON`."""
    storage = open_storage(url)
    study = open_study(storage, toy_setup(folder), take_lease(storage, "toy", QUICK))
    study.reconcile()
    proposal = study.ask()
    asked.set()
    go_on.wait(60)
    try:
        study.tell(proposal, measure(proposal.candidate))
    except LeaseLostError:
        study.close()
        os._exit(LOST)
    study.close()
