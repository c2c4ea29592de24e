"""What to measure next: expected hypervolume improvement per second, feasible and start probability included.

Everything here is arrays in, arrays out. All objectives are minimised; callers negate those to maximise. The
expectation is taken by quasi Monte Carlo over joint samples of the metrics (the same normal numbers for each candidate,
so that candidates are compared without sampling noise between them), since objectives are functions of shared metrics
and are not independent: throughput and time per token err together.

A batch is chosen greedily: after each choice the model believes its own mean for it (kriging believer, Ginsbourger et
al., 2010), which puts the choice on the front and takes away the uncertainty of everything alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache

import moocore
import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri
from scipy.stats import qmc

from search_spaces.errors import require

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]

COARSE_SAMPLES, FINE_SAMPLES, FINE_CANDIDATES = 16, 128, 256
"""All candidates are scored on a few samples, the best of them on many."""

REFERENCE_MARGIN = 0.1
"""The reference point lies this share of the front's range beyond its nadir (Ishibuchi et al., 2018)."""

NO_GAIN, WIDEST = 1e-9, 16.0
"""An expected improvement up to this is none; how far standard deviations are widened in search of one."""

_CHUNK = 1 << 17


@dataclass(frozen=True, kw_only=True)
class Boxes:
    """Disjoint boxes (b, m) that fill what lies below the reference point and is not dominated."""

    lower: FloatArray
    upper: FloatArray


def nondominated_boxes(front: FloatArray, reference: FloatArray) -> Boxes:
    """Boxes of the region that no point of `front` (f, m) dominates, bounded above by `reference` (m,).

    Local upper bounds and their defining points are updated point by point (Lacour, Klamroth, Fonseca, 2017): at most
    2f + 1 boxes for three objectives. Boxes may reach down to -inf.
    """
    dims = len(reference)
    upper = reference[None, :].astype(float)
    # defining[u, k] is the point that bounds u in objective k; at first the reference's own faces.
    defining = np.where(np.eye(dims, dtype=bool), reference, -np.inf)[None, :, :]
    for point in front[(front < reference).all(1)]:
        upper, defining = _insert(upper, defining, point)
    lower = np.full_like(upper, -np.inf)
    for axis in range(1, dims):
        lower[:, axis] = defining[:, :axis, axis].max(1)
    filled = (upper > lower).all(1)
    return Boxes(lower=lower[filled], upper=upper[filled])


def _insert(upper: FloatArray, defining: FloatArray, point: FloatArray) -> tuple[FloatArray, FloatArray]:
    hit = (point < upper).all(1)
    if not hit.any():
        return upper, defining
    bounds, points = upper[hit], defining[hit]
    new_upper, new_defining = [upper[~hit]], [defining[~hit]]
    for axis in range(len(point)):
        others = np.delete(points, axis, axis=1)[:, :, axis].max(1)
        valid = point[axis] >= others
        moved, kept = bounds[valid].copy(), points[valid].copy()
        moved[:, axis], kept[:, axis, :] = point[axis], point
        new_upper.append(moved)
        new_defining.append(kept)
    return np.concatenate(new_upper), np.concatenate(new_defining)


def hypervolume_improvement(values: FloatArray, boxes: Boxes) -> FloatArray:
    """What each point of `values` (..., m) alone would add to the hypervolume, shape (...), in the precision given."""
    points = values.reshape(-1, values.shape[-1])
    gains = np.empty(len(points), dtype=points.dtype)
    lower, upper = boxes.lower.astype(points.dtype), boxes.upper.astype(points.dtype)
    step = max(1, _CHUNK // max(1, len(boxes.upper)))
    for begin in range(0, len(points), step):
        part = points[begin : begin + step]
        volume = np.ones((len(part), len(upper)), dtype=points.dtype)
        for axis in range(points.shape[1]):
            edge = upper[:, axis] - np.maximum(lower[:, axis], part[:, axis, None])
            volume *= np.maximum(edge, 0.0, out=edge)
        gains[begin : begin + step] = volume.sum(1)
    return gains.reshape(values.shape[:-1])


@cache
def normal_samples(count: int, dims: int, seed: int) -> FloatArray:
    """`count` standard normal vectors (count, dims) of a scrambled Sobol sequence: the same at every call."""
    uniform = qmc.Sobol(dims, scramble=True, rng=seed).random(count)
    return np.asarray(ndtri(np.clip(uniform, 1e-6, 1 - 1e-6)), dtype=np.float64)


def nondominated(values: FloatArray) -> BoolArray:
    """True for the points (n, m) that no other dominates; of equal points the first."""
    if len(values) == 0:
        return np.zeros(0, dtype=bool)
    return np.asarray(moocore.is_nondominated(values, keep_weakly=False), dtype=bool)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Ideal point and range of a front (m,): `apply` maps it to [0, 1], the reference point to 1 + REFERENCE_MARGIN."""

    ideal: FloatArray
    span: FloatArray

    def apply(self, values: FloatArray) -> FloatArray:
        """`values` (..., m) in units of the front's range."""
        return (values - self.ideal) / self.span

    @property
    def reference(self) -> FloatArray:
        """The reference point in these units."""
        return np.full(len(self.ideal), 1.0 + REFERENCE_MARGIN)


def front_scale(values: FloatArray) -> Scale:
    """The scale of the non-dominated points among `values` (n, m), n at least 1.

    An objective in which the front has no range takes its magnitude instead.
    """
    require(len(values) > 0, "a front of no points has no scale; measure or predict one candidate first")
    front = values[nondominated(values)]
    low, high = front.min(0), front.max(0)
    span = np.where(high - low > 1e-12, high - low, np.maximum(np.abs(low), 1e-12))
    return Scale(ideal=low, span=span)


@dataclass(frozen=True, kw_only=True)
class Beliefs:
    """What is believed of n candidates.

    `mean` and `stddev` (n, k) are of k metrics, in whatever scale `objectives` takes them (logarithms, for this model).
    `start` (n,) is the probability that a candidate starts and holds, `seconds` (n,) the GPU time it takes to measure.
    """

    mean: FloatArray
    stddev: FloatArray
    start: FloatArray
    seconds: FloatArray

    def __post_init__(self) -> None:
        require(self.mean.shape == self.stddev.shape, f"mean {self.mean.shape} and stddev {self.stddev.shape} differ")
        require(bool((self.seconds > 0).all()), "measuring takes more than 0 s; give the seconds of every candidate")
        require(bool(((self.start >= 0) & (self.start <= 1)).all()), "start holds probabilities: 0 to 1")

    def take(self, rows: IntArray) -> Beliefs:
        """The candidates `rows`."""
        return Beliefs(
            mean=self.mean[rows], stddev=self.stddev[rows], start=self.start[rows], seconds=self.seconds[rows]
        )


Objectives = Callable[[FloatArray, IntArray], FloatArray]
"""(samples (s, c, k) of the metrics, indices (c,) of the candidates) -> minimised objectives (s, c, m)."""
Violations = Callable[[FloatArray, IntArray], BoolArray]
"""(samples (s, c, k) of the metrics, indices (c,)) -> True (s, c) where an SLO is broken."""
Covariances = Callable[[int, IntArray], FloatArray]
"""(candidate, indices (c,)) -> covariance (c, k) of each metric of the indices with the candidate's."""


def _no_violation(samples: FloatArray, _rows: IntArray) -> BoolArray:
    return np.zeros(samples.shape[:2], dtype=bool)


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a choice depends on beside the beliefs.

    `measured` (f, m) holds the objectives of feasible measurements. `scale` is in which the hypervolume is counted.
    `seed` fixes the samples.
    """

    measured: FloatArray
    scale: Scale
    objectives: Objectives
    violations: Violations = field(default=_no_violation)
    seed: int = 0


def expected_improvement(beliefs: Beliefs, question: Question, rows: IntArray, count: int) -> FloatArray:
    """Expected improvement of the hypervolume (c,) by candidates `rows`, counted only where every SLO is met."""
    return _expected_improvement(beliefs, question, _boxes(question), rows, count)


def _boxes(question: Question) -> Boxes:
    front = question.scale.apply(question.measured)
    return nondominated_boxes(front[nondominated(front)], question.scale.reference)


def _expected_improvement(
    beliefs: Beliefs, question: Question, boxes: Boxes, rows: IntArray, count: int, *, single: bool = False
) -> FloatArray:
    samples = _samples(beliefs, rows, count, question.seed)
    points = question.scale.apply(question.objectives(samples, rows))
    gains = hypervolume_improvement(points.astype(np.float32) if single else points, boxes)
    met = ~question.violations(samples, rows)
    return np.asarray((gains * met).mean(0) * beliefs.start[rows])


def _samples(beliefs: Beliefs, rows: IntArray, count: int, seed: int) -> FloatArray:
    normal = normal_samples(count, beliefs.mean.shape[1], seed)
    return np.asarray(beliefs.mean[rows] + normal[:, None, :] * beliefs.stddev[rows])


def feasible_probability(beliefs: Beliefs, question: Question, rows: IntArray, count: int = FINE_SAMPLES) -> FloatArray:
    """Probability (c,) that candidates `rows` start, hold and meet every SLO."""
    samples = _samples(beliefs, rows, count, question.seed)
    return np.asarray((~question.violations(samples, rows)).mean(0) * beliefs.start[rows])


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A candidate to measure.

    `improvement` is its expected gain of hypervolume, in units of the front's box. `widened` tells by how much the
    standard deviations had to be multiplied before any candidate was expected to gain anything.
    """

    row: int
    improvement: float
    widened: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The candidates `rows` (c,) that were looked at closely, best expected improvement per second first.

    `gains` (c,) are their expected improvements. `widened` as in `Choice`.
    """

    rows: IntArray
    gains: FloatArray
    widened: float

    @property
    def best(self) -> Choice:
        """The first of them."""
        return Choice(row=int(self.rows[0]), improvement=float(self.gains[0]), widened=self.widened)


def choose_batch(
    beliefs: Beliefs,
    question: Question,
    size: int,
    *,
    allowed: BoolArray | None = None,
    covariances: Covariances | None = None,
) -> tuple[Choice, ...]:
    """At most `size` distinct candidates, best expected improvement per second first.

    `allowed` (n,) leaves out what was measured or is being measured. `covariances` tells what candidates share, so that
    the batch does not ask the same question twice; without it only the front remembers a choice.
    """
    require(size >= 1, f"batch size={size} must be at least 1")
    rows = np.arange(len(beliefs.mean)) if allowed is None else np.flatnonzero(allowed)
    if len(rows) == 0:
        return ()
    return choose_ranked(beliefs, question, rank(beliefs, question, rows), size, rows=rows, covariances=covariances)


def choose_ranked(
    beliefs: Beliefs,
    question: Question,
    ranking: Ranking,
    size: int,
    *,
    rows: IntArray,
    covariances: Covariances | None = None,
) -> tuple[Choice, ...]:
    """`choose_batch` among candidates `rows`, whose `ranking` is known.

    Gains only shrink as the front grows, so that later choices are found among the best of the first ranking.
    """
    choices, shortlist = [ranking.best], ranking.rows
    left = np.zeros(len(beliefs.mean), dtype=bool)
    left[rows] = True
    state, asked = beliefs, question
    while len(choices) < size:
        left[choices[-1].row] = False
        among = shortlist[left[shortlist]]
        if len(among) == 0:
            among = shortlist = np.flatnonzero(left)
        if len(among) == 0:
            break
        state, asked = _believe(state, asked, choices[-1].row, covariances)
        choices.append(rank(state, asked, among).best)
    return tuple(choices)


def rank(beliefs: Beliefs, question: Question, rows: IntArray | None = None) -> Ranking:
    """Rank candidates `rows` (all of them unless given), at least one, by expected improvement per second."""
    asked = np.arange(len(beliefs.mean)) if rows is None else rows
    boxes, widened = _boxes(question), 1.0
    while True:
        wide = replace(beliefs, stddev=beliefs.stddev * widened)
        close = asked
        if len(asked) > FINE_CANDIDATES:
            # Single precision is enough to choose whom to look at closely, in half the time.
            coarse = _expected_improvement(wide, question, boxes, asked, COARSE_SAMPLES, single=True)
            coarse = coarse / wide.seconds[asked]
            close = asked[np.argsort(-coarse, kind="stable")[:FINE_CANDIDATES]]
        gains = _expected_improvement(wide, question, boxes, close, FINE_SAMPLES)
        order = np.argsort(-gains / wide.seconds[close], kind="stable")
        if gains[order[0]] > NO_GAIN or widened >= WIDEST:
            return Ranking(rows=close[order], gains=gains[order], widened=widened)
        widened *= 2


def _believe(
    beliefs: Beliefs, question: Question, row: int, covariances: Covariances | None
) -> tuple[Beliefs, Question]:
    """Beliefs and front as if candidate `row` had been measured at its mean."""
    index = np.array([row])
    expected = question.objectives(beliefs.mean[index][None], index)[0]
    met = ~question.violations(beliefs.mean[index][None], index)[0]
    asked = replace(question, measured=np.concatenate([question.measured, expected[met]]))
    if covariances is None:
        return beliefs, asked
    everyone = np.arange(len(beliefs.mean))
    shared = covariances(row, everyone)
    variance = np.maximum(beliefs.stddev**2 - shared**2 / np.maximum(beliefs.stddev[row] ** 2, 1e-12), 1e-12)
    return replace(beliefs, stddev=np.sqrt(variance)), asked
