"""What measurements teach the model: a Gaussian process over log(measured / predicted) of one metric.

The kernel is additive and pools hierarchically. With m the number of categories (mode, engine, node
type, precision, ...) in which two candidates differ, s = 1 where they are of two studies, else 0, d_s and d_l their
distances over log sizes and over log loads:

    k = bias^2                                              what every candidate shares
      + level^2 * rho^m * kin^s                             a level per category, alike where most categories agree
      + trend^2 * rho^m * kin^s * exp(-d_s^2 / 2 l_s^2 - d_l^2 / 2 l_l^2)   smooth in size and load
      + own^2 * [same configuration]                        what one configuration has to itself, whatever the load
      + noise^2 * [same observation]

each part but the noise times the doubts of both candidates. Without observations the correction is zero and the
standard deviation that of the prior. Hyperparameters maximise the marginal likelihood times a log-normal prior
(Rasmussen and Williams, 2006, sections 2.2 and 5.4), so that a dozen measurements move them little and some hundred
decide. Outliers are told by their leave-one-out residual (ibid., equation 5.12) and count with a larger noise, which
bounds their influence as Huber's estimator does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, fields, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.linalg.blas import dtrsm
from scipy.linalg.lapack import dtrtri
from scipy.optimize import minimize

from perf_model.numeric import FloatArray, IntArray, floats
from search_spaces.errors import require

FITTED_ON_AT_MOST = 160
"""Observations that decide the hyperparameters; more of them cost cubic time and hardly move the optimum."""

OUTLIER, OUTLIER_PASSES = 3.0, 3
"""Leave-one-out residuals beyond this many standard deviations are outliers; passes in which they are told apart."""

_BLOCK = 1 << 16
"""Entries of a kernel that are computed together."""

WIDTH_PRIOR_OBSERVATIONS = 10.0
"""How many residuals of unit size the width of the intervals starts from."""

RECENT, CHANGED = 8, 2.0
"""Residuals that tell a change of the noise, and the ratio of their size to the usual one from which they do."""

MEDIAN_OF_NORMAL = 0.6745
"""The median size of a standard normal number."""


@dataclass(frozen=True, kw_only=True)
class Features:
    """What the surrogate sees of n candidates.

    `categories` (n, c) holds an integer code for each name, `sizes` (n, s) natural logarithms of parallel sizes and
    numeric options, `loads` (n, l) natural logarithms of the load, in total and per device. `configs` (n,) is the same
    for candidates of the same configuration, on the same kind of node, and for no others, `studies` (n,) for those of
    one study. `doubt` (n,) multiplies how wrong the model may be: 1 where it predicts as usual, more where it had to
    guess.
    """

    configs: IntArray
    studies: IntArray
    categories: IntArray
    sizes: FloatArray
    loads: FloatArray
    doubt: FloatArray

    def __post_init__(self) -> None:
        counts = {len(getattr(self, item.name)) for item in fields(self)}
        require(len(counts) == 1, f"features have {sorted(counts)} rows; give one row per candidate in each")
        require(bool(np.isfinite(self.sizes).all()), "a size is not finite; encode an absent one as 0")
        require(bool((self.doubt > 0).all()), "doubt must be above 0; it is 1 where the model predicts as usual")
        require(bool(np.isfinite(self.loads).all()), "a load is not finite; predict every candidate first")

    def __len__(self) -> int:
        """Number of candidates."""
        return len(self.loads)

    def take(self, rows: ArrayLike) -> Features:
        """The candidates in `rows` (indices or a mask)."""
        index = np.asarray(rows)
        return Features(
            configs=self.configs[index],
            studies=self.studies[index],
            categories=self.categories[index],
            sizes=self.sizes[index],
            loads=self.loads[index],
            doubt=self.doubt[index],
        )

    def joined(self, other: Features) -> Features:
        """These candidates, then those of `other`."""
        return Features(
            configs=np.concatenate([self.configs, other.configs]),
            studies=np.concatenate([self.studies, other.studies]),
            categories=np.concatenate([self.categories, other.categories]),
            sizes=np.concatenate([self.sizes, other.sizes]),
            loads=np.concatenate([self.loads, other.loads]),
            doubt=np.concatenate([self.doubt, other.doubt]),
        )


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """Standard deviations of the parts of the kernel (in log units), `rho` and `kin` in (0, 1), two length scales."""

    bias: float = 0.2
    level: float = 0.5
    trend: float = 0.5
    own: float = 0.05
    noise: float = 0.06
    rho: float = 0.85
    kin: float = 0.9
    size_scale: float = 3.0
    load_scale: float = 3.0

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            require(value > 0, f"{item.name}={value} must be above 0")
        require(self.rho < 1, f"rho={self.rho} must be below 1")
        require(self.kin < 1, f"kin={self.kin} must be below 1")

    def to_vector(self) -> FloatArray:
        """Unconstrained coordinates: logarithms, and the logits of rho and kin."""
        values = floats(astuple(self))
        vector = np.log(values)
        vector[_SHARES] -= np.log1p(-values[_SHARES])
        return vector

    @staticmethod
    def from_vector(vector: FloatArray) -> Hyperparameters:
        """The inverse of `to_vector`."""
        values = np.exp(np.clip(vector, -12, 12))
        values[_SHARES] /= 1 + values[_SHARES]
        return Hyperparameters(**dict(zip(_NAMES, values.tolist(), strict=True)))


_NAMES = tuple(item.name for item in fields(Hyperparameters))
_SHARES = [_NAMES.index("rho"), _NAMES.index("kin")]


@dataclass(frozen=True, kw_only=True)
class HyperPrior:
    """Log-normal prior of the hyperparameters: a centre, and the standard deviation of each coordinate around it.

    That of `kin` is wide: how much studies of other users have in common is not known before some of them are.
    """

    centre: Hyperparameters = field(default_factory=Hyperparameters)
    spread: float = 0.3
    kin_spread: float = 1.0

    @property
    def spreads(self) -> FloatArray:
        """The standard deviation of each coordinate."""
        return floats([self.kin_spread if name == "kin" else self.spread for name in _NAMES])


@dataclass(frozen=True, kw_only=True)
class _Distances:
    """Pairwise facts between two sets of candidates, each (a, b), and the doubts of both, (a,) and (b,).

    `mismatches` are small integers of one byte each: they are read more often than anything else. `same` marks pairs of
    the same configuration, `apart` those of two studies; None where there are none.
    """

    same: NDArray[np.bool_]
    apart: NDArray[np.bool_] | None
    mismatches: NDArray[np.uint8]
    size: FloatArray
    load: FloatArray
    doubts: tuple[FloatArray, FloatArray]


def _squared(first: FloatArray, second: FloatArray) -> FloatArray:
    total = (first**2).sum(1)[:, None] + (second**2).sum(1)[None, :] - 2 * first @ second.T
    return floats(np.maximum(total, 0.0))


def _distances(first: Features, second: Features) -> _Distances:
    apart = first.studies[:, None] != second.studies[None, :]
    return _Distances(
        same=first.configs[:, None] == second.configs[None, :],
        apart=apart if apart.any() else None,
        mismatches=_mismatches(first.categories, second.categories),
        size=_squared(first.sizes, second.sizes),
        load=_squared(first.loads, second.loads),
        doubts=(first.doubt, second.doubt),
    )


def _mismatches(first: IntArray, second: IntArray) -> NDArray[np.uint8]:
    """Number of categories (a, b) in which candidates differ."""
    found = np.zeros((len(first), len(second)), dtype=np.uint8)
    if found.size == 0:
        return found
    for column in np.flatnonzero((first != first[0]).any(0) | (second != first[0]).any(0)):
        names = np.unique(np.concatenate([first[:, column], second[:, column]]), return_inverse=True)[1]
        small = names.astype(np.uint8 if names.max() < 256 else np.int64)
        found += small[: len(first), None] != small[None, len(first) :]
    return found


def _parts(gap: _Distances, hyper: Hyperparameters) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Bias, level, trend and own parts of the kernel; the noise is not among them."""
    doubt = np.outer(*gap.doubts)
    alike = doubt * _powers(gap, hyper)[gap.mismatches]
    if gap.apart is not None:
        alike = np.where(gap.apart, hyper.kin * alike, alike)
    near = np.exp((-0.5 / hyper.size_scale**2) * gap.size - (0.5 / hyper.load_scale**2) * gap.load)
    own = hyper.own**2 * doubt * gap.same
    return hyper.bias**2 * doubt, hyper.level**2 * alike, hyper.trend**2 * alike * near, own


def _powers(gap: _Distances, hyper: Hyperparameters) -> FloatArray:
    return floats(hyper.rho ** np.arange(1 + int(gap.mismatches.max(initial=0))))


def _kernel(gap: _Distances, hyper: Hyperparameters) -> FloatArray:
    """The sum of `_parts`, in blocks of rows that stay in a core's cache."""
    rows, columns = gap.size.shape
    kernel = np.empty((rows, columns))
    powers = _powers(gap, hyper)
    step = max(1, _BLOCK // max(1, columns))
    for begin in range(0, rows, step):
        at = slice(begin, begin + step)
        block = np.multiply(gap.size[at], -0.5 / hyper.size_scale**2, out=kernel[at])
        block -= gap.load[at] * (0.5 / hyper.load_scale**2)
        np.exp(block, out=block)
        block *= hyper.trend**2
        block += hyper.level**2
        block *= powers[gap.mismatches[at]]
        if gap.apart is not None:
            np.multiply(block, hyper.kin, out=block, where=gap.apart[at])
        block += hyper.bias**2
        np.add(block, hyper.own**2, out=block, where=gap.same[at])
        block *= gap.doubts[0][at, None]
        block *= gap.doubts[1]
    return kernel


def _prior_variance(features: Features, hyper: Hyperparameters) -> FloatArray:
    return (hyper.bias**2 + hyper.level**2 + hyper.trend**2 + hyper.own**2) * features.doubt**2


@dataclass(frozen=True, kw_only=True)
class Correction:
    """Mean and standard deviation of log(measured / predicted) of n candidates, each (n,).

    `features` are the candidates, `solved` (observations, n) the half-solved covariance with what was observed.
    """

    mean: FloatArray
    stddev: FloatArray
    surrogate: Surrogate
    features: Features
    solved: FloatArray

    def shared(self, row: int) -> FloatArray:
        """Covariance (n,) of every candidate with candidate `row`, given the observations."""
        prior = self.surrogate.covariance(self.features, self.features.take([row]))[:, 0]
        return floats(self.surrogate.width**2 * (prior - self.solved.T @ self.solved[:, row]))


@dataclass(frozen=True, kw_only=True)
class Surrogate:
    """A fitted process; `correct` may be asked any number of times.

    `width` multiplies every standard deviation (see `interval_width`). `factor` (n, n) is the lower Cholesky factor of
    the observations' covariance, `weights` (n,) its inverse times the observations.
    """

    hyper: Hyperparameters
    features: Features
    log_ratio: FloatArray
    noise_variance: FloatArray
    width: float
    factor: FloatArray
    weights: FloatArray

    def correct(self, features: Features) -> Correction:
        """Correction of `features`, without the noise of a new measurement."""
        (correction,) = correct_all([self], features)
        return correction

    def covariance(self, first: Features, second: Features) -> FloatArray:
        """Prior covariance (a, b) between two sets of candidates."""
        return _kernel(_distances(first, second), self.hyper)

    @property
    def noise_stddev(self) -> float:
        """Standard deviation of a measurement around its candidate's true value, in log units."""
        return self.hyper.noise


def correct_all(surrogates: Sequence[Surrogate], features: Features) -> tuple[Correction, ...]:
    """Corrections of `features` by surrogates of several metrics, quicker where they saw the same observations.

    Those that share their factor too (see `alike`) share all but the mean.
    """
    gaps: dict[int, _Distances] = {}
    sharing: dict[int, list[Surrogate]] = {}
    for surrogate in surrogates:
        sharing.setdefault(id(surrogate.factor), []).append(surrogate)
    found: dict[int, Correction] = {}
    for group in sharing.values():
        leader = group[0]
        if id(leader.features) not in gaps:
            gaps[id(leader.features)] = _distances(leader.features, features)
        found |= _corrections(group, features, gaps[id(leader.features)])
    return tuple(found[id(surrogate)] for surrogate in surrogates)


def _corrections(group: Sequence[Surrogate], features: Features, gap: _Distances) -> dict[int, Correction]:
    """Corrections by the surrogates of `group`, which share a factor, by their ids."""
    cross, solved, stddev = _share(group[0], features, gap)
    means = np.stack([surrogate.weights for surrogate in group]) @ cross
    return {
        id(surrogate): Correction(
            mean=mean, stddev=surrogate.width * stddev, surrogate=surrogate, features=features, solved=solved
        )
        for surrogate, mean in zip(group, means, strict=True)
    }


def _share(surrogate: Surrogate, features: Features, gap: _Distances) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Covariance with the observations, the same half-solved, and standard deviations of width 1."""
    prior, cross = _prior_variance(features, surrogate.hyper), _kernel(gap, surrogate.hyper)
    solved = _half_solved(surrogate.factor, cross)
    variance = np.maximum(prior - np.einsum("ij,ij->j", solved, solved), 1e-12)
    return cross, solved, floats(np.sqrt(variance))


def _half_solved(factor: FloatArray, cross: FloatArray) -> FloatArray:
    """L^-1 C of the lower factor L (a, a) and C (a, b), by way of its transpose, which needs no copy in other order."""
    return floats(dtrsm(1.0, factor.T, cross.T, side=1, lower=0).T) if cross.size else cross


def alike(leader: Surrogate, log_ratio: ArrayLike) -> Surrogate:
    """The surrogate of another metric of the observations of `leader`, under its hyperparameters and outliers."""
    target = floats(log_ratio)
    weights = cho_solve((leader.factor, True), target, check_finite=False) if len(target) else target
    return replace(leader, log_ratio=target, weights=weights)


def believing(correction: Correction, features: Features) -> Surrogate:
    """The surrogate of `correction` as if what it corrects had been measured at its mean, by the usual noise.

    `features` are those of the observations, then of what is believed. No mean moves, so that what is believed has no
    weight; the factor grows by a block of rows.
    """
    surrogate, known = correction.surrogate, correction.solved
    before, count = known.shape
    kernel = surrogate.covariance(correction.features, correction.features)
    noise = np.full(count, surrogate.hyper.noise**2)
    rest = kernel - known.T @ known + np.diag(noise + _jitter(kernel))
    factor = np.zeros((before + count, before + count))
    factor[:before, :before] = surrogate.factor
    factor[before:, :before] = known.T
    factor[before:, before:] = np.tril(cho_factor(rest, lower=True, check_finite=False)[0])
    return replace(
        surrogate,
        features=features,
        log_ratio=np.concatenate([surrogate.log_ratio, correction.mean]),
        noise_variance=np.concatenate([surrogate.noise_variance, noise]),
        factor=factor,
        weights=np.concatenate([surrogate.weights, np.zeros(count)]),
    )


def believing_alike(leader: Surrogate, correction: Correction) -> Surrogate:
    """As `believing`, of a surrogate that shares its factor with the one that became `leader`."""
    surrogate = correction.surrogate
    return replace(
        leader,
        log_ratio=np.concatenate([surrogate.log_ratio, correction.mean]),
        weights=np.concatenate([surrogate.weights, np.zeros(len(correction.mean))]),
        width=surrogate.width,
    )


def fit(
    features: Features,
    log_ratio: ArrayLike,
    *,
    prior: HyperPrior | None = None,
    width: float = 1.0,
    start: Hyperparameters | None = None,
) -> Surrogate:
    """The surrogate of observed log(measured / predicted) (n,), n of 0 upwards.

    `start` is where the search for hyperparameters begins (an earlier fit of the same study, say).
    """
    target = floats(log_ratio)
    require(len(target) == len(features), f"{len(target)} ratios for {len(features)} candidates; give one for each")
    require(bool(np.isfinite(target).all()), "a ratio is not finite; leave out what was not measured")
    chosen = prior or HyperPrior()
    hyper = chosen.centre if len(target) == 0 else _most_probable(features, target, chosen, start or chosen.centre)
    return _condition(features, target, hyper, width)


def condition(features: Features, log_ratio: ArrayLike, hyper: Hyperparameters, *, width: float = 1.0) -> Surrogate:
    """The surrogate of the observations under given hyperparameters."""
    return _condition(features, floats(log_ratio), hyper, width)


def _condition(features: Features, target: FloatArray, hyper: Hyperparameters, width: float) -> Surrogate:
    noise = np.full(len(target), hyper.noise**2)
    kernel = _kernel(_distances(features, features), hyper)
    factor, weights = _solve(kernel, noise, target)
    for _ in range(OUTLIER_PASSES if len(target) >= 3 else 0):
        noise = _outlier_noise(factor, weights, noise, hyper.noise**2)
        factor, weights = _solve(kernel, noise, target)
    return Surrogate(
        hyper=hyper,
        features=features,
        log_ratio=target,
        noise_variance=noise,
        width=width,
        factor=factor,
        weights=weights,
    )


def _jitter(kernel: FloatArray) -> float:
    """What is added to the diagonal, so that candidates that are all alike do not make the matrix singular."""
    return 1e-9 + 1e-8 * float(np.diag(kernel).max(initial=0.0))


def _solve(kernel: FloatArray, noise: FloatArray, target: FloatArray) -> tuple[FloatArray, FloatArray]:
    if len(target) == 0:
        return np.zeros((0, 0)), np.zeros(0)
    lower, _ = cho_factor(kernel + np.diag(noise + _jitter(kernel)), lower=True, check_finite=False)
    weights = cho_solve((lower, True), target, check_finite=False)
    return np.tril(lower), weights


def _outlier_noise(factor: FloatArray, weights: FloatArray, noise: FloatArray, usual: float) -> FloatArray:
    """Noise variance of each observation: the usual one, or that at which its residual is OUTLIER deviations."""
    inverse, _ = dtrtri(factor, lower=1)
    precision = (inverse**2).sum(0)
    expected = 1.0 / precision - noise + usual
    squared = (weights / precision) ** 2 / expected
    return floats(usual + expected * np.maximum(squared / OUTLIER**2 - 1.0, 0.0))


def _most_probable(
    features: Features, target: FloatArray, prior: HyperPrior, start: Hyperparameters
) -> Hyperparameters:
    chosen = _spread_out(len(target))
    gap, part = _distances(features.take(chosen), features.take(chosen)), target[chosen]
    centre = prior.centre.to_vector()
    found = minimize(
        _negative_log_posterior,
        start.to_vector(),
        args=(gap, part, centre, prior.spreads),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 30, "ftol": 1e-5},
    )
    return Hyperparameters.from_vector(found.x)


def _spread_out(count: int) -> IntArray:
    """At most FITTED_ON_AT_MOST indices, evenly over `count`."""
    return np.unique(np.linspace(0, count - 1, min(count, FITTED_ON_AT_MOST)).astype(np.int64))


def _negative_log_posterior(
    vector: FloatArray, gap: _Distances, target: FloatArray, centre: FloatArray, spread: FloatArray
) -> tuple[float, FloatArray]:
    """Negative log marginal likelihood plus the prior's penalty, and its gradient."""
    value, gradient = negative_log_likelihood(Hyperparameters.from_vector(vector), gap, target)
    offset = (vector - centre) / spread
    return value + 0.5 * float(offset @ offset), gradient + offset / spread


def negative_log_likelihood(hyper: Hyperparameters, gap: _Distances, target: FloatArray) -> tuple[float, FloatArray]:
    """Negative log marginal likelihood of `target` and its gradient in the coordinates of `Hyperparameters`."""
    bias, level, trend, own = _parts(gap, hyper)
    count = len(target)
    kernel = bias + level + trend + own
    kernel[np.diag_indices(count)] += hyper.noise**2 + _jitter(kernel)
    lower, _ = cho_factor(kernel, lower=True)
    inverse = cho_solve((lower, True), np.eye(count), check_finite=False)
    weights = inverse @ target
    value = 0.5 * float(target @ weights) + float(np.log(np.diag(lower)).sum()) + 0.5 * count * np.log(2 * np.pi)
    outer = np.outer(weights, weights) - inverse
    in_trend = outer * trend
    in_alike = outer * level + in_trend
    gradient = -0.5 * np.array(
        [
            2 * (outer * bias).sum(),
            2 * (outer * level).sum(),
            2 * in_trend.sum(),
            2 * (outer * own).sum(),
            2 * hyper.noise**2 * np.trace(outer),
            (1 - hyper.rho) * (in_alike * gap.mismatches).sum(),
            (1 - hyper.kin) * (in_alike[gap.apart].sum() if gap.apart is not None else 0.0),
            (in_trend * gap.size).sum() / hyper.size_scale**2,
            (in_trend * gap.load).sum() / hyper.load_scale**2,
        ]
    )
    return value, gradient


def learn(studies: Sequence[tuple[Features, FloatArray]], *, start: Hyperparameters | None = None) -> Hyperparameters:
    """The hyperparameters under which the observations of earlier `studies` are most likely, each a process of its own.

    They say how wrong the model usually is and how its errors hang together, without saying anything of a new study.
    """
    pairs = [
        (_distances(part, part), floats(target)[chosen])
        for features, target in studies
        for chosen in (_spread_out(len(features)),)
        for part in (features.take(chosen),)
    ]

    def total(vector: FloatArray) -> tuple[float, FloatArray]:
        hyper = Hyperparameters.from_vector(vector)
        terms = [negative_log_likelihood(hyper, gap, target) for gap, target in pairs]
        return sum(value for value, _ in terms), np.sum([gradient for _, gradient in terms], axis=0)

    bounds = [(-6.0, 3.0)] * len(_NAMES)
    found = minimize(total, (start or Hyperparameters()).to_vector(), jac=True, method="L-BFGS-B", bounds=bounds)
    return Hyperparameters.from_vector(found.x)


def interval_width(residuals: ArrayLike) -> float:
    """Factor on standard deviations that the standardised one-step-ahead residuals (n,), in their order, call for.

    The root of a posterior mean of their square: `WIDTH_PRIOR_OBSERVATIONS` of size 1 and the observed ones, each cut
    at 3 so that an outlier does not widen every interval. Where the noise has changed, the last `RECENT` residuals say
    so: if their robust size (median over that of a normal number) is beyond `CHANGED` times that root, it counts
    instead. Residuals of one size do that once in some two hundred times.
    """
    sizes = np.abs(floats(residuals))
    squared = np.minimum(sizes**2, 9.0)
    usual = float(np.sqrt((WIDTH_PRIOR_OBSERVATIONS + squared.sum()) / (WIDTH_PRIOR_OBSERVATIONS + len(squared))))
    if len(sizes) < RECENT:
        return usual
    recent = float(np.median(sizes[-RECENT:])) / MEDIAN_OF_NORMAL
    return recent if recent > CHANGED * usual else usual


def with_width(surrogate: Surrogate, width: float) -> Surrogate:
    """`surrogate` with another factor on its standard deviations."""
    return replace(surrogate, width=width)
