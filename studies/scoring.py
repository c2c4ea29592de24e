"""How much a candidate is worth measuring: expected hypervolume improvement per second.

    score = E[hypervolume of front + point  -  hypervolume of front] * P(every SLO is met) / expected seconds

The point's objectives are log-normal around the prediction. The expectation is a mean over fixed quasi-random draws,
the same for every candidate, so that scores compare. P takes the SLO metrics as independent log-normals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, median

import numpy as np
from scipy.stats import norm, qmc

from search_spaces.errors import InvalidValueError
from search_spaces.metrics import Direction, metric_info
from search_spaces.outcome import Measurement, Prediction
from search_spaces.problem import Problem, Slo
from search_spaces.serving import Candidate, Mode
from studies.pareto import Points, front, hypervolume, nondominated, points_of, reference_point
from studies.records import TrialRecord

DRAWS = 16
UNKNOWN_LOG_STDDEV = 0.3
"""Spread of a model that states none and has not been compared yet: a factor of 1.35 either way."""
MINIMUM_RESIDUALS = 3
TINY = 1e-12


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Expected seconds. `start_s` is the median start by mode, `requests` the median requests of a measurement."""

    start_s: Mapping[Mode, float]
    measure_s: float
    requests: float | None

    def of(self, candidate: Candidate, prediction: Prediction, *, is_warm: bool) -> float:
        """Seconds to start (unless warm) and measure `candidate`; the measurement scales with predicted requests/s."""
        typical = max(self.start_s.values(), default=0.0)
        start = 0.0 if is_warm else self.start_s.get(candidate.config.mode, typical)
        rate = prediction.metrics.get("requests_per_s", 0.0)
        measure = self.requests / rate if self.requests and rate > 0 else self.measure_s
        return max(start + measure, TINY)


def costs_of(trials: Sequence[TrialRecord]) -> Costs:
    """Costs from the timings of measured trials; before the first one every candidate costs 1 s."""
    starts: dict[Mode, list[float]] = {}
    measures: list[float] = []
    requests: list[float] = []
    for trial in trials:
        outcome = trial.outcome
        if not isinstance(outcome, Measurement) or trial.candidate is None:
            continue
        timings = outcome.timings_s
        measures.append(timings.get("warm_up", 0.0) + timings.get("measure", outcome.metrics.duration_s))
        requests.append(measures[-1] * outcome.metrics.requests_per_s)
        if "start" in timings:
            up = sum(timings.get(phase, 0.0) for phase in ("placement", "start", "stop"))
            starts.setdefault(trial.candidate.config.mode, []).append(up)
    return Costs(
        start_s={mode: median(values) for mode, values in starts.items()},
        measure_s=median(measures) if measures else 1.0,
        requests=median(requests) if requests else None,
    )


def residual_spreads(trials: Sequence[TrialRecord]) -> dict[str, float]:
    """Root mean square of ln(measured / predicted) by metric, where at least `MINIMUM_RESIDUALS` trials tell."""
    squares: dict[str, list[float]] = {}
    for trial in trials:
        if trial.measurement is None or trial.prediction is None:
            continue
        measured = trial.measurement.metrics.flat()
        for metric, predicted in trial.prediction.metrics.items():
            if predicted > 0 and measured.get(metric, 0.0) > 0:
                squares.setdefault(metric, []).append(math.log(measured[metric] / predicted) ** 2)
    return {m: math.sqrt(float(np.mean(v))) for m, v in squares.items() if len(v) >= MINIMUM_RESIDUALS}


@dataclass(frozen=True, kw_only=True)
class Score:
    """Worth of one candidate. `shortfall` is how far its predicted point lies behind the front, 0 on or beyond it."""

    improvement: float
    feasibility: float
    cost_s: float
    shortfall: float

    @property
    def rate(self) -> float:
        """Expected hypervolume improvement per second."""
        return self.improvement * self.feasibility / self.cost_s

    @property
    def rank_key(self) -> tuple[float, float]:
        """Larger is better; candidates without improvement rank by feasibility and nearness to the front."""
        return (self.rate, self.feasibility / (1.0 + self.shortfall))


class Scorer:
    """Scores predictions against what a study has measured."""

    def __init__(self, problem: Problem, trials: Sequence[TrialRecord]) -> None:
        self._problem = problem
        self._objectives = tuple(objective.metric for objective in problem.objectives)
        self._directions = tuple(objective.direction for objective in problem.objectives)
        self._spreads = residual_spreads(trials)
        self._costs = costs_of(trials)
        members = front(trials, self._directions)
        self._front = points_of(members) if members else np.empty((0, len(self._objectives)))

    def spread(self, prediction: Prediction, metric: str) -> float:
        """Log standard deviation: what the model states, else what its errors so far were, else the assumed one."""
        return prediction.log_stddev.get(metric) or self._spreads.get(metric, UNKNOWN_LOG_STDDEV)

    def points(self, predictions: Sequence[Prediction]) -> Points:
        """Predicted objectives, shape (predictions, objectives); raises for an objective the model does not predict."""
        for prediction in predictions:
            for metric in self._objectives:
                if metric not in prediction.metrics:
                    raise InvalidValueError(f"the model does not predict objective {metric}; search without a model")
        rows = [[prediction.metrics[metric] for metric in self._objectives] for prediction in predictions]
        return np.array(rows, dtype=np.float64).reshape(len(rows), len(self._objectives))

    def feasibility(self, prediction: Prediction) -> float:
        """Probability that every SLO is met; an SLO on a metric that is not predicted is left out."""
        return math.prod(
            _meets(slo, prediction.metrics[slo.metric], self.spread(prediction, slo.metric))
            for slo in self._problem.slos
            if slo.metric in prediction.metrics
        )

    def score(
        self, candidates: Sequence[Candidate], predictions: Sequence[Prediction], warm: Sequence[bool]
    ) -> list[Score]:
        """One score for each candidate, in order."""
        points = self.points(predictions)
        reference = self._reference(points)
        spreads = np.array([[self.spread(p, metric) for metric in self._objectives] for p in predictions])
        improvements = self._improvements(points, spreads, reference)
        shortfalls = self._shortfalls(points, reference)
        return [
            Score(
                improvement=float(improvement),
                feasibility=self.feasibility(prediction),
                cost_s=self._costs.of(candidate, prediction, is_warm=is_warm),
                shortfall=float(shortfall),
            )
            for candidate, prediction, is_warm, improvement, shortfall in zip(
                candidates, predictions, warm, improvements, shortfalls, strict=True
            )
        ]

    def _reference(self, points: Points) -> Points:
        """Reference beyond the measured and the predicted front, so that neither end of a trade-off is cut off."""
        union = np.vstack([self._front, nondominated(points, self._directions)])
        return reference_point(union, self._directions)

    def _improvements(self, points: Points, spreads: Points, reference: Points) -> Points:
        """Expected hypervolume improvement of each point, shape (points,)."""
        scale = np.abs(reference) + TINY  # hypervolumes stay of order 1, whatever the units
        front_points, limit = self._front / scale, reference / scale
        base = hypervolume(front_points, limit, self._directions)
        draws = points[None, :, :] * np.exp(_normal_draws(points.shape[1])[:, None, :] * spreads[None, :, :])
        gains = np.zeros(draws.shape[:2])
        for i, j in np.ndindex(*gains.shape):
            joined = np.vstack([front_points, draws[i, j] / scale])
            gains[i, j] = hypervolume(joined, limit, self._directions) - base
        improvement: Points = np.maximum(gains, 0.0).mean(axis=0)
        return improvement

    def _shortfalls(self, points: Points, reference: Points) -> Points:
        """Smallest shift, relative to the span from front to reference, that brings each point to the front."""
        if len(self._front) == 0:
            return np.zeros(len(points))
        sign = np.where([d is Direction.MAXIMIZE for d in self._directions], -1.0, 1.0)
        costs, members = points * sign, self._front * sign
        span = np.maximum(reference * sign - members.min(axis=0), TINY)
        behind = (costs[:, None, :] - members[None, :, :]) / span
        shortfall: Points = np.maximum(behind.min(axis=2), 0.0).max(axis=1)
        return shortfall


def _normal_draws(objectives: int) -> Points:
    """`DRAWS` standard normal points, shape (DRAWS, objectives), always the same ones."""
    unit = qmc.Sobol(objectives, scramble=True, rng=0).random(DRAWS)
    draws: Points = norm.ppf(np.clip(unit, 1e-6, 1 - 1e-6))
    return draws


def _meets(slo: Slo, predicted: float, spread: float) -> float:
    if predicted <= 0:
        return 1.0 if metric_info(slo.metric).direction is Direction.MINIMIZE else 0.0
    distance = math.log(slo.threshold / predicted) / max(spread, TINY)
    below = NormalDist().cdf(distance)
    return below if metric_info(slo.metric).direction is Direction.MINIMIZE else 1.0 - below
