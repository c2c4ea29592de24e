"""Whether two load generators saw the same server: runs in turn, and what differs beyond their noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import t as student

from search_spaces.errors import require

COMPARED = ("ttft_p50_ms", "tpot_p50_ms", "itl_p50_ms", "e2e_p50_ms", "output_tokens_per_s", "requests_per_s")
CONFIDENCE = 0.95
SMALL = 0.02
"""A share of which nobody's decision depends: many repeatable runs tell apart what is as good as equal."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """One metric in the runs of two clients.

    `ratio` is the geometric mean of the second over that of the first, `low` and `high` the ends of its 95% interval
    (Welch's t on the logarithms).
    """

    metric: str
    first: float
    second: float
    ratio: float
    low: float
    high: float

    @property
    def within_noise(self) -> bool:
        """True where the runs do not tell the two apart."""
        return self.low <= 1.0 <= self.high

    @property
    def verdict(self) -> str:
        """`within noise`, else `within 2%` where the whole interval is, else `differ`."""
        if self.within_noise:
            return "within noise"
        return f"within {SMALL:.0%}" if max(abs(self.low - 1), abs(self.high - 1)) < SMALL else "differ"


def agreement(metric: str, first: Sequence[float], second: Sequence[float]) -> Agreement:
    """Compare values of `metric` (above 0); raises `InvalidValueError` for fewer than two runs of each."""
    require(min(len(first), len(second)) >= 2, f"{metric}: noise takes two runs of each client, not {len(first)}")
    require(min(*first, *second) > 0, f"{metric}={min(*first, *second)} must be above 0 to be compared as a ratio")
    logs = [[math.log(value) for value in values] for values in (first, second)]
    means = [statistics.fmean(values) for values in logs]
    shares = [statistics.variance(values) / len(values) for values in logs]
    error = math.sqrt(sum(shares))
    half = 0.0
    if error > 0:
        freedom = error**4 / sum(share**2 / (len(values) - 1) for share, values in zip(shares, logs, strict=True))
        half = float(student.ppf(0.5 + CONFIDENCE / 2, freedom)) * error
    difference = means[1] - means[0]
    return Agreement(
        metric=metric,
        first=math.exp(means[0]),
        second=math.exp(means[1]),
        ratio=math.exp(difference),
        low=math.exp(difference - half),
        high=math.exp(difference + half),
    )


def agreements(first: Sequence[Mapping[str, float]], second: Sequence[Mapping[str, float]]) -> tuple[Agreement, ...]:
    """Every compared metric of the runs of two clients."""
    return tuple(agreement(name, [r[name] for r in first], [r[name] for r in second]) for name in COMPARED)
