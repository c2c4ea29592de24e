"""Server-sent events: the lines of a study's log, and its trials, front and status as they change.

See https://html.spec.whatwg.org/multipage/server-sent-events.html for the format. A client that comes back gets the
trials whole again, so that nothing is missed; of lines it asks for those behind the last one that it has.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from fastapi import HTTPException, Request
from starlette.concurrency import run_in_threadpool

from search_spaces.errors import TunerError
from studies.codec import Json
from studies.lease import is_free, read_events, read_lease
from studies.lease_record import Event
from studies.records import TrialRecord
from tuner.remote import require_known
from tuner.report import StudyReport, configuration_text, metrics_of
from tuner.serve.context import Service, finite
from tuner.status import StudyStatus, status_json, stored_status
from tuner.stored import make_report, stored_file

FOLLOW_S = 1.0
MOST_STREAMS = 32
"""Followers at once: each asks the storage once a second."""
QUIET_S = 15.0
"""After so long without an event a comment is sent, by which broken connections show."""
_COMMENT = ": nothing new\n\n"


@dataclass(kw_only=True)
class Streams:
    """How many streams there are."""

    most: int = MOST_STREAMS
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def one_more(self) -> Iterator[None]:
        """Count a stream for the time of the block."""
        with self._lock:
            self._now += 1
        try:
            yield
        finally:
            with self._lock:
                self._now -= 1

    def require_room(self) -> None:
        """Raise 429 where there are too many."""
        if self._now >= self.most:
            raise HTTPException(429, f"{self.most} streams are followed; end another one", {"Retry-After": "5"})


def status_of_study(service: Service, name: str) -> StudyStatus:
    """The status of a study, also of one whose first coordinator has not made it yet."""
    require_known(service.storage, name)
    return stored_status(service.storage, service.place, name, service.find_history(name))


def event_json(event: Event) -> dict[str, Json]:
    """A line of a log for programs."""
    return {"number": event.number, "at_s": event.at_s, "run": event.run, "text": event.text}


def progress_json(trial: TrialRecord, report: StudyReport) -> dict[str, object]:
    """A trial as it is told while its study runs; see `answers.Progress`."""
    metrics = metrics_of(trial)
    return {
        "trial": trial.number,
        "status": str(trial.status),
        "feasible": trial.feasible,
        "origin": str(trial.origin) if trial.origin else None,
        "repeat_of": trial.repeat_of,
        "configuration": configuration_text(report, trial),
        "objectives": {name: metrics.get(name) for name in report.objectives},
        "failure": str(trial.failure.reason) if trial.failure else None,
        "started_at": trial.started_at.isoformat() if trial.started_at else None,
        "ended_at": trial.ended_at.isoformat() if trial.ended_at else None,
    }


def points_json(report: StudyReport) -> dict[str, object]:
    """The front as points; see `answers.Points`."""
    return {
        "emulated": report.emulated,
        "objectives": [
            {"metric": metric, "direction": str(direction)}
            for metric, direction in zip(report.objectives, report.directions, strict=True)
        ],
        "front": [
            {
                "trial": member.number,
                "runs": report.spreads.count(member),
                "configuration": configuration_text(report, member),
                "objectives": {name: metrics_of(member).get(name) for name in report.objectives},
            }
            for member in report.front
        ],
    }


async def followed_lines(request: Request, service: Service, name: str, after: int) -> AsyncIterator[str]:
    """Lines as they come. The end is looked for before the lines, so that the last ones are not missed."""
    told_s = time.monotonic()
    while not await request.is_disconnected():
        ended = is_free(await run_in_threadpool(read_lease, service.storage, name))
        for event in await run_in_threadpool(read_events, service.storage, name, after):
            after, told_s = event.number, time.monotonic()
            yield f"id: {event.number}\ndata: {json.dumps(event_json(event))}\n\n"
        if ended:
            yield _event("end", {})
            return
        if time.monotonic() - told_s > QUIET_S:
            told_s = time.monotonic()
            yield _COMMENT
        await asyncio.sleep(FOLLOW_S)


async def followed_trials(request: Request, service: Service, name: str) -> AsyncIterator[str]:
    """Events `trial`, `front` and `status` at first and whenever one changes, and `end` when nobody runs the study."""
    seen, told_s = _Seen(service=service, name=name), time.monotonic()
    while not await request.is_disconnected():
        try:
            ended = is_free(await run_in_threadpool(read_lease, service.storage, name))
            new = await run_in_threadpool(seen.news)
        except TunerError as error:
            yield _event("fault", {"detail": str(error)})
            return
        if new:
            told_s = time.monotonic()
            yield new
        if ended:
            yield _event("end", {})
            return
        if time.monotonic() - told_s > QUIET_S:
            told_s = time.monotonic()
            yield _COMMENT
        await asyncio.sleep(FOLLOW_S)


@dataclass(kw_only=True)
class _Seen:
    """What one follower has been told of a study."""

    service: Service
    name: str
    _marks: dict[int, tuple[object, ...]] = field(default_factory=dict)
    _told: dict[str, str] = field(default_factory=dict)

    def news(self) -> str:
        """The events since the last call, empty where nothing changed."""
        history = self.service.find_history(self.name)
        found: list[str] = []
        if history is not None:
            changed = [trial for trial in history.trials() if self._marks.get(trial.number) != _mark(trial)]
            self._marks |= {trial.number: _mark(trial) for trial in changed}
            if changed or not self._told:  # a report is dear: once a second, and for each follower
                report = make_report(history, stored_file(history, self.service.place))
                found += [_event("trial", progress_json(trial, report)) for trial in changed]
                found += self._unless_told("front", points_json(report))
        found += self._unless_told("status", self._status())
        return "".join(found)

    def _status(self) -> dict[str, object]:
        """The status without what changes at every heartbeat."""
        status = status_json(status_of_study(self.service, self.name))
        return {key: value for key, value in status.items() if key in {"study", "state", "trials"}}

    def _unless_told(self, kind: str, tree: Mapping[str, object]) -> list[str]:
        event = _event(kind, tree)
        if self._told.get(kind) == event:
            return []
        self._told[kind] = event
        return [event]


def _mark(trial: TrialRecord) -> tuple[object, ...]:
    return trial.status, trial.started_at, trial.ended_at, trial.key


def _event(kind: str, tree: Mapping[str, object]) -> str:
    return f"event: {kind}\ndata: {json.dumps(finite(tree))}\n\n"
