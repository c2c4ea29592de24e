"""Boxes and improvements against moocore, expectations against closed forms, laws of choices and batches."""

from __future__ import annotations

from dataclasses import replace

import moocore
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from search_spaces.errors import InvalidValueError
from studies.acquisition import (
    Beliefs,
    Question,
    Scale,
    choose_batch,
    expected_improvement,
    feasible_probability,
    front_scale,
    hypervolume_improvement,
    nondominated,
    nondominated_boxes,
)

UNIT = Scale(ideal=np.zeros(2), span=np.ones(2))


def curved_front(count: int, dims: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    directions = np.abs(rng.normal(size=(count, dims)))
    return 1 - 0.9 * directions / np.linalg.norm(directions, axis=1, keepdims=True)


def beliefs(mean: np.ndarray, stddev: np.ndarray | float, **changes: np.ndarray) -> Beliefs:
    given_ = {"start": np.ones(len(mean)), "seconds": np.ones(len(mean)), **changes}
    return Beliefs(mean=mean, stddev=np.broadcast_to(stddev, mean.shape).astype(float), **given_)


def question(measured: np.ndarray, scale: Scale = UNIT) -> Question:
    return Question(measured=measured, scale=scale, objectives=lambda samples, _rows: samples)


@settings(deadline=None, max_examples=60)
@given(
    dims=st.integers(2, 4),
    count=st.integers(0, 25),
    seed=st.integers(0, 1000),
    grid=st.sampled_from([0, 4]),
)
def test_improvement_is_moocores_difference(dims: int, count: int, seed: int, grid: int) -> None:
    """Also where coordinates are tied (points on a grid) and where points are dominated."""
    rng = np.random.default_rng(seed)
    front = rng.random((count, dims))
    points = rng.random((10, dims)) * 1.3
    if grid:
        front, points = np.ceil(front * grid) / grid, np.ceil(points * grid) / grid
    reference = np.full(dims, 1.1)
    boxes = nondominated_boxes(front, reference)

    def hypervolume(values: np.ndarray) -> float:
        return float(moocore.hypervolume(values, ref=reference)) if len(values) else 0.0

    expected = [hypervolume(np.vstack([front, point])) - hypervolume(front) for point in points]
    assert hypervolume_improvement(points, boxes) == pytest.approx(expected, abs=1e-12)


def test_boxes_of_three_objectives_stay_few() -> None:
    front = curved_front(80, 3, 0)
    front = front[nondominated(front)]
    assert len(nondominated_boxes(front, np.full(3, 1.1)).upper) <= 2 * len(front) + 1


def test_expectation_in_one_box_is_the_closed_form() -> None:
    """No front: E[max(0, r1 - y1)] * E[max(0, r2 - y2)] for independent normal objectives."""
    mean, stddev = np.array([[0.9, 1.0], [0.5, 1.2]]), np.array([[0.2, 0.3], [0.1, 0.2]])
    z = (1.1 - mean) / stddev
    expected = (stddev * (z * norm.cdf(z) + norm.pdf(z))).prod(1)
    found = expected_improvement(beliefs(mean, stddev), question(np.zeros((0, 2))), np.arange(2), 4096)
    assert found == pytest.approx(expected, rel=0.02)


def test_expectation_is_brute_force_monte_carlo() -> None:
    measured = curved_front(8, 3, 2)
    mean, stddev = np.random.default_rng(3).random((4, 3)) * 0.8, np.full((4, 3), 0.2)
    scale = Scale(ideal=np.zeros(3), span=np.ones(3))
    found = expected_improvement(beliefs(mean, stddev), question(measured, scale), np.arange(4), 4096)
    rng, reference = np.random.default_rng(4), np.full(3, 1.1)
    base = moocore.hypervolume(measured, ref=reference)
    for row in range(4):
        draws = mean[row] + stddev[row] * rng.standard_normal((4000, 3))
        gains = [moocore.hypervolume(np.vstack([measured, d]), ref=reference) - base for d in draws]
        assert found[row] == pytest.approx(np.mean(gains), rel=0.08)


def test_without_doubt_expectation_is_the_improvement() -> None:
    measured = curved_front(6, 2, 1)
    points = np.random.default_rng(0).random((20, 2))
    boxes = nondominated_boxes(measured, UNIT.reference)
    found = expected_improvement(beliefs(points, 0.0), question(measured), np.arange(20), 16)
    assert found == pytest.approx(hypervolume_improvement(points, boxes))


def test_doubt_gives_a_dominated_candidate_a_chance() -> None:
    measured, point = np.array([[0.3, 0.3]]), np.array([[0.4, 0.4]])
    gains = [
        expected_improvement(beliefs(point, s), question(measured), np.array([0]), 512)[0] for s in (0.0, 0.1, 0.3)
    ]
    assert gains[0] == 0
    assert gains[0] < gains[1] < gains[2]


@given(low=st.floats(0.05, 0.9), step=st.floats(0.01, 0.1))
@settings(deadline=None, max_examples=25)
def test_more_likely_feasible_is_worth_more(low: float, step: float) -> None:
    """In the probability of a start, and in the slack to the SLO."""
    mean = np.array([[0.5, 0.5], [0.5, 0.5]])
    started = beliefs(mean, 0.1, start=np.array([low, low + step]))
    gains = expected_improvement(started, question(np.zeros((0, 2))), np.arange(2), 64)
    assert gains[1] > gains[0]

    def asked(limit: float) -> Question:
        return replace(question(np.zeros((0, 2))), violations=lambda samples, _rows: samples[..., 0] > limit)

    tight, loose = asked(low), asked(low + step)
    assert (
        feasible_probability(started, tight, np.arange(2)) <= feasible_probability(started, loose, np.arange(2))
    ).all()
    assert (
        expected_improvement(started, tight, np.arange(2), 64) <= expected_improvement(started, loose, np.arange(2), 64)
    ).all()


def test_seconds_decide_between_equals() -> None:
    mean = np.full((3, 2), 0.5)
    slow_first = beliefs(mean, 0.1, seconds=np.array([100.0, 10.0, 50.0]))
    assert choose_batch(slow_first, question(np.zeros((0, 2))), 1)[0].row == 1


@settings(deadline=None, max_examples=20)
@given(count=st.integers(1, 400), size=st.integers(1, 12), seed=st.integers(0, 100))
def test_a_batch_is_distinct_allowed_and_as_large_as_possible(count: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    mean = rng.random((count, 2))
    allowed = rng.random(count) < 0.7
    rows = [c.row for c in choose_batch(beliefs(mean, 0.05), question(mean[:3]), size, allowed=allowed)]
    assert len(set(rows)) == len(rows) == min(size, allowed.sum())
    assert allowed[rows].all()


def test_a_batch_does_not_ask_the_same_twice() -> None:
    """Two groups of near copies: the second choice comes from the other group, with shared covariance or without."""
    mean = np.array([[0.30, 0.60]] * 5 + [[0.62, 0.32]] * 5)
    stddev = np.full((10, 2), 0.05)
    group = np.repeat([0, 1], 5)

    def shared(row: int, rows: np.ndarray) -> np.ndarray:
        return np.where(group[rows] == group[row], 0.05**2, 0.0)[:, None].repeat(2, axis=1)

    for covariances in (None, shared):
        chosen = choose_batch(beliefs(mean, stddev), question(np.zeros((0, 2))), 2, covariances=covariances)
        assert {group[c.row] for c in chosen} == {0, 1}


def test_large_sets_choose_what_full_scoring_would() -> None:
    rng = np.random.default_rng(5)
    mean = rng.random((3000, 3))
    measured = curved_front(10, 3, 6)
    scale = Scale(ideal=np.zeros(3), span=np.ones(3))
    asked = question(measured, scale)
    chosen = choose_batch(beliefs(mean, 0.05), asked, 1)[0]
    everyone = expected_improvement(beliefs(mean, 0.05), asked, np.arange(3000), 128)
    assert everyone[chosen.row] == pytest.approx(everyone.max())


def test_when_nothing_is_expected_to_gain_doubt_is_widened() -> None:
    measured = np.array([[0.1, 0.1]])
    choice = choose_batch(beliefs(np.array([[0.9, 0.9], [0.5, 0.5]]), 0.01), question(measured), 1)[0]
    assert choice.widened > 1
    hopeful = choose_batch(beliefs(np.array([[0.05, 0.05]]), 0.01), question(measured), 1)[0]
    assert hopeful.widened == 1


def test_scale_of_a_front_and_of_a_single_point() -> None:
    values = np.array([[1.0, 9.0], [3.0, 5.0], [4.0, 8.0]])
    scale = front_scale(values)
    assert scale.apply(values[:2]) == pytest.approx(np.array([[0, 1], [1, 0]]))
    assert scale.reference == pytest.approx([1.1, 1.1])
    assert np.isfinite(front_scale(np.array([[2.0, 0.0]])).apply(values)).all()
    with pytest.raises(InvalidValueError, match="no points"):
        front_scale(np.zeros((0, 2)))


def test_bad_beliefs_are_named() -> None:
    good = beliefs(np.zeros((2, 2)), 0.1)
    with pytest.raises(InvalidValueError, match="0 s"):
        replace(good, seconds=np.array([1.0, 0.0]))
    with pytest.raises(InvalidValueError, match="probabilities"):
        replace(good, start=np.array([1.0, 1.2]))
    with pytest.raises(InvalidValueError, match="size=0"):
        choose_batch(good, question(np.zeros((0, 2))), 0)
