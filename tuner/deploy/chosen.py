"""Which trial is deployed, and all that its processes follow from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from cluster.engines.base import EngineBackend, PerDeployment
from search_spaces.errors import InvalidValueError
from search_spaces.metrics import METRICS, Direction
from search_spaces.outcome import LaunchedProcess, Measurement
from search_spaces.problem import Problem
from search_spaces.serving import Candidate, ServingConfig
from search_spaces.workload import Load
from studies.noise import Interval
from studies.records import TrialRecord
from tuner.report import StudyReport, metrics_of
from tuner.study_schema import StudyFile
from tuner.wiring import make_backends

BEST = "best"


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A measured trial. `backend` is that of its deployment; `rule` says how the trial was chosen.

    Its figures are means over the runs of its configuration, `intervals` their 95% intervals as far as they are known.
    `local_model` is a copy on this machine of the model that the tool made for the measurement, None where there is
    none.
    """

    study: str
    file: StudyFile
    problem: Problem
    trial: TrialRecord
    candidate: Candidate
    measurement: Measurement
    backend: EngineBackend
    rule: str
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    local_model: str | None = None

    @property
    def config(self) -> ServingConfig:
        """The deployed configuration."""
        return self.candidate.config

    @property
    def load(self) -> Load:
        """The load whose figures these are: where a highest rate was searched, the highest one that met every SLO."""
        met, missed = self.measurement.highest_rate
        rate = met or missed
        return self.candidate.load if rate is None else replace(self.candidate.load, value=rate)

    @property
    def processes(self) -> dict[str, LaunchedProcess]:
        """The measured processes by name."""
        return {process.name: process for process in self.measurement.processes}


def choose(report: StudyReport, file: StudyFile, wanted: str, objective: str | None = None) -> Chosen:
    """The trial that `wanted` names: its number, or `best`.

    `best` is the member of the feasible Pareto front that is best in the first objective, or in `objective`; of equal
    ones the earliest trial. Raises `InvalidValueError` for a trial that was not measured, and for one whose processes
    were not recorded.
    """
    trial, rule = chosen_trial(report, wanted, objective)
    candidate, measurement = trial.candidate, trial.measurement
    if candidate is None or measurement is None:
        raise InvalidValueError(f"trial {trial.number} of {report.name} is {trial.status}; choose a measured one")
    if not measurement.processes:
        raise InvalidValueError(
            f"trial {trial.number} of {report.name} was measured by a version that did not record how its processes "
            "were started; measure it again"
        )
    backend = make_backends(file, report.problem)[candidate.config.engine]
    if isinstance(backend, PerDeployment):
        backend = backend.for_deployment(candidate.config, report.problem)
    return Chosen(
        study=report.name,
        file=file,
        problem=report.problem,
        trial=trial,
        candidate=candidate,
        measurement=measurement,
        backend=backend,
        rule=rule,
        intervals={
            name: interval for name in METRICS if (interval := report.spreads.interval(trial, name)) is not None
        },
    )


def chosen_trial(report: StudyReport, wanted: str, objective: str | None = None) -> tuple[TrialRecord, str]:
    """The trial that `wanted` names as `choose` does, whether it was measured or not, and the rule in words."""
    return _best(report, objective) if wanted == BEST else (_numbered(report, wanted), "chosen by its number")


def _numbered(report: StudyReport, wanted: str) -> TrialRecord:
    if not wanted.isdigit():
        raise InvalidValueError(f"--trial {wanted} is neither a trial's number nor {BEST}")
    for trial in (*report.candidates, *report.trials):
        if trial.number == int(wanted):
            return trial
    raise InvalidValueError(f"study {report.name} has no trial {wanted}; it has 0 to {len(report.trials) - 1}")


def _best(report: StudyReport, objective: str | None) -> tuple[TrialRecord, str]:
    metric = objective or report.objectives[0]
    if metric not in report.objectives:
        raise InvalidValueError(
            f"--objective {metric} is no objective of {report.name}; choose {', '.join(report.objectives)}"
        )
    if not report.front:
        raise InvalidValueError(
            f"no trial of {report.name} meets every SLO, so there is no best one; see: tuner study show {report.name}, "
            "and name a trial by its number"
        )
    sign = 1.0 if METRICS[metric].direction is Direction.MINIMIZE else -1.0
    trial = min(report.front, key=lambda t: (sign * metrics_of(t)[metric], t.number))
    return trial, f"the member of the feasible Pareto front that is best in {metric}"
