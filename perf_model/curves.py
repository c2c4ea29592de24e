"""Interpolation of measured latencies: curves over one quantity, surfaces over two. Arrays in, arrays out.

Inside the measured range values are interpolated linearly; beyond it utilisation is held: time grows as the speed of
light does. Curves over the same quantity add up to one curve, so that a whole step costs one look-up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from perf_model.numeric import FloatArray, IntArray, floats
from search_spaces.errors import require

FAR = 2.0 ** np.arange(1, 9)  # knots beyond the measured range, as multiples of its end


class Origin(StrEnum):
    """Where a time comes from."""

    EXACT = "exact"
    INTERPOLATED = "interpolated"
    EXTRAPOLATED = "extrapolated"
    ROOFLINE = "roofline"


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Milliseconds over one quantity: linear between knots, the measured ones in `low..high`.

    `measured` is False where no table held the shape and the curve is that of neighbours or of the roofline, as
    `origin` says.
    """

    x: FloatArray
    y: FloatArray
    low: float
    high: float
    origin: Origin = Origin.INTERPOLATED

    def __call__(self, at: FloatArray) -> FloatArray:
        """Milliseconds at each element of `at`."""
        return floats(np.interp(at, self.x, self.y))

    def scaled(self, factor: float) -> Curve:
        """This curve times `factor`."""
        return Curve(x=self.x, y=self.y * factor, low=self.low, high=self.high, origin=self.origin)

    def origin_at(self, at: float) -> Origin:
        """Where the time at `at` comes from."""
        if self.origin is not Origin.INTERPOLATED:
            return self.origin
        if not self.low <= at <= self.high:
            return Origin.EXTRAPOLATED
        return Origin.EXACT if at in self.x else Origin.INTERPOLATED


DENSE_TOKENS = 1 << 15
LONGEST = 1 << 18

IntervalArray = np.ndarray[tuple[int, ...], np.dtype[np.int16]]


@dataclass(frozen=True)
class DenseCurve:
    """A curve tabulated at whole numbers below `DENSE_TOKENS`, for look-ups without a search; exact at whole knots."""

    sparse: Curve
    values: FloatArray
    slopes: FloatArray

    def __call__(self, at: FloatArray) -> FloatArray:
        """Milliseconds at each element of `at`."""
        index = at.astype(np.int64)
        np.minimum(index, DENSE_TOKENS - 1, out=index)
        time = self.values[index] + (at - index) * self.slopes[index]
        beyond = at >= DENSE_TOKENS
        if beyond.any():
            time[beyond] = self.sparse(at[beyond])
        return floats(time)


def dense(sparse: Curve) -> DenseCurve:
    """The tabulated form of `sparse`."""
    values = sparse(np.arange(DENSE_TOKENS + 1, dtype=np.float64))
    return DenseCurve(sparse, values[:-1], np.diff(values))


def curve(
    x: FloatArray, y: FloatArray, light: Callable[[FloatArray], FloatArray], origin: Origin = Origin.INTERPOLATED
) -> Curve:
    """A curve through sorted knots that goes on beyond them as the speed of light `light(x)` does."""
    require(len(x) > 0, "a curve needs at least one measured point; the table holds none")
    far = x[-1] * FAR
    beyond = y[-1] * light(far) / light(x[-1:])
    return Curve(
        x=np.concatenate([x, far]), y=np.concatenate([y, beyond]), low=float(x[0]), high=float(x[-1]), origin=origin
    )


def total(curves: Sequence[Curve]) -> Curve:
    """The sum of curves over the same quantity, exact at and between all their knots."""
    if not curves:
        return Curve(x=np.array([0.0, 1.0]), y=np.zeros(2), low=0.0, high=np.inf)
    knots = np.unique(np.concatenate([c.x for c in curves]))
    y = np.sum([_linear_beyond(c, knots) for c in curves], axis=0)
    return Curve(x=knots, y=y, low=max(c.low for c in curves), high=min(c.high for c in curves))


def _linear_beyond(c: Curve, at: FloatArray) -> FloatArray:
    """`c` at knots that may lie beyond its own last one: linear there, as every speed of light is in the end."""
    slope = (c.y[-1] - c.y[-2]) / (c.x[-1] - c.x[-2]) if len(c.x) > 1 else 0.0
    return floats(c(at) + slope * np.maximum(at - c.x[-1], 0.0))


@dataclass(frozen=True, kw_only=True)
class Surface:
    """Milliseconds over rows (sequences) and columns (length): linear in rows; in columns linear in y ** `power`.

    `z` holds y ** `power` at the knots. Beyond the last knots the surface is filled by held utilisation.
    """

    rows: FloatArray
    columns: FloatArray
    z: FloatArray
    power: float
    row_end: float
    column_end: float
    origin: Origin = Origin.INTERPOLATED

    def __call__(self, row: FloatArray, column: FloatArray) -> FloatArray:
        """Milliseconds at each pair of elements."""
        i, u = _locate(self.rows, row)
        j, v = _locate(self.columns, column)
        flat, width = self.z.ravel(), len(self.columns)
        corner = i * width + j
        low = flat[corner] * (1.0 - v) + flat[corner + 1] * v
        high = flat[corner + width] * (1.0 - v) + flat[corner + width + 1] * v
        if self.power != 1.0:
            low, high = low ** (1.0 / self.power), high ** (1.0 / self.power)
        return floats(low + u * (high - low))

    def origin_at(self, row: float, column: float) -> Origin:
        """Where the time at one point comes from."""
        if self.origin is not Origin.INTERPOLATED:
            return self.origin
        if row > self.row_end or column > self.column_end:
            return Origin.EXTRAPOLATED
        exact = row in self.rows and column in self.columns
        return Origin.EXACT if exact else Origin.INTERPOLATED


@dataclass(frozen=True)
class DenseSurface:
    """A surface whose intervals are found by table instead of by search, for whole-number knots."""

    sparse: Surface
    row_interval: IntervalArray
    column_interval: IntervalArray
    row_scale: FloatArray
    column_scale: FloatArray

    def __call__(self, row: FloatArray, column: FloatArray) -> FloatArray:
        """Milliseconds at each pair of elements."""
        j, v = self._column(column)
        i = self.row_interval[np.minimum(row, len(self.row_interval) - 1).astype(np.int64)].astype(np.int64)
        u = np.maximum((row - self.sparse.rows[i]) * self.row_scale[i], 0.0)
        flat, width = self.sparse.z.ravel(), len(self.sparse.columns)
        corner = i * width + j
        low = flat[corner]
        low = low + (flat[corner + 1] - low) * v
        high = flat[corner + width]
        high = high + (flat[corner + width + 1] - high) * v
        if self.sparse.power == 0.5:
            low, high = low * low, high * high
        return floats(low + u * (high - low))

    def one(self, column: FloatArray) -> FloatArray:
        """Milliseconds for one sequence, where the surface has a row for one."""
        if self.sparse.rows[0] != 1.0:
            return self(np.ones_like(column), column)
        j, v = self._column(column)
        first = self.sparse.z[0]
        low = first[j]
        low = low + (first[j + 1] - low) * v
        return floats(low * low if self.sparse.power == 0.5 else low)

    def _column(self, column: FloatArray) -> tuple[IntArray, FloatArray]:
        j = self.column_interval[np.minimum(column, len(self.column_interval) - 1).astype(np.int64)].astype(np.int64)
        return j, np.maximum((column - self.sparse.columns[j]) * self.column_scale[j], 0.0)


def dense_surface(sparse: Surface) -> DenseSurface:
    """The tabulated form of `sparse`; intervals between fractional knots are found to the whole number below."""
    return DenseSurface(
        sparse,
        _intervals(sparse.rows),
        _intervals(sparse.columns),
        1.0 / np.diff(sparse.rows),
        1.0 / np.diff(sparse.columns),
    )


def _intervals(knots: FloatArray) -> IntervalArray:
    """The interval between knots that each whole number lies in, up to the last knot or `LONGEST`."""
    starts = np.minimum(np.ceil(knots), LONGEST).astype(np.int64)
    starts[0] = 0
    lengths = np.diff(starts)
    return np.repeat(np.arange(len(lengths), dtype=np.int16), lengths)


def _locate(knots: FloatArray, at: FloatArray) -> tuple[IntArray, FloatArray]:
    """Index of the interval of each element and the position in it, clipped below, held linear above."""
    index = np.clip(np.searchsorted(knots, at, side="right") - 1, 0, len(knots) - 2)
    left = knots[index]
    return index, np.maximum((at - left) / (knots[index + 1] - left), 0.0)


def surface(
    points: tuple[FloatArray, FloatArray, FloatArray],
    light: Callable[[FloatArray, FloatArray], FloatArray],
    power: float = 1.0,
    origin: Origin = Origin.INTERPOLATED,
) -> Surface:
    """A surface through scattered (row, column, milliseconds) points of a ragged grid.

    Missing cells are filled by held utilisation: the measured time of the nearest cell (in log distance; of the same
    column or row for most) times the ratio of the speeds of light. Knots beyond the last ones are added likewise.
    """
    row, column, y = points
    require(len(row) > 0, "a surface needs at least one measured point; the table holds none")
    rows, columns = np.unique(row), np.unique(column)
    far_rows = np.concatenate([rows, rows[-1] * FAR[:4]])
    far_columns = np.concatenate([columns, columns[-1] * FAR[:4]])
    z = np.full((len(far_rows), len(far_columns)), np.nan)
    i, j = np.searchsorted(far_rows, row), np.searchsorted(far_columns, column)
    z[i[::-1], j[::-1]] = y[::-1]  # the first of equal keys wins
    return Surface(
        rows=far_rows,
        columns=far_columns,
        z=_filled(z, far_rows, far_columns, light) ** power,
        power=power,
        row_end=float(rows[-1]),
        column_end=float(columns[-1]),
        origin=origin,
    )


def _filled(
    z: FloatArray, rows: FloatArray, columns: FloatArray, light: Callable[[FloatArray, FloatArray], FloatArray]
) -> FloatArray:
    known_i, known_j = np.nonzero(~np.isnan(z))
    empty_i, empty_j = np.nonzero(np.isnan(z))
    if not len(empty_i):
        return z
    a, b = np.log2(np.maximum(rows, 0.5)), np.log2(np.maximum(columns, 0.5))
    distance = np.abs(a[empty_i][:, None] - a[known_i]) + np.abs(b[empty_j][:, None] - b[known_j])
    nearest = np.argmin(distance, axis=1)
    util_i, util_j = known_i[nearest], known_j[nearest]
    ratio = light(rows[empty_i], columns[empty_j]) / light(rows[util_i], columns[util_j])
    z[empty_i, empty_j] = z[util_i, util_j] * ratio
    return z
