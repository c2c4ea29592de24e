"""Curves and surfaces: exact at measured points, linear between, utilisation held beyond; dense forms agree."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perf_model.curves import Origin, curve, dense, dense_surface, surface, total

X = np.array([1.0, 10.0, 100.0])
Y = np.array([2.0, 3.0, 30.0])


def test_a_curve_is_exact_at_and_linear_between_its_points() -> None:
    c = curve(X, Y, lambda x: x)
    assert c(X).tolist() == Y.tolist()
    assert c(np.array([55.0]))[0] == pytest.approx(16.5)


def test_utilisation_is_held_beyond_the_last_point() -> None:
    c = curve(X, Y, lambda x: x)
    assert c(np.array([800.0]))[0] == pytest.approx(30.0 * 8)


def test_a_sum_is_the_sum_everywhere() -> None:
    a, b = curve(X, Y, lambda x: x), curve(np.array([1.0, 7.0]), np.array([1.0, 5.0]), lambda x: x)
    at = np.array([1.0, 3.0, 7.0, 9.0, 60.0, 500.0])
    assert total([a, b])(at) == pytest.approx(a(at) + b(at))


@given(st.lists(st.floats(1, 40000), min_size=1, max_size=20))
def test_the_dense_form_agrees_at_any_point_where_knots_are_whole(points: list[float]) -> None:
    c = curve(X, Y, lambda x: x)
    at = np.array(points)
    assert dense(c)(at) == pytest.approx(c(at), rel=1e-9)


def grid() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    row, column = (a.ravel().astype(float) for a in np.meshgrid([1, 2, 8], [16, 64, 256], indexing="ij"))
    y = 1e-3 * row * column**2 + 1.0
    keep = row * column < 1000  # the corner is missing
    return row[keep], column[keep], y[keep]


def light(row: np.ndarray, column: np.ndarray) -> np.ndarray:
    return row * column**2


def test_a_surface_is_exact_at_measured_points() -> None:
    row, column, y = grid()
    for power in (1.0, 0.5):
        assert surface((row, column, y), light, power)(row, column) == pytest.approx(y)


def test_a_missing_corner_is_filled_by_held_utilisation() -> None:
    s = surface(grid(), light)
    filled = s(np.array([8.0]), np.array([256.0]))[0]
    candidates = [s(np.array([r]), np.array([c]))[0] * (8 / r) * (256 / c) ** 2 for r, c in ((2.0, 256.0), (8.0, 64.0))]
    assert any(filled == pytest.approx(value) for value in candidates)


def test_square_roots_interpolate_squares_exactly() -> None:
    row = np.array([1.0, 1.0])
    s = surface((row, np.array([10.0, 30.0]), np.array([100.0, 900.0])), light, power=0.5)
    assert s(np.array([1.0]), np.array([20.0]))[0] == pytest.approx(400.0)


@given(st.floats(1, 20), st.floats(16, 5000))
def test_the_dense_surface_agrees(row: float, column: float) -> None:
    s = surface(grid(), light, 0.5)
    r, c = np.array([row]), np.array([column])
    assert dense_surface(s)(r, c) == pytest.approx(s(r, c), rel=1e-9)
    assert dense_surface(s).one(c) == pytest.approx(s(np.ones(1), c), rel=1e-9)


def test_origins_are_told() -> None:
    c = curve(X, Y, lambda x: x)
    assert [c.origin_at(v) for v in (10.0, 11.0, 101.0)] == [Origin.EXACT, Origin.INTERPOLATED, Origin.EXTRAPOLATED]
    s = surface(grid(), light)
    assert s.origin_at(1, 16) is Origin.EXACT
    assert s.origin_at(1, 17) is Origin.INTERPOLATED
    assert s.origin_at(9, 16) is Origin.EXTRAPOLATED
