"""What measurements teach the model: a mean and a standard deviation of log(measured / predicted) of every metric.

Every metric of the question has a surrogate of its own (`perf_model.surrogate`); a metric that nobody asks for borrows
the hyperparameters of its nearest relative and learns its own values. `learned` fits once; `predict` then answers for
any number of candidates.

How wrong the model says it is (`Prediction.log_stddev`) counts twice: its usual size over what was measured sets the
centre of the hyperparameters' prior, and a candidate that the model doubts more than usual carries that as `doubt`. The
width of intervals follows the one-step-ahead residuals: with L the Cholesky factor of the covariance of observations in
the order in which they were made, the entries of L^-1 y are each observation's miss by what was known before it, in its
own standard deviations (Rasmussen and Williams, 2006, section 2.2, with the factor read row by row).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import groupby, islice
from operator import attrgetter
from statistics import median

import numpy as np
from scipy.linalg import solve_triangular

from perf_model.features import features_of
from perf_model.numeric import FloatArray, floats
from perf_model.predictor import Predictor
from perf_model.surrogate import (
    Features,
    Hyperparameters,
    HyperPrior,
    Surrogate,
    alike,
    believing,
    believing_alike,
    condition,
    correct_all,
    fit,
    interval_width,
    with_width,
)
from search_spaces.outcome import Prediction
from search_spaces.serving import Candidate

STATED_LOG_STDDEV = 0.5  # a model that does not say how wrong it is, is believed within a factor of e^0.5 = 1.65
EXACT = frozenset({"devices", "price_per_hour", "error_rate"})
"""Metrics that no measurement corrects: the first two are known, the third is predicted as none."""

NOTHING_LOG_RATIO, LARGEST_LOG_RATIO = -3.0, 7.0
"""What a measured 0 counts as where something was predicted (a twentieth); ratios beyond the other bound are cut."""

REMEMBERED = 4_000
"""Raw predictions that are kept, those that were asked for last."""

Measured = tuple[Candidate, Mapping[str, float]]
"""A candidate and its measured metrics by name."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What the raw model said of a candidate, and what was measured; `study` names an earlier study, if it was one.

    `node_types` maps the node pools of that study to device names, and `model` names its model where it was another.
    """

    candidate: Candidate
    prediction: Prediction
    metrics: Mapping[str, float]
    study: str = ""
    node_types: Mapping[str, str] = field(default_factory=dict)
    model: str = ""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Surrogates by metric, all over the same candidates, and how wrong the raw model usually says it is."""

    surrogates: Mapping[str, Surrogate] = field(default_factory=dict)
    usual: Mapping[str, float] = field(default_factory=dict)

    def doubt(self, prediction: Prediction) -> float:
        """How much more wrong than usual the model takes `prediction` to be: the geometric mean over the metrics."""
        return _doubt(prediction, self.usual)


@dataclass(frozen=True, kw_only=True)
class CalibratedPredictor:
    """A predictor whose answers are corrected by measurements.

    `leaders` are the metrics whose hyperparameters are fitted: those of the question. `node_types` maps node pools to
    device names. `earlier` observations, of related studies, are learnt before those of this one.
    """

    model: Predictor
    leaders: tuple[str, ...] = ("output_tokens_per_s", "ttft_p50_ms", "tpot_p50_ms")
    node_types: Mapping[str, str] = field(default_factory=dict)
    calibration: Calibration = field(default_factory=Calibration)
    earlier: tuple[Observation, ...] = ()
    _raw: dict[Candidate, Prediction] = field(default_factory=dict, repr=False, compare=False)

    def predict(self, candidates: Sequence[Candidate]) -> list[Prediction]:
        """One corrected prediction for each candidate, in order; `log_stddev` is that of a new measurement."""
        raw = self.raw(candidates)
        rows = [index for index, prediction in enumerate(raw) if prediction.infeasible is None]
        corrected = self._corrected([candidates[index] for index in rows], [raw[index] for index in rows])
        answers = dict(zip(rows, corrected, strict=True))
        return [answers.get(index, prediction) for index, prediction in enumerate(raw)]

    def raw(self, candidates: Sequence[Candidate]) -> list[Prediction]:
        """What the uncorrected model says; what was asked lately is remembered."""
        missing = list(dict.fromkeys(candidate for candidate in candidates if candidate not in self._raw))
        new = dict(zip(missing, self.model.predict(missing), strict=True)) if missing else {}
        answers = {c: self._raw.pop(c) if c in self._raw else new[c] for c in dict.fromkeys(candidates)}
        self._raw.update(answers)  # at the end: they were asked for last
        for oldest in list(islice(self._raw, max(0, len(self._raw) - REMEMBERED))):
            del self._raw[oldest]
        return [answers[candidate] for candidate in candidates]

    def learned(self, measured: Sequence[Measured]) -> CalibratedPredictor:
        """This predictor calibrated anew on every measurement given, in the order in which they were made."""
        known = [*self.earlier, *self.observed(measured)]
        if not known:
            return replace(self, calibration=Calibration())
        usual = _usual([observation.prediction for observation in known])
        surrogates = _surrogates(
            _features(known, usual), _ratios(known), usual, self.leaders, self.calibration.surrogates
        )
        return replace(self, calibration=Calibration(surrogates=surrogates, usual=usual))

    def observed(self, measured: Sequence[Measured], study: str = "") -> list[Observation]:
        """Observations of `measured`, those left out that the model says cannot run."""
        raw = self.raw([candidate for candidate, _ in measured])
        return [
            Observation(candidate=candidate, prediction=said, metrics=metrics, study=study, node_types=self.node_types)
            for (candidate, metrics), said in zip(measured, raw, strict=True)
            if said.infeasible is None
        ]

    def believing(self, candidates: Sequence[Candidate]) -> CalibratedPredictor:
        """This predictor as if `candidates` had been measured as predicted: it takes less interest in what is alike.

        Nothing is fitted anew (kriging believer, Ginsbourger et al., 2010).
        """
        raw = self.raw(candidates)
        pairs = [(c, p) for c, p in zip(candidates, raw, strict=True) if p.infeasible is None]
        if not pairs or not self.calibration.surrogates:
            return self
        added = self._features([c for c, _ in pairs], [p for _, p in pairs])
        believed = _believing(self.calibration.surrogates, added)
        return replace(self, calibration=replace(self.calibration, surrogates=believed))

    def shared(self, candidates: Sequence[Candidate], metrics: Sequence[str]) -> Callable[[int], FloatArray]:
        """A function of a row: covariance (candidates, metrics) of the logarithms of `metrics` with that candidate's.

        It is that of the true values, without noise; none of what is not corrected. All candidates must be feasible.
        """
        known = [metric for metric in metrics if metric in self.calibration.surrogates]
        surrogates = [self.calibration.surrogates[metric] for metric in known]
        corrections = correct_all(surrogates, self._features(candidates, self.raw(candidates))) if known else ()
        columns = [metrics.index(metric) for metric in known]

        def covariance(row: int) -> FloatArray:
            found = np.zeros((len(candidates), len(metrics)))
            for column, correction in zip(columns, corrections, strict=True):
                found[:, column] = correction.shared(row)
            return found

        return covariance

    def _features(self, candidates: Sequence[Candidate], raw: Sequence[Prediction]) -> Features:
        return features_of(candidates, (self.calibration.doubt(prediction) for prediction in raw), self.node_types)

    def _corrected(self, candidates: Sequence[Candidate], raw: Sequence[Prediction]) -> list[Prediction]:
        surrogates = self.calibration.surrogates
        if not candidates or not surrogates:
            return [_unmeasured(prediction) for prediction in raw]
        metrics = list(surrogates)
        corrections = correct_all([surrogates[metric] for metric in metrics], self._features(candidates, raw))
        factors = np.exp(np.stack([correction.mean for correction in corrections]))
        known = np.stack([correction.stddev for correction in corrections])
        noise = np.array([s.width * s.noise_stddev for s in (surrogates[metric] for metric in metrics)])
        spread = np.sqrt(known**2 + noise[:, None] ** 2)
        noises = dict(zip(metrics, noise.tolist(), strict=True))
        return [
            _apply(
                prediction,
                dict(zip(metrics, column, strict=True)),
                dict(zip(metrics, wide, strict=True)),
                noises,
            )
            for prediction, column, wide in zip(raw, factors.T.tolist(), spread.T.tolist(), strict=True)
        ]


def _unmeasured(prediction: Prediction) -> Prediction:
    """`prediction` with a spread for every metric."""
    stated = {metric: _stated(prediction, metric) for metric in prediction.metrics}
    return replace(prediction, log_stddev=stated)


def _apply(
    prediction: Prediction, factors: Mapping[str, float], spread: Mapping[str, float], noise: Mapping[str, float]
) -> Prediction:
    return replace(
        prediction,
        metrics={metric: value * factors.get(metric, 1.0) for metric, value in prediction.metrics.items()},
        log_stddev={m: spread[m] if m in spread else _stated(prediction, m) for m in prediction.metrics},
        log_noise={metric: noise[metric] for metric in prediction.metrics if metric in noise},
    )


def _stated(prediction: Prediction, metric: str) -> float:
    return 0.0 if metric in EXACT else prediction.log_stddev.get(metric, STATED_LOG_STDDEV) or STATED_LOG_STDDEV


def _usual(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Median over `predictions` of how wrong the raw model says it is, by metric."""
    metrics = dict.fromkeys(metric for p in predictions for metric in p.metrics if metric not in EXACT)
    return {m: median(_stated(p, m) for p in predictions if m in p.metrics) for m in metrics}


def _doubt(prediction: Prediction, usual: Mapping[str, float]) -> float:
    ratios = [math.log(_stated(prediction, m) / usual[m]) for m in prediction.metrics if m in usual]
    return math.exp(math.fsum(ratios) / len(ratios)) if ratios else 1.0


def _features(observations: Sequence[Observation], usual: Mapping[str, float]) -> Features:
    """Features of `observations`, study by study."""
    parts = [
        features_of(
            [o.candidate for o in group],
            [_doubt(o.prediction, usual) for o in group],
            group[0].node_types,
            name,
            group[0].model,
        )
        for name, found in groupby(observations, key=attrgetter("study"))
        for group in (list(found),)
    ]
    return reduce(Features.joined, parts)


def _ratios(observations: Sequence[Observation]) -> dict[str, FloatArray]:
    """log(measured / predicted) (n,) by metric, not a number where an observation tells none."""
    pairs = [(o.prediction.metrics, o.metrics) for o in observations]
    metrics = dict.fromkeys(metric for predicted, _ in pairs for metric in predicted if metric not in EXACT)
    table = {m: floats([_ratio(predicted.get(m), measured.get(m)) for predicted, measured in pairs]) for m in metrics}
    return {metric: column for metric, column in table.items() if not np.isnan(column).all()}


def _ratio(predicted: float | None, measured: float | None) -> float:
    if predicted is None or measured is None or predicted <= 0 or measured < 0 or not math.isfinite(measured):
        return math.nan
    if measured == 0:
        return NOTHING_LOG_RATIO
    return max(-LARGEST_LOG_RATIO, min(LARGEST_LOG_RATIO, math.log(measured / predicted)))


def _surrogates(
    features: Features,
    ratios: Mapping[str, FloatArray],
    usual: Mapping[str, float],
    leaders: Sequence[str],
    before: Mapping[str, Surrogate],
) -> dict[str, Surrogate]:
    """A surrogate for every metric of `ratios`: the leaders fitted, the others with the nearest leader's kernel."""
    fitted: dict[str, Surrogate] = {}
    for metric in (leader for leader in dict.fromkeys(leaders) if leader in ratios):
        start = before[metric].hyper if metric in before else None
        part, target = _told(features, ratios[metric])
        fitted[metric] = _widened(fit(part, target, prior=_prior(usual[metric]), start=start))
    led = dict(fitted)
    for metric, column in ratios.items():
        if metric not in fitted:
            part, target = _told(features, column)
            leader = _relative(metric, led)
            if leader is not None and leader.features is part:
                fitted[metric] = _widened(alike(leader, target))
            else:
                hyper = leader.hyper if leader is not None else _prior(usual[metric]).centre
                fitted[metric] = _widened(condition(part, target, hyper))
    return fitted


def _told(features: Features, column: FloatArray) -> tuple[Features, FloatArray]:
    """The observations that `column` tells; the same `features` where all do, which makes corrections quicker."""
    told = ~np.isnan(column)
    return (features, column) if told.all() else (features.take(told), column[told])


def _prior(stated: float) -> HyperPrior:
    """The prior of a metric that the raw model says is wrong by `stated`, never a narrower one than for any model.

    What a model states of itself was learnt on other machines than this one.
    """
    usual = Hyperparameters()
    total = math.sqrt(usual.bias**2 + usual.level**2 + usual.trend**2)
    factor = max(stated / total, 1.0)
    return HyperPrior(
        centre=replace(usual, bias=usual.bias * factor, level=usual.level * factor, trend=usual.trend * factor)
    )


def _relative(metric: str, fitted: Mapping[str, Surrogate]) -> Surrogate | None:
    """The surrogate of the fitted metric whose name begins most alike; None where nothing was fitted."""
    if not fitted:
        return None
    return fitted[max(fitted, key=lambda other: _common(metric, other))]


def _common(first: str, second: str) -> int:
    """Words that two names have in common at their beginning; those of a rate count as one word."""
    alike = 0
    for left, right in zip(_words(first), _words(second), strict=False):
        if left != right:
            break
        alike += 1
    return alike


def _words(metric: str) -> list[str]:
    words = metric.removesuffix("_ms").split("_")
    is_latency = words[0] in {"ttft", "tpot", "itl", "e2e"}
    return words if is_latency else ["rate", *words]


def _widened(surrogate: Surrogate) -> Surrogate:
    return with_width(surrogate, interval_width(one_step_ahead(surrogate)))


def one_step_ahead(surrogate: Surrogate) -> FloatArray:
    """Each observation's miss (n,) by what was known before it, in standard deviations of width 1."""
    if len(surrogate.log_ratio) == 0:
        return floats([])
    return floats(solve_triangular(surrogate.factor, surrogate.log_ratio, lower=True, check_finite=False))


def _believing(surrogates: Mapping[str, Surrogate], added: Features) -> dict[str, Surrogate]:
    """`surrogates` after observations of `added` at their means; what they shared of each other they go on sharing."""
    corrections = correct_all(list(surrogates.values()), added)
    joined: dict[int, Features] = {}
    leaders: dict[int, Surrogate] = {}
    believed: dict[str, Surrogate] = {}
    for (metric, surrogate), correction in zip(surrogates.items(), corrections, strict=True):
        if id(surrogate.factor) in leaders:
            believed[metric] = believing_alike(leaders[id(surrogate.factor)], correction)
            continue
        if id(surrogate.features) not in joined:
            joined[id(surrogate.features)] = surrogate.features.joined(added)
        believed[metric] = believing(correction, joined[id(surrogate.features)])
        leaders[id(surrogate.factor)] = believed[metric]
    return believed
