"""What a deployment does at the highest request rate that meets every SLO, where a study searches that rate.

The model is asked at `GRID` rates between the ends of the search, a constant factor apart. The first rate that breaks
an SLO and the one before it bound the highest rate; within, the logarithm of each metric is taken for a straight line
over the logarithm of the rate, and the model is asked once more at the first crossing. Nothing is measured here: the
load generator's own search is `cluster.load.rate_search`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from perf_model.predictor import Predictor
from search_spaces.outcome import Prediction
from search_spaces.serving import Candidate
from search_spaces.slos import Slo
from search_spaces.workload import Load, RateSearch

GRID = 10
UNSTATED_LOG_STDDEV = 0.3
LEAST_SLOPE = 0.5
"""A metric that hardly grows with the rate would leave the rate quite open: what is uncertain of it counts at most
twice for the rate."""
RATES = frozenset(
    {
        "output_tokens_per_s",
        "output_tokens_per_s_per_gpu",
        "output_tokens_per_dollar",
        "input_tokens_per_s",
        "requests_per_s",
        "goodput_rps",
        "goodput_rps_per_gpu",
        "goodput_requests_per_dollar",
        "cost_per_million_output_tokens",
    }
)
"""Metrics that follow the rate: what is uncertain of the rate is uncertain of them."""


@dataclass(frozen=True, kw_only=True)
class HighestRatePredictor:
    """`model` at the highest rate of `search` that it predicts to meet `slos`; at the lowest one where none does.

    The load of a candidate says only how requests arrive.
    """

    model: Predictor
    search: RateSearch
    slos: tuple[Slo, ...]

    def predict(self, candidates: Sequence[Candidate]) -> list[Prediction]:
        """One prediction for each candidate, in order."""
        rates = _grid(self.search)
        asked = [_at(candidate, rate) for candidate in candidates for rate in rates]
        told = self.model.predict(asked)
        rows = [told[i : i + len(rates)] for i in range(0, len(told), len(rates))]
        found = [self._highest(rates, row) for row in rows]
        at_rates = self.model.predict([_at(c, rate) for c, (rate, _) in zip(candidates, found, strict=True)])
        return [self._at_limit(p, spread) if spread else p for p, (_, spread) in zip(at_rates, found, strict=True)]

    def _highest(self, rates: Sequence[float], row: Sequence[Prediction]) -> tuple[float, float]:
        """The highest rate, and the standard deviation of its logarithm; (lowest, 0) for what cannot run."""
        if row[0].infeasible is not None:
            return rates[0], 0.0
        broken = next((i for i, prediction in enumerate(row) if self._breaks(prediction)), None)
        if broken is None:
            return rates[-1], 0.0
        if broken == 0:
            return rates[0], 0.0
        before, after = row[broken - 1], row[broken]
        step = math.log(rates[broken] / rates[broken - 1])
        crossings = [_crossing(slo, before, after, step) for slo in self.slos if _is_broken(slo, after)]
        share, spread = min(crossings, default=(0.0, 0.0))
        return rates[broken - 1] * math.exp(share * step), spread

    def _at_limit(self, prediction: Prediction, spread: float) -> Prediction:
        """`prediction` at the highest rate, where every SLO is met, with what is uncertain of that rate.

        Between two rates of the grid the line is not quite the model: a metric that is then above its SLO is at it.
        """
        kept = {slo.metric: slo.threshold for slo in self.slos if _is_broken(slo, prediction)}
        stated = {
            metric: math.hypot(sd, spread) if metric in RATES and sd > 0 else sd
            for metric, sd in prediction.log_stddev.items()
        }
        return replace(prediction, metrics={**prediction.metrics, **kept}, log_stddev=stated)

    def _breaks(self, prediction: Prediction) -> bool:
        return prediction.infeasible is not None or any(_is_broken(slo, prediction) for slo in self.slos)


def _grid(search: RateSearch) -> list[float]:
    factor = (search.highest / search.lowest) ** (1 / (GRID - 1))
    return [search.lowest * factor**index for index in range(GRID)]


def _at(candidate: Candidate, rate: float) -> Candidate:
    return replace(candidate, load=Load(arrival=candidate.load.arrival, value=rate))


def _is_broken(slo: Slo, prediction: Prediction) -> bool:
    """Whether `slo` is predicted to be missed; a metric that is not predicted counts as met."""
    value = prediction.metrics.get(slo.metric)
    return value is not None and slo.violation(value) > 0


def _crossing(slo: Slo, before: Prediction, after: Prediction, step: float) -> tuple[float, float]:
    """Share of the step at which the SLO is met exactly, and the standard deviation of the logarithm of that rate."""
    first, last = before.metrics.get(slo.metric, 0.0), after.metrics[slo.metric]
    spread = before.log_stddev.get(slo.metric, UNSTATED_LOG_STDDEV)
    if first <= 0 or last <= 0 or first == last:
        return 0.0, spread / LEAST_SLOPE
    grown = math.log(last / first)
    share = math.log(slo.threshold / first) / grown
    return min(1.0, max(0.0, share)), spread / max(abs(grown) / step, LEAST_SLOPE)
