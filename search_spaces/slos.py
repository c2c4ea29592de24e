"""What must hold of a deployment, and how much it costs a soft objective to miss it.

The violation of an SLO is v = (actual - threshold) / threshold, signed so that more is worse. A hard SLO makes a
deployment infeasible where v is beyond its `fail_ratio`. The penalty of any SLO that is missed is

    penalty(v) = min(1, weight * (exp(v / steepness) - 1))        for v > 0, else 0

which is 0 where nothing is violated, grows ever faster, and never exceeds 1. A score is multiplied by 1 - penalty of
each SLO; objectives themselves are never touched (see `tuner.score`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from search_spaces.errors import require
from search_spaces.metrics import Direction, metric_info

_LARGEST_EXPONENT = 50.0
"""exp(50) is beyond every penalty's bound of 1 for weights above 1e-21."""


class Tier(StrEnum):
    """How well an SLO is met: `failed` is beyond the `fail_ratio` of a hard one."""

    MET = "met"
    WARNING = "warning"
    ERROR = "error"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class Slo:
    """Metric `metric` must be at most (where lower is better) or at least (where higher is better) `threshold`.

    `hard` ones make a deployment infeasible beyond a violation of `fail_ratio`; others only cost. `weight` and
    `steepness` shape the penalty. A violation above `warning` is told as a warning, one above `error` as an error.
    """

    metric: str
    threshold: float
    hard: bool = True
    fail_ratio: float = 0.0
    weight: float = 1.0
    steepness: float = 1.0
    warning: float = 0.0
    error: float = 0.2

    def __post_init__(self) -> None:
        metric_info(self.metric)
        for label in ("threshold", "weight", "steepness"):
            value = getattr(self, label)
            require(value > 0, f"{label}={value} of SLO {self.metric} must be above 0")
        require(self.fail_ratio >= 0, f"fail_ratio={self.fail_ratio} of SLO {self.metric} must not be negative")
        require(
            0 <= self.warning <= self.error,
            f"warning={self.warning} and error={self.error} of SLO {self.metric} must be 0 <= warning <= error",
        )

    @property
    def _lower_is_better(self) -> bool:
        return metric_info(self.metric).direction is Direction.MINIMIZE

    @property
    def limit(self) -> float | None:
        """The value beyond which a deployment is infeasible; None for a soft SLO."""
        if not self.hard:
            return None
        ratio = 1 + self.fail_ratio if self._lower_is_better else 1 - self.fail_ratio
        return self.threshold * ratio

    def violation(self, value: float) -> float:
        """Relative violation (value - threshold) / threshold, signed so that at most 0 is met."""
        ratio = (value - self.threshold) / self.threshold
        return ratio if self._lower_is_better else -ratio

    def excess(self, value: float) -> float:
        """Violation of a hard SLO beyond its fail ratio, feasible where at most 0; never above 0 for a soft one."""
        return self.violation(value) - self.fail_ratio if self.hard else min(0.0, self.violation(value))

    def penalty(self, value: float) -> float:
        """The share of a score that `value` costs, in 0..1."""
        violation = self.violation(value)
        if violation <= 0:
            return 0.0
        return min(1.0, self.weight * math.expm1(min(violation / self.steepness, _LARGEST_EXPONENT)))

    def tier(self, value: float) -> Tier:
        """How well `value` meets the SLO."""
        violation = self.violation(value)
        if self.excess(value) > 0:
            return Tier.FAILED
        if violation > self.error:
            return Tier.ERROR
        return Tier.WARNING if violation > self.warning else Tier.MET


def hard_slos(slos: Sequence[Slo]) -> tuple[Slo, ...]:
    """Those that can make a deployment infeasible."""
    return tuple(slo for slo in slos if slo.hard)


def multiplier(slos: Sequence[Slo], metrics: Mapping[str, float]) -> float:
    """Product of 1 - penalty over all `slos`; an SLO on a metric that is absent raises `KeyError`."""
    return math.prod(1.0 - slo.penalty(metrics[slo.metric]) for slo in slos)


def feasible(slos: Sequence[Slo], metrics: Mapping[str, float]) -> bool:
    """True where no hard SLO is violated beyond its fail ratio."""
    return all(slo.excess(metrics[slo.metric]) <= 0 for slo in slos if slo.hard)
