"""Laws of fronts and hypervolumes."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search_spaces.errors import InvalidValueError
from search_spaces.metrics import Direction
from studies.pareto import front, hypervolume, hypervolume_history, points_of, reference_point, study_reference
from studies.records import TrialRecord, TrialStatus

UP, DOWN = Direction.MAXIMIZE, Direction.MINIMIZE
START = datetime(2026, 1, 1, tzinfo=UTC)


def trial(number: int, values: tuple[float, ...] | None, violation: float = 0.0) -> TrialRecord:
    """A measured trial, or a failed one where `values` is None."""
    return TrialRecord(
        number=number,
        status=TrialStatus.FAILED if values is None else TrialStatus.MEASURED,
        candidate=None,
        key=str(number),
        origin=None,
        prediction=None,
        outcome=None,
        values=values,
        violations={"slo": violation},
        ended_at=START + timedelta(seconds=number),
    )


coordinate = st.integers(0, 6).map(float)
directions = st.lists(st.sampled_from([UP, DOWN]), min_size=2, max_size=4)


@st.composite
def studies(draw: st.DrawFn) -> tuple[list[TrialRecord], list[Direction]]:
    axes = draw(directions)
    rows = draw(st.lists(st.tuples(*[coordinate] * len(axes)) | st.none(), max_size=12))
    violations = draw(st.lists(st.sampled_from([-0.5, 0.0, 0.7]), min_size=len(rows), max_size=len(rows)))
    return [trial(i, row, v) for i, (row, v) in enumerate(zip(rows, violations, strict=True))], axes


def dominates(one: TrialRecord, other: TrialRecord, axes: list[Direction]) -> bool:
    gains = [
        (a - b) * (1 if d is UP else -1) for a, b, d in zip(one.values or (), other.values or (), axes, strict=True)
    ]
    return all(gain >= 0 for gain in gains) and any(gain > 0 for gain in gains)


@given(studies())
def test_the_front_is_every_feasible_trial_that_none_dominates(
    study: tuple[list[TrialRecord], list[Direction]],
) -> None:
    trials, axes = study
    members = front(trials, axes)
    feasible = [t for t in trials if t.values is not None and t.violations["slo"] <= 0]
    expected = {t.number for t in feasible if not any(dominates(other, t, axes) for other in feasible)}
    assert {t.number for t in members} == expected
    firsts = [t.values[0] for t in members if t.values]
    assert firsts == sorted(firsts, reverse=axes[0] is UP)


@given(studies())
def test_hypervolume_never_falls_and_ends_at_that_of_the_front(
    study: tuple[list[TrialRecord], list[Direction]],
) -> None:
    trials, axes = study
    history = hypervolume_history(trials, axes)
    values = [point.hypervolume for point in history]
    assert all(later >= earlier - 1e-9 for earlier, later in pairwise(values))
    reference = study_reference(trials, axes)
    if reference is not None:
        assert [point.finished for point in history] == list(range(1, len(trials) + 1))
        members = front(trials, axes)
        expected = hypervolume(points_of(members), reference, axes) if members else 0.0
        assert values[-1] == pytest.approx(expected)


@given(studies())
def test_every_measured_point_is_strictly_better_than_the_reference(
    study: tuple[list[TrialRecord], list[Direction]],
) -> None:
    trials, axes = study
    reference = study_reference(trials, axes)
    for measured in (t for t in trials if t.values is not None):
        assert reference is not None
        gains = [
            (v - r) * (1 if d is UP else -1) for v, r, d in zip(measured.values or (), reference, axes, strict=True)
        ]
        assert all(gain > 0 for gain in gains)


def test_hypervolume_of_a_known_front() -> None:
    points = np.array([[3.0, 1.0], [1.0, 0.5]])
    # against (0, 2) with the first objective up: 3 x 1 of the first point, and 1 x 0.5 more of the second
    assert hypervolume(points, np.array([0.0, 2.0]), [UP, DOWN]) == pytest.approx(3.5)


def test_reference_point_is_the_worst_moved_by_a_tenth_of_the_range() -> None:
    points = np.array([[10.0, 4.0], [20.0, 4.0]])
    np.testing.assert_allclose(reference_point(points, [UP, DOWN]), [9.0, 4.4])
    with pytest.raises(InvalidValueError, match="no trial has been measured"):
        reference_point(np.empty((0, 2)), [UP, DOWN])


def test_equal_trials_are_ties_and_both_are_on_the_front() -> None:
    one = trial(0, (1.0, 1.0))
    tie, behind = replace(one, number=1), trial(2, (1.0, 2.0))
    assert [t.number for t in front([behind, tie, one], [UP, DOWN])] == [0, 1]
