"""What a storage remembers of who runs a study, and the one atomic step by which that changes.

A storage keeps one `LeaseRecord` per study in a `LeaseBook`. Every change replaces the whole record, and only if it is
still the version that was read (compare and set): of two processes that saw the same record, one wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from studies.coordinator import Coordinator


@dataclass(frozen=True, kw_only=True)
class StopOrder:
    """Someone wants the running coordinator to stop: when, in seconds on the storage's clock, and who (user@host)."""

    at_s: float
    by: str


@dataclass(frozen=True, kw_only=True)
class LeaseRecord:
    """Who runs a study. Times are seconds since the epoch on the storage's clock, the same for every machine.

    `version` counts the changes of the record, `run` the coordinators that the study has had. `holder` is None where
    nobody runs the study; the other fields then tell of the last one. The lease of a holder that has not renewed it
    for `expiry_s` is void.
    """

    version: int
    run: int
    holder: Coordinator | None
    since_s: float
    renewed_s: float
    expiry_s: float
    stop: StopOrder | None = None

    def age_s(self, now_s: float) -> float:
        """Seconds since the last heartbeat."""
        return max(0.0, now_s - self.renewed_s)

    def left_s(self, now_s: float) -> float:
        """Seconds until the lease is void unless it is renewed; negative where it is."""
        return self.renewed_s + self.expiry_s - now_s


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A record as it was read, None where the study has had no coordinator yet, and the storage's clock then."""

    now_s: float
    record: LeaseRecord | None


@dataclass(frozen=True, kw_only=True)
class Event:
    """A line of a study's log: its number, from 1, its time on the storage's clock, its run, and its text."""

    number: int
    at_s: float
    run: int
    text: str


class LeaseBook(Protocol):
    """Where a storage keeps leases and logs. Every method raises `StorageError` where the storage cannot be reached."""

    def read(self, study: str) -> Seen:
        """The record of `study` and the storage's clock."""
        ...

    def swap(self, study: str, version: int, record: LeaseRecord) -> bool:
        """Replace the record of `study` if it is still version `version` (0: there is none); False where it is not."""
        ...

    def append(self, study: str, run: int, lines: Sequence[tuple[float, str]]) -> None:
        """Add (time, text) `lines` to the log of `study`; only its coordinator does."""
        ...

    def events(self, study: str, after: int = 0) -> list[Event]:
        """The log of `study` behind line number `after`."""
        ...

    def close(self) -> None:
        """Give connections back."""
        ...
