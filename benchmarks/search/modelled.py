"""The searches that have a model: the model alone, and the model corrected by every measurement (ours)."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from benchmarks.search.tables import Table, to_minimise
from perf_model.surrogate import (
    Features,
    Hyperparameters,
    HyperPrior,
    Surrogate,
    correct_all,
    fit,
    interval_width,
    learn,
)
from studies.acquisition import (
    Beliefs,
    Question,
    choose_batch,
    front_scale,
    hypervolume_improvement,
    nondominated_boxes,
)

TWO_SIDED_90 = 1.6449
GUESS_DOUBT = 3.0
"""How much more wrong a prediction may be that stands in for one which the model refuses."""


@dataclass(frozen=True, kw_only=True)
class Modelled:
    """A table with its prior: `log_mean` (n, k) of its metrics, and what the surrogate sees of every candidate."""

    table: Table
    log_mean: np.ndarray
    features: Features

    @property
    def log_ratio(self) -> np.ndarray:
        """log(measured / predicted) (n, k)."""
        return self.table.log_answers - self.log_mean


def with_prior(table: Table, log_mean: np.ndarray, filled: np.ndarray) -> Modelled:
    """`table` and its prior; `filled` (n,) marks predictions that are not the raw model's own."""
    names = [table.rows[name].to_numpy().astype(str) for name in table.categories] + [filled.astype(str)]
    codes = [[zlib.crc32(value.encode()) for value in column] for column in names]
    sizes = [np.log(table.rows[name].fillna(1).to_numpy(float)) for name in table.sizes] + [np.log(table.gpus)]
    load = np.log(table.concurrency)
    features = Features(
        configs=np.unique(np.column_stack([np.array(codes).T, *sizes]), axis=0, return_inverse=True)[1],
        studies=np.zeros(len(table.rows), dtype=np.int64),
        categories=np.array(codes, dtype=np.int64).T,
        sizes=np.column_stack(sizes),
        loads=np.column_stack([load, load - np.log(table.gpus)]),
        doubt=np.where(filled, GUESS_DOUBT, 1.0),
    )
    return Modelled(table=table, log_mean=log_mean, features=features)


def learn_priors(others: list[Modelled]) -> tuple[HyperPrior, ...]:
    """How wrong the prior usually is, one for each metric, from tables of other models."""
    metrics = others[0].table.metrics if others else ()
    return tuple(
        HyperPrior(centre=learn([(other.features, other.log_ratio[:, k]) for other in others]))
        for k in range(len(metrics))
    )


def model_order(modelled: Modelled) -> Iterator[int]:
    """The model alone: its own front in the order of hypervolume gained, then the front of the rest, and so on."""
    predicted = to_minimise(modelled.table.objectives(modelled.log_mean, np.arange(len(modelled.table))))
    scale = front_scale(predicted)
    points, left = scale.apply(predicted), np.ones(len(predicted), dtype=bool)
    chosen: list[int] = []
    while left.any():
        rows = np.flatnonzero(left)
        gains = hypervolume_improvement(points[rows], nondominated_boxes(points[chosen], scale.reference))
        if gains.max() <= 0 and chosen:
            chosen = []
            continue
        # Beyond the reference point nothing gains: the nearest comes first.
        best = gains.argmax() if gains.max() > 0 else points[rows].max(1).argmin()
        chosen.append(int(rows[best]))
        left[rows[best]] = False
        yield int(rows[best])


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What was said of a measurement before it was made.

    `error` is |measured / forecast - 1|, `covered` whether the 90% interval of a new measurement held it. (k,) each.
    """

    error: np.ndarray
    covered: np.ndarray


def next_rows(table: Table, beliefs: Beliefs, measured: list[int], seed: int, count: int = 1) -> list[int]:
    """The `count` rows of the largest joint gain of hypervolume after `measured`, by the product's acquisition."""
    values, everyone = to_minimise(table.values), np.arange(len(table))
    open_rows = np.ones(len(table), dtype=bool)
    open_rows[measured] = False
    expected = to_minimise(table.objectives(beliefs.mean, everyone))
    question = Question(
        measured=values[measured],
        scale=front_scale(np.concatenate([expected[open_rows], values[measured]])),
        objectives=lambda samples, rows: to_minimise(table.objectives(samples, rows)),
        seed=seed,
    )
    return [choice.row for choice in choose_batch(beliefs, question, count, allowed=open_rows)]


@dataclass(kw_only=True)
class CorrectedSearch:
    """Ours: expected hypervolume improvement under the model, corrected by every measurement.

    `at_once` candidates are chosen jointly, and measured before the next are chosen. `forecasts` fills up while `order`
    runs: one entry for each measurement, in order.
    """

    modelled: Modelled
    priors: tuple[HyperPrior, ...]
    seed: int
    at_once: int = 1
    forecasts: list[Forecast] = field(default_factory=list)

    def order(self) -> Iterator[int]:
        """Candidates in the order in which they are measured."""
        table, n = self.modelled.table, len(self.modelled.table)
        measured: list[int] = []
        residuals: list[list[float]] = [[] for _ in self.priors]
        while len(measured) < n:
            surrogates = self._fit(measured, residuals)
            beliefs = self._beliefs(surrogates)
            rows = next_rows(table, beliefs, measured, self.seed, min(self.at_once, n - len(measured)))
            for row in rows:
                self._note(row, beliefs, surrogates, residuals)
            measured += rows
            yield from rows

    def _fit(self, measured: list[int], residuals: list[list[float]]) -> list[Surrogate]:
        rows = np.array(measured, dtype=int)
        seen = self.modelled.features.take(rows)
        return [
            fit(
                seen,
                self.modelled.log_ratio[rows, k],
                prior=prior,
                width=interval_width(residuals[k]),
            )
            for k, prior in enumerate(self.priors)
        ]

    def _beliefs(self, surrogates: list[Surrogate]) -> Beliefs:
        corrections = correct_all(surrogates, self.modelled.features)
        shift = np.column_stack([correction.mean for correction in corrections])
        n = len(self.modelled.table)
        return Beliefs(
            mean=self.modelled.log_mean + shift,
            stddev=np.column_stack([correction.stddev for correction in corrections]),
            start=np.ones(n),
            seconds=np.ones(n),
        )

    def _note(self, row: int, beliefs: Beliefs, surrogates: list[Surrogate], residuals: list[list[float]]) -> None:
        miss = self.modelled.table.log_answers[row] - beliefs.mean[row]
        width = np.array([surrogate.width for surrogate in surrogates])
        noise = np.array([surrogate.noise_stddev for surrogate in surrogates])
        spread = np.sqrt(beliefs.stddev[row] ** 2 + (width * noise) ** 2)
        covered = np.abs(miss) <= TWO_SIDED_90 * spread
        self.forecasts.append(Forecast(error=np.abs(np.expm1(-miss)), covered=covered))
        for k, residual in enumerate(miss / spread * width):
            residuals[k].append(float(residual))


__all__ = [
    "CorrectedSearch",
    "Forecast",
    "Hyperparameters",
    "Modelled",
    "learn_priors",
    "model_order",
    "next_rows",
    "with_prior",
]
