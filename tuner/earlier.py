"""What earlier studies in the same storage teach a new one: how wrong the model was on problems related to its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from perf_model.calibration import Observation
from search_spaces.problem import Problem
from studies.errors import StudyFormatError
from studies.history import StudyHistory, study_names
from studies.storage import Storage
from tuner.devices import load_devices
from tuner.places import Place
from tuner.stored import stored_file
from tuner.study_errors import StudyFileError
from tuner.study_schema import StudyFile
from tuner.wiring import make_predictor, make_problem

MOST_STUDIES, MOST_TRIALS = 3, 60
"""Related studies that a new one learns from, the latest of them, and measured trials of each, the latest ones."""


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What one earlier study teaches, and what it has in common with the new one."""

    study: str
    relation: str
    observations: tuple[Observation, ...]

    def __str__(self) -> str:
        return f"{self.study} ({len(self.observations)} measurements, {self.relation})"


def lessons(storage: Storage, place: Place, file: StudyFile, problem: Problem) -> tuple[Lesson, ...]:
    """What related studies teach that of `file`: an engine in common, and the model or a kind of node.

    Studies that began after it are left out, so that a resume learns what the first run did.
    """
    own = _began(storage, file.name)
    found: list[Lesson] = []
    for began, history in sorted(_others(storage, file.name), key=lambda pair: pair[0], reverse=True):
        if (own is None or began < own) and len(found) < MOST_STUDIES:
            lesson = _lesson(history, place, file, problem)
            found += [lesson] if lesson is not None and lesson.observations else []
    return tuple(found)


def _others(storage: Storage, name: str) -> Iterator[tuple[datetime, StudyHistory]]:
    """Every other study that this version can read and that has begun."""
    for other in study_names(storage):
        began = _began(storage, other) if other != name else None
        if began is not None:
            yield began, StudyHistory(storage, other)


def _began(storage: Storage, name: str) -> datetime | None:
    """When the first trial of a study began; None for one that is not there, not ours, or has not begun."""
    if name not in study_names(storage):
        return None
    try:
        return StudyHistory(storage, name).summary().started_at
    except StudyFormatError:
        return None


def _lesson(history: StudyHistory, place: Place, file: StudyFile, problem: Problem) -> Lesson | None:
    """What `history` teaches; None where it is not related, or was made with a file that is valid no more."""
    try:
        other = stored_file(history, place)
    except StudyFileError:
        return None
    devices = load_devices(place.nodes(other.name))
    theirs = make_problem(other, devices)
    relation = _relation(theirs, problem) if set(other.engines) & set(file.engines) else None
    if relation is None:
        return None
    measured = [(t.candidate, t.measurement.metrics.flat()) for t in history.trials() if t.candidate and t.measurement]
    observed = make_predictor(theirs, other).observed(measured[-MOST_TRIALS:], study=other.name)
    return Lesson(study=other.name, relation=relation, observations=tuple(observed))


def _relation(theirs: Problem, ours: Problem) -> str | None:
    if theirs.model.name == ours.model.name:
        return f"model {ours.model.name} too"
    shared = {pool.device.name for pool in theirs.node_pools} & {pool.device.name for pool in ours.node_pools}
    return f"nodes with {', '.join(sorted(shared))} too" if shared else None
