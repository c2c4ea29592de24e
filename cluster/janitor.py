"""Finds and ends processes that nobody wants any more on this host.

A tagged process is an orphan when its owner (the actor that started it) or its coordinator (the driver of the study)
was on this host and is gone. It has no lease when its coordinator, wherever that is, does not count its trial among
those that it runs, or has not been heard of for long. Processes without our tags, and those of other live coordinators,
are never touched.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import psutil

from cluster.processes import TAG_COORDINATOR, TAG_OWNER, TAG_STUDY, TAG_TRIAL, ProcessId, end_processes

END_LIMIT_S = 3.0


@dataclass(frozen=True, kw_only=True)
class TaggedProcess:
    """A live process of a study on this host."""

    pid: int
    study: str
    trial: str
    owner: ProcessId | None
    coordinator: ProcessId | None

    @property
    def orphaned(self) -> bool:
        """True where its owner or its coordinator was on this host and is gone."""
        return any(p is not None and p.is_here and not p.is_alive for p in (self.owner, self.coordinator))


def tagged_processes(study: str | None = None) -> list[TaggedProcess]:
    """Live processes of `study` (None: of any study) on this host; those of other users cannot be seen."""
    found = []
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            ended = process.status() == psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        name = environment.get(TAG_STUDY)
        if ended or name is None or (study is not None and name != study) or process.pid == os.getpid():
            continue
        found.append(
            TaggedProcess(
                pid=process.pid,
                study=name,
                trial=environment.get(TAG_TRIAL, ""),
                owner=ProcessId.parse(environment.get(TAG_OWNER, "")),
                coordinator=ProcessId.parse(environment.get(TAG_COORDINATOR, "")),
            )
        )
    return found


def end_orphans(study: str | None = None, limit_s: float = END_LIMIT_S) -> list[TaggedProcess]:
    """End the orphans of `study` (None: of any study) on this host and return them."""
    orphans = [process for process in tagged_processes(study) if process.orphaned]
    end_tagged(orphans, limit_s)
    return orphans


def end_tagged(processes: Sequence[TaggedProcess], limit_s: float = END_LIMIT_S) -> None:
    """End `processes`."""
    live = []
    for process in processes:
        try:
            live.append(psutil.Process(process.pid))
        except psutil.NoSuchProcess:
            continue
    end_processes(live, limit_s)


def end_owned(owner: ProcessId, study: str, limit_s: float = END_LIMIT_S) -> list[TaggedProcess]:
    """End what `owner` of `study` has started on this host, grandchildren without a parent included; returns them."""
    left = [process for process in tagged_processes(study) if process.owner == owner]
    end_tagged(left, limit_s)
    return left


def coordinators_of(study: str) -> tuple[ProcessId, ...]:
    """The coordinators that processes of `study` on this host name."""
    return tuple({process.coordinator for process in tagged_processes(study) if process.coordinator is not None})


def dead_among(ids: Collection[ProcessId]) -> tuple[ProcessId, ...]:
    """Those of `ids` that were processes of this host and are gone."""
    return tuple(process for process in ids if process.is_here and not process.is_alive)


def end_processes_of(study: str, coordinators: Collection[ProcessId]) -> list[TaggedProcess]:
    """End the processes of `study` on this host that name one of `coordinators`, which are dead; returns them."""
    left = [process for process in tagged_processes(study) if process.coordinator in coordinators]
    end_tagged(left)
    return left


class Leases:
    """The leases of one coordinator's trials, as a node knows them (pure bookkeeping; times are monotonic seconds).

    A process loses its lease when two messages in a row, the first of them older than the process was first seen
    here, do not name its trial; and when no message has come for `abandoned_s`.
    """

    def __init__(self, coordinator: ProcessId, *, abandoned_s: float, now_s: float) -> None:
        self._coordinator = coordinator
        self._abandoned_s = abandoned_s
        self._heard_s = now_s
        self._messages = 0
        self._trials: frozenset[str] = frozenset()
        self._first_seen: dict[int, int] = {}

    def renew(self, trials: frozenset[str], now_s: float) -> None:
        """The coordinator runs `trials`, and no others."""
        self._trials, self._heard_s = trials, now_s
        self._messages += 1

    def without(self, processes: Sequence[TaggedProcess], now_s: float) -> list[TaggedProcess]:
        """Those of `processes`, all that there are now, that have no lease."""
        mine = [process for process in processes if process.coordinator == self._coordinator]
        unnamed = [process for process in mine if process.trial not in self._trials]
        self._first_seen = {p.pid: self._first_seen.get(p.pid, self._messages) for p in unnamed}
        if now_s - self._heard_s > self._abandoned_s:
            return mine
        return [process for process in unnamed if self._messages >= self._first_seen[process.pid] + 2]
