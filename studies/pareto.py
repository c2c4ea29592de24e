"""Pareto front and hypervolume of measured trials, computed by moocore.

Points are rows of objective values in the study's order; `directions` says for each column which way is better. A
candidate that was measured several times has one point: the mean of its runs (see `studies.repeats`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import moocore
import numpy as np
from numpy.typing import NDArray

from search_spaces.errors import require
from search_spaces.metrics import Direction
from studies.records import TrialRecord, TrialStatus
from studies.repeats import candidates_of

Points = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class HypervolumePoint:
    """Hypervolume of the front after trial `number` was told; `finished` counts the trials told by then."""

    number: int
    finished: int
    hypervolume: float


def points_of(trials: Sequence[TrialRecord]) -> Points:
    """Objective values of measured `trials`, shape (trials, objectives); raises for a trial without values."""
    rows = [trial.values for trial in trials]
    require(all(row is not None for row in rows), "a trial without objective values has no point; filter by status")
    return np.array(rows, dtype=np.float64)


def front(trials: Sequence[TrialRecord], directions: Sequence[Direction]) -> tuple[TrialRecord, ...]:
    """The feasible measured candidates that no other dominates, best first in the first objective.

    Each is the record of its first run with the means of all (`studies.repeats.Runs.record`). Those with equal
    objective values are ties: all of them are kept.
    """
    feasible = [trial for trial in candidates_of(trials) if trial.feasible]
    if not feasible:
        return ()
    points = points_of(feasible)
    keep = moocore.is_nondominated(points, maximise=_maximise(directions), keep_weakly=True)
    members = [trial for trial, kept in zip(feasible, keep, strict=True) if kept]
    sign = -1.0 if directions[0] is Direction.MAXIMIZE else 1.0
    return tuple(sorted(members, key=lambda trial: (sign * _values(trial)[0], trial.number)))


def reference_point(points: Points, directions: Sequence[Direction]) -> Points:
    """The worst value of each objective, moved outwards by 10% of its range (of its size where all are equal).

    It depends on the points alone. Every curve of one study is drawn against the reference of all its measured trials,
    so that a curve never falls; figures of two studies compare only against a common reference.
    """
    require(len(points) > 0, "no trial has been measured yet, so there is no reference point; measure one first")
    sign = np.where(_maximise(directions), -1.0, 1.0)
    costs = points * sign
    worst, spread = costs.max(axis=0), np.ptp(costs, axis=0)
    scale = np.where(spread > 0, spread, np.where(worst != 0, np.abs(worst), 1.0))
    reference: Points = (worst + 0.1 * scale) * sign
    return reference


def worst_values(points: Sequence[Sequence[float]] | Points, directions: Sequence[Direction]) -> Points:
    """The worst value of each objective over `points`."""
    sign = np.where(_maximise(directions), -1.0, 1.0)
    worst: Points = (np.array(points, dtype=np.float64) * sign).max(axis=0) * sign
    return worst


def hypervolume(points: Points, reference: Points, directions: Sequence[Direction]) -> float:
    """Volume that `points` dominate up to `reference`; 0 for no points."""
    if len(points) == 0:
        return 0.0
    return float(moocore.hypervolume(points, ref=reference, maximise=_maximise(directions)))


def study_reference(trials: Sequence[TrialRecord], directions: Sequence[Direction]) -> Points | None:
    """The reference point of a study's curves, from all measured trials, infeasible ones too; None before the first."""
    measured = [trial for trial in trials if trial.status is TrialStatus.MEASURED]
    return reference_point(points_of(measured), directions) if measured else None


def hypervolume_history(
    trials: Sequence[TrialRecord],
    directions: Sequence[Direction],
    reference: Points | None = None,
    last: int | None = None,
) -> tuple[HypervolumePoint, ...]:
    """Hypervolume of the front after each finished trial, or each of the `last` ones, in the order of their ends.

    The front is kept up step by step, so that n trials cost n small fronts; a repeat moves a mean, so that the front is
    taken anew then. Only a repeat can make the hypervolume fall.
    """
    against = reference if reference is not None else study_reference(trials, directions)
    if against is None:
        return ()
    history: list[HypervolumePoint] = []
    finished = sorted((trial for trial in trials if trial.is_finished), key=_end_order)
    before = 0 if last is None else max(0, len(finished) - last)
    best = _front_points(finished[:before], directions)
    value = hypervolume(best, against, directions)
    for count, trial in enumerate(finished[before:], start=before + 1):
        if trial.is_repeat:
            best = _front_points(finished[:count], directions)
            value = hypervolume(best, against, directions)
        elif trial.feasible:
            best = nondominated(np.vstack([best, points_of([trial])]), directions)
            value = hypervolume(best, against, directions)
        history.append(HypervolumePoint(number=trial.number, finished=count, hypervolume=value))
    return tuple(history)


def _front_points(trials: Sequence[TrialRecord], directions: Sequence[Direction]) -> Points:
    feasible = [trial for trial in candidates_of(sorted(trials, key=lambda trial: trial.number)) if trial.feasible]
    return nondominated(points_of(feasible), directions) if feasible else np.empty((0, len(directions)))


def nondominated(points: Points, directions: Sequence[Direction]) -> Points:
    """The rows of `points` that no other dominates; of equal rows the first."""
    kept: Points = points[moocore.is_nondominated(points, maximise=_maximise(directions))]
    return kept


def _end_order(trial: TrialRecord) -> tuple[float, int]:
    return (trial.ended_at.timestamp() if trial.ended_at else 0.0, trial.number)


def _values(trial: TrialRecord) -> tuple[float, ...]:
    return trial.values or ()


def _maximise(directions: Sequence[Direction]) -> list[bool]:
    return [direction is Direction.MAXIMIZE for direction in directions]
