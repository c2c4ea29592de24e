"""Leases and logs beside a journal file: `<journal>.leases` and `<journal>.events`, changed under a lock of the kernel.

The lock (flock on `<journal>.guard`) goes with the process that holds it, so that no kill leaves it behind. The clock
is the file system's own, read from a time stamp it sets: the same for every machine that shares the files.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from studies.codec import Json, from_json, to_json
from studies.errors import StorageError
from studies.lease_record import Event, LeaseRecord, Seen


class FileLeaseBook:
    """See `studies.lease_record.LeaseBook`; `journal` is the path of the journal file."""

    def __init__(self, journal: Path) -> None:
        self._leases = journal.with_name(f"{journal.name}.leases")
        self._events = journal.with_name(f"{journal.name}.events")
        self._guard = journal.with_name(f"{journal.name}.guard")

    def read(self, study: str) -> Seen:
        """The record and the clock, at one moment."""
        with self._locked() as now_s:
            return Seen(now_s=now_s, record=self._records().get(study))

    def swap(self, study: str, version: int, record: LeaseRecord) -> bool:
        """Under the lock; the new file appears whole or not at all."""
        with self._locked():
            records = self._records()
            found = records.get(study)
            if (found.version if found else 0) != version:
                return False
            unfinished = self._leases.with_name(f"{self._leases.name}.new")
            unfinished.write_text(json.dumps(to_json(records | {study: record})), encoding="utf-8")
            unfinished.replace(self._leases)
            return True

    def append(self, study: str, run: int, lines: Sequence[tuple[float, str]]) -> None:
        """One JSON text per line. The line break goes first, so that a line that a kill cut short spoils no other."""
        rows = [json.dumps([study, at_s, run, line]) for at_s, line in lines]
        with self._locked(), self._events.open("a", encoding="utf-8") as file:
            file.write("".join(f"\n{row}" for row in rows))

    def events(self, study: str, after: int = 0) -> list[Event]:
        """In order; numbers count the lines of `study`."""
        with self._locked():
            lines = self._events.read_text(encoding="utf-8").splitlines() if self._events.exists() else []
        rows = [row for row in map(_parse, lines) if row is not None and row[0] == study]
        found = [Event(number=i, at_s=row[1], run=row[2], text=row[3]) for i, row in enumerate(rows, start=1)]
        return found[after:]

    def close(self) -> None:
        """Nothing stays open."""

    @contextmanager
    def _locked(self) -> Iterator[float]:
        """The lock, for the time of the block, with the file system's clock in seconds since the epoch."""
        try:
            with self._guard.open("ab") as guard:
                fcntl.flock(guard, fcntl.LOCK_EX)
                os.utime(guard.fileno())
                yield os.fstat(guard.fileno()).st_mtime
        except OSError as error:
            raise StorageError(
                f"{error.filename or self._guard} cannot be used ({error.strerror}); "
                "leases of the studies are kept beside the journal file: make its folder writable"
            ) from error

    def _records(self) -> dict[str, LeaseRecord]:
        if not self._leases.exists():
            return {}
        stored: dict[str, Json] = json.loads(self._leases.read_text(encoding="utf-8"))
        return {name: from_json(LeaseRecord, data) for name, data in stored.items()}


def _parse(line: str) -> tuple[str, float, int, str] | None:
    """The fields of a line of the log; None for an empty one and one that was cut short."""
    try:
        study, at_s, run, text = json.loads(line)
    except ValueError:
        return None
    return str(study), float(at_s), int(run), str(text)
