"""Constraints of a trial, and the one place that writes them into the storage.

Feasible means at most 0. The first constraint, `started_and_held`, is 0 where a measurement was made. Each hard SLO
adds its relative violation less its fail ratio; soft ones are no constraints. Optuna ranks infeasible trials by the
plain sum of their positive violations, hence the relative form.

Optuna 5 offers `trial.set_constraint`, which stores each value under a key of its own. optuna-dashboard 0.21 reads only
the list that older versions stored under `constraints`, and Optuna reads that list too; writing both would count every
violation twice. So the list alone is written, here. `tests/studies/test_constraints.py` fails on the day the dashboard
reads the new form: then switch `write_constraints` over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from optuna.storages import BaseStorage

from search_spaces.slos import Slo, hard_slos

LEGACY_KEY = "constraints"
HELD = "started_and_held"


def constraint_names(slos: Sequence[Slo]) -> tuple[str, ...]:
    """Names of all constraints in the order of the stored list."""
    return (HELD, *dict.fromkeys(slo.metric for slo in hard_slos(slos)))


def measured_violations(slos: Sequence[Slo], metrics: Mapping[str, float]) -> dict[str, float]:
    """Violations of a measured trial by metric: (x - slo) / slo - fail ratio of each hard SLO; `started_and_held` is 0.

    Two SLOs on one metric give the larger violation of the two.
    """
    violations = {HELD: 0.0}
    for slo in hard_slos(slos):
        violation = slo.excess(metrics[slo.metric])
        violations[slo.metric] = max(violation, violations.get(slo.metric, violation))
    return violations


def failed_violations(earlier: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Violation of a configuration that did not start or hold: 1 more than the largest sum among `earlier` ones.

    Nothing is known of its SLOs; it ranks behind everything that was measured, and no further than that.
    """
    worst = max((_total(violations) for violations in earlier if violations.get(HELD, 0.0) <= 0), default=0.0)
    return {HELD: 1.0 + worst}


def write_constraints(
    backend: BaseStorage, trial_id: int, names: Sequence[str], violations: Mapping[str, float]
) -> None:
    """Store `violations` in the order of `names`; 0 stands for a constraint of which nothing is known."""
    backend.set_trial_system_attr(trial_id, LEGACY_KEY, [float(violations.get(name, 0.0)) for name in names])


def _total(violations: Mapping[str, float]) -> float:
    return sum(value for value in violations.values() if value > 0)


__all__ = [
    "HELD",
    "constraint_names",
    "failed_violations",
    "measured_violations",
    "write_constraints",
]
