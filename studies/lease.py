"""The right to write to a study: held by one coordinator, renewed while it lives, taken over when it is dead.

    lease = take_lease(storage, "my-study")      # StudyBusyError names who holds it, since when, and the remedy
    lease.ensure()                               # LeaseLostError where another one has it by now
    lease.stop_order                             # what `order_stop` wrote, from any machine
    lease.note("trial 3 measured")               # a line of the study's log
    lease.release()                              # or `with take_lease(...) as lease:`

A thread renews the lease through connections of its own. A lease is free to take where nobody holds it, where its
process is certainly gone (looked up on the same machine), or where it was not renewed for its expiry on the storage's
clock. A holder that could not renew in time (it was paused, the storage was away) refuses to write until it has
renewed: that works only if nobody took the lease in between. While a lease is held, the fence of its storage checks it
before every write and again before each commit, so that a process paused in the middle of its work writes nothing late.
"""

from __future__ import annotations

import getpass
import logging
import os
import socket
import threading
import time
import uuid
import weakref
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

from search_spaces.errors import require
from studies.coordinator import Coordinator, this_coordinator
from studies.errors import LeaseLostError, StorageError, StudyBusyError, StudyNotFoundError
from studies.lease_record import Event, LeaseBook, LeaseRecord, Seen, StopOrder
from studies.redaction import redacted
from studies.storage import Storage, open_lease_book

SWAP_TRIES = 20
_log = logging.getLogger(__name__)
_held: set[str] = set()
"""Ids of the leases that this process holds."""


@dataclass(frozen=True, kw_only=True)
class LeaseTimes:
    """Seconds: a lease is renewed every `renew_s`, void after `expiry_s` without; orders are looked for every `poll_s`.

    Of `expiry_s` the holder itself uses all but `margin_s`: the longest that a checked write may take to its commit.
    """

    expiry_s: float = 60.0
    renew_s: float = 10.0
    poll_s: float = 2.0

    def __post_init__(self) -> None:
        require(self.poll_s > 0, f"poll_s={self.poll_s} must be above 0")
        limit = self.expiry_s / 3
        require(0 < self.renew_s <= limit, f"renew_s={self.renew_s} must be above 0 and at most expiry_s/3={limit:g}")

    @property
    def margin_s(self) -> float:
        """A tenth of the expiry, at most 5 s."""
        return min(5.0, self.expiry_s / 10)


def times_for(expiry_s: float) -> LeaseTimes:
    """The usual proportions for another expiry."""
    return LeaseTimes(expiry_s=expiry_s, renew_s=expiry_s / 6, poll_s=min(2.0, expiry_s / 6))


def take_lease(storage: Storage, study: str, times: LeaseTimes | None = None, *, wait_s: float = 0.0) -> Lease:
    """Become the coordinator of `study`; raises `StudyBusyError` where another one still is after `wait_s`.

    Of several takers one wins.
    """
    deadline = uptime_s() + wait_s
    while True:
        try:
            return _take(storage, study, times or LeaseTimes())
        except StudyBusyError:
            if uptime_s() >= deadline:
                raise
            time.sleep(min(1.0, wait_s))


def _take(storage: Storage, study: str, times: LeaseTimes) -> Lease:
    book = open_lease_book(storage)
    try:
        for _ in range(SWAP_TRIES):
            started = uptime_s()
            seen = book.read(study)
            _require_free(storage, study, seen)
            holder = this_coordinator(uuid.uuid4().hex)
            record = _taken(seen, times, holder)
            if book.swap(study, seen.record.version if seen.record else 0, record):
                state = _State(study=study, times=times, book=book, holder=holder, run=record.run)
                state.extend(started)
                return Lease(storage, state)
    except BaseException:
        book.close()
        raise
    book.close()
    raise StudyBusyError(f"study {study!r} is being taken by several processes at once; try again")


def read_lease(storage: Storage, study: str) -> Seen:
    """Who runs `study`, as the storage has it now."""
    book = open_lease_book(storage)
    try:
        return book.read(study)
    finally:
        book.close()


def read_events(storage: Storage, study: str, after: int = 0) -> list[Event]:
    """Lines of the log of `study` behind number `after`."""
    book = open_lease_book(storage)
    try:
        return book.events(study, after)
    finally:
        book.close()


def require_free(storage: Storage, study: str) -> None:
    """Raise `StudyBusyError` where a living coordinator runs `study`; a quick look before anything costly is begun."""
    _require_free(storage, study, read_lease(storage, study))


def order_stop(storage: Storage, study: str) -> LeaseRecord:
    """Let the coordinator of `study` know that it shall stop; returns its record.

    Raises `StudyNotFoundError` where nobody runs the study.
    """
    order_by = f"{_user()}@{socket.gethostname()}"
    book = open_lease_book(storage)
    try:
        for _ in range(SWAP_TRIES):
            seen = book.read(study)
            if seen.record is None or is_free(seen):
                raise StudyNotFoundError(f"nobody runs study {study!r}; there is nothing to stop")
            order = StopOrder(at_s=seen.now_s, by=order_by)
            ordered = replace(seen.record, version=seen.record.version + 1, stop=seen.record.stop or order)
            if book.swap(study, seen.record.version, ordered):
                return ordered
    finally:
        book.close()
    raise StudyBusyError(f"the record of study {study!r} changes all the time; try again")


def is_free(seen: Seen) -> bool:
    """True where the lease may be taken."""
    record = seen.record
    if record is None or record.holder is None or record.left_s(seen.now_s) < 0:
        return True
    return record.holder.is_gone or (record.holder.is_this_process and record.holder.id not in _held)


def _require_free(storage: Storage, study: str, seen: Seen) -> None:
    record = seen.record
    if record is None or record.holder is None or is_free(seen):
        return
    since = datetime.fromtimestamp(record.since_s, UTC)
    beat = f"last heartbeat {record.age_s(seen.now_s):.0f} s ago"
    holder = f"{record.holder} since {since:%Y-%m-%d %H:%M:%S} UTC ({beat})"
    raise StudyBusyError(
        f"study {study!r} in {storage.url} is run by {holder}. Follow it with: tuner study status {study}; end it "
        f"with: tuner study stop {study}. If that process is dead, its lease runs out in "
        f"{record.left_s(seen.now_s):.0f} s: try again then",
        holder,
    )


def _taken(seen: Seen, times: LeaseTimes, holder: Coordinator) -> LeaseRecord:
    before = seen.record
    return LeaseRecord(
        version=before.version + 1 if before else 1,
        run=before.run + 1 if before else 1,
        holder=holder,
        since_s=seen.now_s,
        renewed_s=seen.now_s,
        expiry_s=times.expiry_s,
    )


def uptime_s() -> float:
    """Seconds of a clock that nobody sets and that goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"user {os.getuid()}"


class Lease:
    """A lease that this process holds; make one with `take_lease`. It is released when it is garbage or at exit."""

    def __init__(self, storage: Storage, state: _State) -> None:
        self.study = state.study
        self.id = state.holder.id
        self.run = state.run
        self._state = state
        storage.fence.guards.append(self._state.check)
        _held.add(self.id)
        thread = threading.Thread(target=state.keep, name=f"lease of {state.study}", daemon=True)
        self._close = weakref.finalize(self, _close, self._state, thread, storage)
        thread.start()

    @property
    def stop_order(self) -> StopOrder | None:
        """The order to stop, None where there is none."""
        return self._state.stop

    def ensure(self) -> None:
        """Return where the lease is held, renewing it if it is overdue; raises `LeaseLostError` where it is not."""
        self._state.ensure()

    def note(self, text: str) -> None:
        """Add lines to the study's log, without secrets; they are written soon, by the thread that renews."""
        self._state.note(text)

    def release(self) -> None:
        """Write the log to its end and let others take the study; after a loss or a first call it does nothing."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Release it; an error that ends the run is noted in the log."""
        if kind is not None:
            self.note(f"this run ended with an error: {kind.__name__}: {error}")
        self.release()

    def abandon(self) -> None:
        """Stop renewing and tell nobody, as a process that dies would."""
        self._state.closing.set()
        self._state.lost = self._state.lost or "it was abandoned"
        self._close()


class _State:
    """What the thread that renews shares with the rest. It knows no `Lease`, so that one can become garbage."""

    def __init__(self, *, study: str, times: LeaseTimes, book: LeaseBook, holder: Coordinator, run: int) -> None:
        self.study, self.times, self.book, self.holder, self.run = study, times, book, holder, run
        self.closing = threading.Event()
        self.lost: str | None = None
        self.stop: StopOrder | None = None
        self._deadline = 0.0
        self._renew_at = 0.0
        self._lock = threading.RLock()
        self._lines_lock = threading.Lock()
        self._lines: list[tuple[float, str]] = []
        self._away = False  # whether the storage did not answer last time
        self._offset_s = 0.0  # storage's clock minus this machine's

    def extend(self, started: float) -> None:
        """The lease was renewed by a step that began at `started`."""
        self._deadline = started + self.times.expiry_s - self.times.margin_s
        self._renew_at = started + self.times.renew_s

    def check(self) -> None:
        """Raise `LeaseLostError` unless the lease is held for sure. It asks nobody, and is cheap."""
        if self.lost is None and uptime_s() < self._deadline:
            return
        cause = self.lost or f"it was not renewed for {self.times.expiry_s:g} s"
        raise LeaseLostError(
            f"this process ({self.holder}) does not run study {self.study!r} any more: {cause}. It stops and writes "
            f"nothing further; see who runs it with: tuner study status {self.study}"
        )

    def ensure(self) -> None:
        """As `Lease.ensure`."""
        if self.lost is None and uptime_s() >= self._deadline:
            self.renew()
        self.check()

    def keep(self) -> None:
        """Renew, look for orders and write the log until the lease is lost or closed."""
        while not self.closing.wait(self.times.poll_s) and self.lost is None:
            try:
                if uptime_s() >= self._renew_at:
                    self.renew()
                else:
                    self._look()
                self.flush()
                self._away = False
            except StorageError as error:
                if not self._away:
                    _log.warning("the lease of study %s cannot be renewed: %s", self.study, redacted(str(error)))
                self._away = True

    def _look(self) -> None:
        seen = self.book.read(self.study)
        with self._lock:
            self._mine(seen)

    def renew(self) -> None:
        """Write a heartbeat; marks the lease as lost where another one has it. Raises `StorageError`."""
        with self._lock:
            for _ in range(SWAP_TRIES):
                started = uptime_s()
                seen = self.book.read(self.study)
                record = self._mine(seen)
                if record is None:
                    return
                renewed = replace(record, version=record.version + 1, renewed_s=seen.now_s)
                if self.book.swap(self.study, record.version, renewed):
                    self.extend(started)
                    return

    def _mine(self, seen: Seen) -> LeaseRecord | None:
        """The record where it is still ours, noting orders; None, and lost, where it is not."""
        record = seen.record
        self._offset_s = seen.now_s - time.time()
        if record is not None and record.holder is not None and record.holder.id == self.holder.id:
            self.stop = record.stop
            return record
        taker = record.holder if record is not None and record.holder is not None else "someone"
        self.lost = f"{taker} has taken it over"
        return None

    def note(self, text: str) -> None:
        """As `Lease.note`."""
        at_s = time.time() + self._offset_s
        with self._lines_lock:
            self._lines += [(at_s, line) for line in redacted(text).splitlines()]

    def flush(self) -> None:
        """Write the lines that wait, while the lease is held. Raises `StorageError`, and keeps them then."""
        with self._lines_lock:
            lines = self._lines
            self._lines = []
        if not lines or self.lost is not None or uptime_s() >= self._deadline:
            return
        try:
            self.book.append(self.study, self.run, lines)
        except StorageError:
            with self._lines_lock:
                self._lines = lines + self._lines
            raise

    def give_back(self) -> None:
        """Free the lease for others. Raises `StorageError`."""
        with self._lock:
            for _ in range(SWAP_TRIES):
                record = self._mine(self.book.read(self.study))
                if record is None:
                    return
                if self.book.swap(self.study, record.version, replace(record, version=record.version + 1, holder=None)):
                    self.lost = "it was released"
                    return


def _close(state: _State, thread: threading.Thread, storage: Storage) -> None:
    """End the thread and the connections; write the log, and free lease and fence, unless the lease is lost."""
    if state.holder.pid != os.getpid():
        return  # a copy in a forked process: the lease is its parent's
    state.closing.set()
    thread.join(state.times.expiry_s)
    try:
        if state.lost is None:
            state.flush()
            state.give_back()
            storage.fence.guards.remove(state.check)
    except StorageError as error:
        _log.warning("the lease of study %s could not be released and will run out: %s", state.study, error)
    finally:
        _held.discard(state.holder.id)
        state.book.close()
