"""What an outcome amounts to for the search."""

from __future__ import annotations

import math
from collections.abc import Sequence

from search_spaces.outcome import Failure, FailureReason, Outcome, Prediction
from search_spaces.problem import Problem
from studies.pareto import worst_values
from studies.records import TrialRecord


def checked_outcome(outcome: Outcome, problem: Problem) -> Outcome:
    """`outcome`, or the failure it amounts to where an objective or an SLO metric is absent or not finite."""
    if isinstance(outcome, Failure):
        return outcome
    metrics = outcome.metrics.flat()
    needed = {objective.metric for objective in problem.objectives} | {slo.metric for slo in problem.slos}
    bad = [name for name in sorted(needed) if not math.isfinite(metrics.get(name, math.nan))]
    if not bad:
        return outcome
    shown = ", ".join(f"{name}={metrics.get(name, 'absent')}" for name in bad)
    return Failure(
        reason=FailureReason.REQUESTS_FAILED,
        detail=f"the measurement gives no finite value of {shown}",
        artifacts=outcome.artifacts,
        timings_s=outcome.timings_s,
        environment=outcome.environment,
    )


def pessimistic_values(trials: Sequence[TrialRecord], prediction: Prediction | None, problem: Problem) -> list[float]:
    """Objective values for a configuration that gave none: the worst measured, else those predicted, else 0.

    Optuna needs finite numbers. Domination never reads them, since the constraint `started_and_held` is violated, and
    fronts and hypervolumes leave the trial out. The worst measured value keeps scatter plots readable, and the trial
    off the lists of best trials of programs that do not know constraints.
    """
    measured = [trial.values for trial in trials if trial.values is not None]
    if measured:
        worst = worst_values(measured, [objective.direction for objective in problem.objectives])
        return [float(value) for value in worst]
    known = prediction.metrics if prediction else {}
    values = [known.get(objective.metric, 0.0) for objective in problem.objectives]
    return [value if math.isfinite(value) else 0.0 for value in values]
