"""What earlier studies in the same storage give to a new one that is related.

They teach it how wrong the model was, and the members of their fronts, at the nearest settings that the new space has,
are its seeds: its screen looks at them whenever it chooses. They are measured where the model, as
corrected by now, says that they are worth it, and never because they were good elsewhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from perf_model.calibration import Observation
from search_spaces.nearest import nearest
from search_spaces.problem import Problem
from search_spaces.rules import infeasibility
from search_spaces.serving import Candidate, ServingConfig
from search_spaces.space import Space
from studies.errors import StudyFormatError
from studies.history import StudyHistory, study_names
from studies.pareto import front
from studies.records import TrialRecord
from studies.storage import Storage
from tuner.devices import load_devices
from tuner.places import Place
from tuner.stored import find_history, stored_file
from tuner.study_errors import StudyFileError
from tuner.study_schema import StudyFile
from tuner.wiring import make_predictor, make_problem

MOST_STUDIES, MOST_TRIALS = 3, 60
"""Related studies that a new one learns from, the latest of them, and measured trials of each, the latest ones."""


NEAREST = 3
"""Nearness of a study that shares the model and a kind of node."""

MOST_SEEDS = 8
"""Seeds from fronts of earlier studies."""


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What one earlier study gives, and what it has in common with the new one.

    `front` are the members of its front, best first in its first objective, and `node_types` the devices of its pools.
    `ended` are its trials, in terms of the new study's node pools, where model and kind of node are the same: what
    failed there may fail here.
    """

    study: str
    relation: str
    observations: tuple[Observation, ...]
    front: tuple[Candidate, ...] = ()
    ended: tuple[TrialRecord, ...] = ()
    node_types: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.study} ({len(self.observations)} measurements, {self.relation})"


def lessons(storage: Storage, place: Place, file: StudyFile, problem: Problem) -> tuple[Lesson, ...]:
    """What related studies teach that of `file`: an engine in common, and the model or a kind of node.

    The nearest come first: those that share both, then those that share the model; of equal ones the latest. Studies
    that began after it are left out, so that a resume learns what the first run did.
    """
    names, stored = study_names(storage), find_history(storage, file.name)
    own = stored.started_at if stored else None
    related = [
        found
        for other in names
        if other != file.name and (found := _related(storage, other, place, file, problem, own)) is not None
    ]
    related.sort(key=lambda found: (found.nearness, found.began), reverse=True)
    taught = (_lesson(found, problem) for found in related)
    return tuple(itertools.islice((lesson for lesson in taught if lesson.observations), MOST_STUDIES))


@dataclass(frozen=True, kw_only=True)
class _Related:
    """An earlier study, and what it has in common with the new one."""

    history: StudyHistory
    file: StudyFile
    problem: Problem
    relation: str
    nearness: int
    began: datetime


def _related(
    storage: Storage, name: str, place: Place, file: StudyFile, problem: Problem, own: datetime | None
) -> _Related | None:
    """Study `name`; None for one that is not ours, is not related, or did not begin before.

    Nor does one count that was made with a file that is valid no more.
    """
    try:
        history = StudyHistory(storage, name)
        began = history.started_at
        if began is None or (own is not None and began >= own):
            return None
        other = stored_file(history, place)
    except (StudyFormatError, StudyFileError):
        return None
    theirs = make_problem(other, history.node_devices or load_devices(place.nodes(other.name)))
    relation = _relation(theirs, problem) if set(other.engines) & set(file.engines) else None
    if relation is None:
        return None
    nearness = 2 * (theirs.model.name == problem.model.name) + bool(_shared(theirs, problem))
    return _Related(history=history, file=other, problem=theirs, relation=relation, nearness=nearness, began=began)


def _lesson(found: _Related, problem: Problem) -> Lesson:
    """What a related study teaches."""
    trials = found.history.trials()
    measured = [(t.candidate, t.measurement.metrics.flat()) for t in trials if t.candidate and t.measurement]
    observed = make_predictor(found.problem, found.file).observed(measured[-MOST_TRIALS:], study=found.file.name)
    types = {pool.name: pool.device.name for pool in found.problem.node_pools}
    model = "" if found.problem.model.name == problem.model.name else found.problem.model.name
    return Lesson(
        study=found.file.name,
        relation=found.relation,
        observations=tuple(replace(one, model=model) for one in observed),
        front=tuple(trial.candidate for trial in front(trials, found.history.directions) if trial.candidate),
        ended=_in_terms_of(problem, trials, types) if found.nearness == NEAREST else (),
        node_types=types,
    )


def _in_terms_of(problem: Problem, trials: Sequence[TrialRecord], types: Mapping[str, str]) -> tuple[TrialRecord, ...]:
    """Those of `trials` whose pools have their like in `problem`, as if they had been made there."""
    names = _pools(types, problem)
    return tuple(
        replace(trial, candidate=replace(trial.candidate, config=_moved(trial.candidate.config, names)))
        for trial in trials
        if trial.candidate and trial.is_finished and all(p.node_pool in names for p in trial.candidate.config.pools)
    )


def _moved(config: ServingConfig, names: Mapping[str, str]) -> ServingConfig:
    return replace(config, pools=tuple(replace(pool, node_pool=names[pool.node_pool]) for pool in config.pools))


def seeds(found: Sequence[Lesson], space: Space) -> dict[str, tuple[Candidate, ...]]:
    """Candidates of `space` from the fronts of `found` studies, by study, those of the first one first.

    Each is the nearest that the space has and can run; none comes twice, and no default. Of a front with too many
    members those are taken that lie evenly along it.
    """
    known = {space.default(mode, engine).key for mode in space.modes for engine in space.engines}
    chosen: dict[str, tuple[Candidate, ...]] = {}
    for lesson in found:
        mapped = [nearest(space, candidate, _pools(lesson.node_types, space.problem)) for candidate in lesson.front]
        fitting = {c.key: c for c in mapped if c is not None and infeasibility(c, space.problem) is None}
        fresh = [candidate for key, candidate in fitting.items() if key not in known]
        taken = _evenly(fresh, MOST_SEEDS - sum(map(len, chosen.values())))
        known |= {candidate.key for candidate in taken}
        chosen |= {lesson.study: taken} if taken else {}
    return chosen


def _pools(types: Mapping[str, str], problem: Problem) -> dict[str, str]:
    """Node pools of the problem by those of an earlier study: of the same name, else with the same devices."""
    ours = {pool.device.name: pool.name for pool in reversed(problem.node_pools)}
    names = {pool.name for pool in problem.node_pools}
    return {
        name: name if name in names else ours[device]
        for name, device in types.items()
        if name in names or device in ours
    }


def _evenly(candidates: Sequence[Candidate], count: int) -> tuple[Candidate, ...]:
    """`count` of `candidates` at equal distances, the first and the last among them."""
    if len(candidates) <= count:
        return tuple(candidates)
    if count <= 1:
        return tuple(candidates[: max(0, count)])
    return tuple(candidates[round(i * (len(candidates) - 1) / (count - 1))] for i in range(count))


def _relation(theirs: Problem, ours: Problem) -> str | None:
    if theirs.model.name == ours.model.name:
        return f"model {ours.model.name} too"
    shared = _shared(theirs, ours)
    return f"nodes with {', '.join(sorted(shared))} too" if shared else None


def _shared(theirs: Problem, ours: Problem) -> set[str]:
    """Kinds of devices that both have."""
    return {pool.device.name for pool in theirs.node_pools} & {pool.device.name for pool in ours.node_pools}
