"""Distributions of latencies, as arrays over configurations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from perf_model.numeric import FloatArray

QUANTILES = {"p50": 0.50, "p90": 0.90, "p95": 0.95, "p99": 0.99}
_BISECTIONS = 24


@dataclass(frozen=True, kw_only=True)
class Latency:
    """A constant, plus a uniform part, plus an exponential wait that some requests have; in milliseconds.

    The parts are added comonotonically: a request that is late in one is late in all, so quantiles add up.
    `wait_mean` is the mean wait of those that wait, `wait_share` their share.
    """

    base: FloatArray
    width: FloatArray
    wait_share: FloatArray
    wait_mean: FloatArray

    def mean(self) -> FloatArray:
        """Mean over requests."""
        return self.base + self.width / 2.0 + self.wait_share * self.wait_mean

    def quantile(self, level: float) -> FloatArray:
        """Value that a share `level` of the requests does not exceed."""
        wait = self.wait_mean * np.log(np.maximum(self.wait_share / (1.0 - level), 1.0))
        return self.base + level * self.width + wait

    def share_within(self, threshold: float | FloatArray) -> FloatArray:
        """Share of requests at or below `threshold`, by bisection on the quantile function."""
        low, high = np.zeros_like(self.base), np.ones_like(self.base)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2.0
            wait = self.wait_mean * np.log(np.maximum(self.wait_share / np.maximum(1.0 - middle, 1e-9), 1.0))
            inside = self.base + middle * self.width + wait <= threshold
            low, high = np.where(inside, middle, low), np.where(inside, high, middle)
        return np.where(high > 1.0 - 2.0**-20, 1.0, low)


@dataclass(frozen=True, kw_only=True)
class TwoPoint:
    """A gap between tokens: `long_share` of the gaps last `long`, the others `short`, in milliseconds."""

    short: FloatArray
    long: FloatArray
    long_share: FloatArray

    def mean(self) -> FloatArray:
        """Mean over gaps."""
        return self.short + self.long_share * (self.long - self.short)

    def quantile(self, level: float) -> FloatArray:
        """Value that a share `level` of the gaps does not exceed."""
        return np.where(level <= 1.0 - self.long_share, self.short, self.long)

    def share_within(self, threshold: float | FloatArray) -> FloatArray:
        """Share of gaps at or below `threshold`."""
        return (self.short <= threshold) * (1.0 - self.long_share) + (self.long <= threshold) * self.long_share


Distribution = Latency | TwoPoint
