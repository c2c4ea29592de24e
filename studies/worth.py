"""What candidates are worth: predictions, failures and costs as the arrays that `studies.acquisition` ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import moocore
import numpy as np
from numpy.typing import NDArray

from search_spaces.errors import InvalidValueError
from search_spaces.metrics import Direction, metric_info
from search_spaces.outcome import Prediction
from search_spaces.problem import Problem
from search_spaces.serving import Candidate
from search_spaces.slos import Slo, hard_slos
from studies.acquisition import (
    NO_GAIN,
    Beliefs,
    BoolArray,
    Covariances,
    FloatArray,
    IntArray,
    Question,
    Ranking,
    choose_ranked,
    feasible_probability,
    front_scale,
    rank,
)
from studies.costs import costs_of
from studies.holding import Suspicions, holding_of
from studies.records import TrialRecord, TrialStatus

UNKNOWN_LOG_STDDEV = 0.3
"""Spread of a model that states none: a factor of 1.35 either way."""

LIKELY, LIKELY_SAMPLES = 0.5, 16
"""Candidates that hold and meet every SLO with this probability set the hypervolume's scale, where there are any."""

_LEAST = 1e-12

Shared = Callable[[Sequence[Candidate], Sequence[str]], Callable[[int], FloatArray]]
"""(candidates (n,), metrics (k,)) -> row -> covariance (n, k) of the logarithm of each metric with that candidate's."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """A candidate that could be measured next; `is_warm` where its deployment is up."""

    candidate: Candidate
    key: str
    prediction: Prediction
    is_warm: bool = False


@dataclass(frozen=True, kw_only=True)
class Worth:
    """Options in the order of their worth.

    `order` (c,) indexes those looked at closely, best first; `rates` (c,) are their expected improvements per second
    and device. `chosen` indexes those to measure: the best, and what goes best with it. `gain` is the largest expected
    improvement among all, relative to the hypervolume that is held or expected of what is being measured; 0 where no
    option is expected to gain anything, None where nothing is held yet.
    """

    order: NDArray[np.int64]
    rates: FloatArray
    gain: float | None
    chosen: tuple[int, ...]


class Appraiser:
    """Ranks options by what a study has measured so far."""

    def __init__(
        self,
        problem: Problem,
        trials: Sequence[TrialRecord],
        seed: int = 0,
        shared: Shared | None = None,
        suspected: Suspicions | None = None,
    ) -> None:
        self._problem = problem
        self._shared = shared
        self._trials = trials
        self._seed = seed
        self._costs = costs_of(trials)
        self._holding = holding_of(trials, suspected)
        self._objectives = tuple(objective.metric for objective in problem.objectives)
        self._metrics = tuple(dict.fromkeys((*self._objectives, *(slo.metric for slo in problem.slos))))
        maximised = [objective.direction is Direction.MAXIMIZE for objective in problem.objectives]
        self._sign = np.where(maximised, -1.0, 1.0)
        self._columns = [self._metrics.index(metric) for metric in self._objectives]

    def holds(self, candidates: Sequence[Candidate]) -> NDArray[np.float64]:
        """Probability (n,) that each candidate starts and holds."""
        return self._holding.probability(candidates)

    def appraise(self, options: Sequence[Option], size: int = 1) -> Worth:
        """Rank `options`, at least one, and choose `size` of them jointly, or as many as there are.

        What is chosen counts as measured at its mean for those chosen after it. Raises `InvalidValueError` where the
        model does not predict an objective.
        """
        beliefs = self._beliefs(options)
        everyone = np.arange(len(options))
        question = self._question(beliefs, everyone)
        ranking = rank(beliefs, question)
        if ranking.gains[0] <= NO_GAIN:
            return self._by_feasibility(beliefs, question, everyone, size)
        chosen = choose_ranked(
            beliefs,
            question,
            ranking,
            size,
            rows=everyone,
            covariances=self._covariances(options) if size > 1 else None,
        )
        return Worth(
            order=ranking.rows,
            rates=ranking.gains / beliefs.seconds[ranking.rows],
            gain=_relative_gain(ranking, question),
            chosen=tuple(choice.row for choice in chosen),
        )

    def _covariances(self, options: Sequence[Option]) -> Covariances | None:
        """What measuring one of `options` would tell of the others; None where the model does not say."""
        if self._shared is None:
            return None
        shared = self._shared([option.candidate for option in options], self._metrics)
        return lambda row, rows: shared(row)[rows]

    def _by_feasibility(self, beliefs: Beliefs, question: Question, rows: IntArray, size: int) -> Worth:
        """Where nothing is expected to gain: the likeliest to meet every SLO first, of equal ones the nearest to it."""
        feasible = feasible_probability(beliefs, question, rows)
        order = np.lexsort((self._missed(beliefs.mean), -feasible / beliefs.seconds))
        return Worth(
            order=order,
            rates=np.zeros(len(order)),
            gain=0.0 if len(question.measured) else None,
            chosen=tuple(order[:size].tolist()),
        )

    def _beliefs(self, options: Sequence[Option]) -> Beliefs:
        predictions = [option.prediction for option in options]
        self._require_objectives(predictions)
        costs = [self._costs.device_seconds(o.candidate, o.prediction, is_warm=o.is_warm) for o in options]
        return Beliefs(
            mean=np.array([self._means(prediction) for prediction in predictions]),
            stddev=np.array([self._spreads(prediction) for prediction in predictions]),
            start=self.holds([option.candidate for option in options]),
            seconds=np.array(costs),
        )

    def _require_objectives(self, predictions: Sequence[Prediction]) -> None:
        for metric in self._objectives:
            if any(metric not in prediction.metrics for prediction in predictions):
                raise InvalidValueError(f"the model does not predict objective {metric}; search without a model")

    def _means(self, prediction: Prediction) -> list[float]:
        """Logarithms; not a number for an SLO's metric that is not predicted, which then counts as met."""
        values = (prediction.metrics.get(metric) for metric in self._metrics)
        return [float("nan") if value is None else float(np.log(max(value, _LEAST))) for value in values]

    def _spreads(self, prediction: Prediction) -> list[float]:
        """Standard deviations of the logarithm without the noise that any measurement has."""
        spread = (prediction.log_stddev.get(metric, UNKNOWN_LOG_STDDEV) for metric in self._metrics)
        noise = (prediction.log_noise.get(metric, 0.0) for metric in self._metrics)
        return [float(np.sqrt(max(s**2 - n**2, 0.0))) for s, n in zip(spread, noise, strict=True)]

    def _question(self, beliefs: Beliefs, rows: IntArray) -> Question:
        held = self._held()
        expected = self._minimised(beliefs.mean[None], rows)[0]
        question = Question(
            measured=held,
            scale=front_scale(np.concatenate([expected, held])),
            objectives=self._minimised,
            violations=self._violated,
            seed=self._seed,
        )
        likely = feasible_probability(beliefs, question, rows, LIKELY_SAMPLES) >= LIKELY
        if not likely.any():
            return question
        return replace(question, scale=front_scale(np.concatenate([expected[likely], held])))

    def _held(self) -> FloatArray:
        """Minimised objectives (f, m) of feasible measurements, and as predicted of what is being measured."""
        values = [trial.values for trial in self._trials if trial.feasible and trial.values is not None]
        known = np.array(values, dtype=np.float64).reshape(len(values), len(self._objectives)) * self._sign
        pending = [
            self._means(trial.prediction)
            for trial in self._trials
            if trial.status is TrialStatus.RUNNING
            and trial.prediction is not None
            and all(metric in trial.prediction.metrics for metric in self._objectives)
        ]
        if not pending:
            return known
        samples, rows = np.array(pending)[None], np.arange(len(pending))
        met = ~self._violated(samples, rows)[0]
        return np.concatenate([known, self._minimised(samples, rows)[0][met]])

    def _minimised(self, samples: FloatArray, _rows: IntArray) -> FloatArray:
        return np.asarray(np.exp(np.minimum(samples[..., self._columns], 700.0)) * self._sign)

    def _missed(self, means: FloatArray) -> FloatArray:
        """By how much each row of `means` (n, k) misses the SLOs, summed over them, in log units (n,)."""
        missed = np.zeros(len(means))
        for slo in hard_slos(self._problem.slos):
            beyond = means[:, self._metrics.index(slo.metric)] - _log_limit(slo)
            lower_is_better = metric_info(slo.metric).direction is Direction.MINIMIZE
            missed += np.maximum(np.nan_to_num(beyond if lower_is_better else -beyond), 0.0)
        return missed

    def _violated(self, samples: FloatArray, _rows: IntArray) -> BoolArray:
        broken = np.zeros(samples.shape[:2], dtype=bool)
        for slo in hard_slos(self._problem.slos):
            values, limit = samples[..., self._metrics.index(slo.metric)], _log_limit(slo)
            lower_is_better = metric_info(slo.metric).direction is Direction.MINIMIZE
            broken |= values > limit if lower_is_better else values < limit
        return broken


def _log_limit(slo: Slo) -> float:
    """Logarithm of the value beyond which `slo`, a hard one, makes a candidate infeasible."""
    limit = slo.limit
    return math.log(limit) if limit is not None and limit > 0 else -math.inf


def _relative_gain(ranking: Ranking, question: Question) -> float | None:
    """Largest expected improvement over the hypervolume held, both in the question's scale."""
    if len(question.measured) == 0:
        return None
    if ranking.widened > 1.0:
        return 0.0
    reference = question.scale.reference
    held = float(moocore.hypervolume(question.scale.apply(question.measured), ref=reference))
    return float(ranking.gains.max()) / max(held, _LEAST)
