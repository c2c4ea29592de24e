"""What measurements teach the model: one correction factor per metric and serving mode.

With n measured pairs of a metric in a mode, and r_i = ln(measured_i / predicted_i), the factor is
exp(n / (n + PRIOR_PAIRS) * mean(r)): the mean log ratio, shrunk towards no correction while pairs are few. This is the
posterior mean of a normal mean whose prior is N(0, v) and whose noise variance is PRIOR_PAIRS * v (Gelman et al.,
Bayesian Data Analysis, 3rd edition, section 2.5). The standard deviation of the log is that of the residuals about the
factor, with PRIOR_PAIRS pairs at `PRIOR_LOG_STDDEV` added, so that it is never claimed from one point.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from perf_model.predictor import Predictor
from search_spaces.outcome import Prediction
from search_spaces.serving import Candidate, Mode

PRIOR_PAIRS = 2.0
PRIOR_LOG_STDDEV = 0.5  # a model without any measurement is believed within a factor of e^0.5 = 1.65


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What the uncorrected model said of a candidate in `mode`, and what was measured; metrics by name."""

    mode: Mode
    predicted: Mapping[str, float]
    measured: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Correction:
    """`factor` multiplies a predicted metric; `log_stddev` is the standard deviation of the corrected logarithm."""

    factor: float
    log_stddev: float
    pairs: int


NO_CORRECTION = Correction(factor=1.0, log_stddev=PRIOR_LOG_STDDEV, pairs=0)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Corrections by mode and metric; empty before anything was measured."""

    corrections: Mapping[tuple[Mode, str], Correction] = field(default_factory=dict)

    def correction(self, mode: Mode, metric: str) -> Correction:
        """The correction of `metric` in `mode`; `NO_CORRECTION` where nothing was measured."""
        return self.corrections.get((mode, metric), NO_CORRECTION)

    def apply(self, prediction: Prediction, mode: Mode) -> Prediction:
        """`prediction` with every metric corrected; infeasible predictions stay as they are."""
        if prediction.infeasible is not None:
            return prediction
        corrections = {metric: self.correction(mode, metric) for metric in prediction.metrics}
        return replace(
            prediction,
            metrics={metric: value * corrections[metric].factor for metric, value in prediction.metrics.items()},
            log_stddev={
                metric: corrections[metric].log_stddev
                if corrections[metric].pairs
                else prediction.log_stddev.get(metric, PRIOR_LOG_STDDEV)
                for metric in prediction.metrics
            },
        )


def calibrate(pairs: Iterable[Pair]) -> Calibration:
    """The calibration that `pairs` teach; metrics that are missing or not above 0 on either side teach nothing."""
    ratios: dict[tuple[Mode, str], list[float]] = {}
    for pair in pairs:
        for metric, predicted in pair.predicted.items():
            measured = pair.measured.get(metric, 0.0)
            if predicted > 0 and measured > 0:
                ratios.setdefault((pair.mode, metric), []).append(math.log(measured / predicted))
    return Calibration(corrections={key: _correction(values) for key, values in ratios.items()})


def _correction(log_ratios: Sequence[float]) -> Correction:
    count = len(log_ratios)
    shift = math.fsum(log_ratios) / (count + PRIOR_PAIRS)
    squares = math.fsum((value - shift) ** 2 for value in log_ratios) + PRIOR_PAIRS * PRIOR_LOG_STDDEV**2
    return Correction(factor=math.exp(shift), log_stddev=math.sqrt(squares / (count + PRIOR_PAIRS)), pairs=count)


@dataclass(frozen=True, kw_only=True)
class CalibratedPredictor:
    """A predictor whose answers are corrected by a calibration."""

    model: Predictor
    calibration: Calibration = field(default_factory=Calibration)

    def predict(self, candidates: Sequence[Candidate]) -> list[Prediction]:
        """One corrected prediction for each candidate, in order."""
        raw = self.model.predict(candidates)
        return [self.calibration.apply(p, c.config.mode) for p, c in zip(raw, candidates, strict=True)]

    def learned(self, measured: Sequence[tuple[Candidate, Mapping[str, float]]]) -> CalibratedPredictor:
        """This predictor calibrated anew on every (candidate, measured metrics) given."""
        raw = self.model.predict([candidate for candidate, _ in measured])
        pairs = [
            Pair(mode=candidate.config.mode, predicted=prediction.metrics, measured=metrics)
            for (candidate, metrics), prediction in zip(measured, raw, strict=True)
        ]
        return replace(self, calibration=calibrate(pairs))
