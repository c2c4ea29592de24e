"""How wrong predictions were, one step ahead: a stored study replayed through the raw model and its calibration.

    python benchmarks/calibration_replay.py quickstart --data tuner-data

Each measured trial, in order, is predicted with what the trials before it taught; the proposals stay those of the
study. Prints the median relative error of the raw and of the calibrated model, over all trials and over the last half,
and the share of measurements inside the calibrated model's 90% intervals.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from perf_model.calibration import CalibratedPredictor, Measured
from search_spaces.outcome import Prediction
from search_spaces.serving import Candidate
from studies.history import StudyHistory
from studies.storage import open_storage
from tuner.devices import load_devices
from tuner.places import Place
from tuner.report import Z_90
from tuner.stored import stored_file
from tuner.wiring import make_predictor, make_problem


@dataclass(frozen=True, kw_only=True)
class Step:
    """A measured value, what the raw model said of it, and what the calibrated one said before it was measured."""

    measured: float
    raw: float
    predicted: float
    log_stddev: float

    @property
    def covered(self) -> bool:
        """True where the 90% interval held the measured value."""
        return abs(math.log(self.measured / self.predicted)) <= Z_90 * self.log_stddev


def replay(
    predictor: CalibratedPredictor, measured: Sequence[Measured], metrics: Sequence[str]
) -> dict[str, list[Step]]:
    """One step for each first measurement of a candidate, by metric: of a repeat the predictor knows the answer."""
    steps: dict[str, list[Step]] = {metric: [] for metric in metrics}
    seen: set[Candidate] = set()
    for number, (candidate, values) in enumerate(measured):
        if candidate in seen:
            continue
        seen.add(candidate)
        predictor = predictor.learned(measured[:number])
        (raw,), (said,) = predictor.raw([candidate]), predictor.predict([candidate])
        for metric in metrics:
            _note(steps[metric], metric, values.get(metric, 0.0), raw, said)
    return steps


def _note(steps: list[Step], metric: str, value: float, raw: Prediction, said: Prediction) -> None:
    if value > 0 and said.metrics.get(metric, 0.0) > 0:
        steps.append(
            Step(
                measured=value,
                raw=raw.metrics[metric],
                predicted=said.metrics[metric],
                log_stddev=said.log_stddev[metric],
            )
        )


def line(metric: str, steps: Sequence[Step]) -> str:
    """The figures of a metric."""
    late = steps[len(steps) // 2 :]
    raw, calibrated = ([abs(value / s.measured - 1) for s in steps for value in (v(s),)] for v in (_raw, _predicted))
    after = [abs(s.predicted / s.measured - 1) for s in late]
    inside = sum(s.covered for s in steps) / len(steps)
    shares = f"{median(raw):8.1%} {median(calibrated):11.1%} {median(after):10.1%} {inside:7.0%}"
    return f"{metric:34s} {shares} {len(steps):7d}"


def _raw(step: Step) -> float:
    return step.raw


def _predicted(step: Step) -> float:
    return step.predicted


def main() -> int:
    """Replay a study."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("study")
    parser.add_argument("--data", type=Path, default=Path("tuner-data"), help="folder of the storage and its files")
    options = parser.parse_args()
    place = Place(url=f"sqlite:///{options.data}/studies.db", directory=options.data)
    history = StudyHistory(open_storage(place.url), options.study)
    file = stored_file(history, place)
    problem = make_problem(file, history.node_devices or load_devices(place.nodes(file.name)))
    trials = [trial for trial in history.trials() if trial.candidate and trial.measurement]
    measured = [(t.candidate, t.measurement.metrics.flat()) for t in trials if t.candidate and t.measurement]
    metrics = (*(o.metric for o in problem.objectives), *(slo.metric for slo in problem.slos))
    heading = f"{'raw':>8s} {'calibrated':>11s} {'last half':>10s} {'in 90%':>7s} {'trials':>7s}"
    print(f"{'one step ahead, median error':34s} {heading}")
    for metric, steps in replay(make_predictor(problem, file), measured, tuple(dict.fromkeys(metrics))).items():
        print(line(metric, steps))
    return 0


if __name__ == "__main__":
    sys.exit(main())
