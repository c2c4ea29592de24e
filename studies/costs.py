"""What a candidate costs to measure: seconds of all the devices that it reserves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from search_spaces.outcome import Measurement, Prediction
from search_spaces.serving import Candidate, Mode
from studies.records import TrialRecord, TrialStatus

STARTING = ("placement", "start", "stop")
"""Phases that a deployment which is up already does not pay again."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Expected seconds. `start_s` is the median start by mode, `requests` the median requests of a measurement."""

    start_s: Mapping[Mode, float]
    measure_s: float
    requests: float | None

    def device_seconds(self, candidate: Candidate, prediction: Prediction, *, is_warm: bool) -> float:
        """Expected seconds times reserved devices to start (unless warm) and measure `candidate`.

        The measurement scales with the predicted requests/s.
        """
        typical = max(self.start_s.values(), default=0.0)
        start = 0.0 if is_warm else self.start_s.get(candidate.config.mode, typical)
        rate = prediction.metrics.get("requests_per_s", 0.0)
        measure = self.requests / rate if self.requests and rate > 0 else self.measure_s
        return max(start + measure, 1e-9) * candidate.config.devices


def costs_of(trials: Sequence[TrialRecord]) -> Costs:
    """Costs from the timings of finished trials, failed ones too; before the first one every measurement takes 1 s."""
    starts: dict[Mode, list[float]] = {}
    measures: list[float] = []
    requests: list[float] = []
    for trial in trials:
        if trial.outcome is None or trial.candidate is None or trial.status is TrialStatus.LOST:
            continue
        timings = trial.outcome.timings_s
        if "start" in timings:
            up = sum(timings.get(phase, 0.0) for phase in STARTING)
            starts.setdefault(trial.candidate.config.mode, []).append(up)
        if isinstance(trial.outcome, Measurement):
            metrics = trial.outcome.metrics
            measures.append(timings.get("warm_up", 0.0) + timings.get("measure", metrics.duration_s))
            requests.append(measures[-1] * metrics.requests_per_s)
    return Costs(
        start_s={mode: median(values) for mode, values in starts.items()},
        measure_s=median(measures) if measures else 1.0,
        requests=median(requests) if requests else None,
    )
