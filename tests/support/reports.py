"""A report of trials on the toy surface: feasible ones, ones that miss the SLO, and a failed one."""

from __future__ import annotations

from datetime import datetime

from search_spaces.outcome import Failure, FailureReason, Prediction
from search_spaces.problem import Problem, Slo
from search_spaces.serving import Candidate, Mode
from search_spaces.space import Space
from studies.constraints import measured_violations
from studies.records import Origin, TrialRecord, TrialStatus
from tests.studies.toy import measure, toy_problem, wide_space
from tuner import report

SLOS = (Slo(metric="ttft_p99_ms", threshold=120),)


def trial(index: int, candidate: Candidate, problem: Problem) -> TrialRecord:
    measurement = measure(candidate)
    metrics = measurement.metrics.flat()
    return TrialRecord(
        number=index,
        status=TrialStatus.MEASURED,
        candidate=candidate,
        key=candidate.key,
        origin=Origin.SCREENED,
        prediction=Prediction(metrics={name: value * 1.5 for name, value in metrics.items()}),
        outcome=measurement,
        values=tuple(metrics[objective.metric] for objective in problem.objectives),
        violations=measured_violations(problem.slos, metrics),
        started_at=datetime(2026, 1, 1),  # noqa: DTZ001 - Optuna's times have no zone
        ended_at=datetime(2026, 1, 1, 0, index),  # noqa: DTZ001 - likewise
    )


def failed(index: int, candidate: Candidate) -> TrialRecord:
    failure = Failure(
        reason=FailureReason.OUT_OF_MEMORY_AT_BOOT,
        detail="exit code 12",
        log_tail="one\ntwo\nthree\nfailed to allocate",
    )
    return TrialRecord(
        number=index,
        status=TrialStatus.FAILED,
        candidate=candidate,
        key=candidate.key,
        origin=Origin.SEED,
        prediction=None,
        outcome=failure,
        values=None,
    )


def some_candidates(space: Space) -> list[Candidate]:
    defaults = [space.default(mode) for mode in Mode]
    return list(dict.fromkeys(c for candidate in defaults for c in (candidate, *space.neighbours(candidate))))


def a_report() -> report.StudyReport:
    problem = toy_problem(SLOS)
    candidates = some_candidates(wide_space(problem))
    trials = [trial(index, candidate, problem) for index, candidate in enumerate(candidates)]
    return report.StudyReport(
        name="toy",
        status="unfinished",
        problem=problem,
        trials=(*trials, failed(len(trials), candidates[0])),
        storage="sqlite:///x.db",
    )
