"""Finds and ends processes that a dead coordinator or actor left on this host.

A tagged process is an orphan when its owner (the actor that started it) or its coordinator (the driver of the study)
was on this host and is gone. Processes without our tags, and those of a live study, are never touched.
"""

from __future__ import annotations

import os
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
    live = []
    for orphan in orphans:
        try:
            live.append(psutil.Process(orphan.pid))
        except psutil.NoSuchProcess:
            continue
    end_processes(live, limit_s)
    return orphans
