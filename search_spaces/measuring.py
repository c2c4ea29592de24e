"""How long and how carefully a trial is measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from search_spaces.errors import require


@dataclass(frozen=True, kw_only=True)
class MeasurementRule:
    """What is measured of a run.

    `requests` requests are measured after a warm-up. The warm-up is the larger of `warm_up_share * requests` and the
    number of requests in flight (closed loop), and is left out. The load goes on until the last measured request has
    ended, so that none of them sees an emptying server. A run whose client was later than `lateness_limit_ms` (p99), or
    of whose requests more than `error_limit` (share) failed, is no measurement.
    """

    requests: int = 64
    warm_up_share: float = 0.1
    lateness_limit_ms: float = 20.0
    error_limit: float = 0.05

    def __post_init__(self) -> None:
        require(self.requests >= 1, f"requests={self.requests} must be at least 1")
        require(0 <= self.warm_up_share <= 1, f"warm_up_share={self.warm_up_share} must be in [0, 1]")
        require(self.lateness_limit_ms > 0, f"lateness_limit_ms={self.lateness_limit_ms} must be above 0")
        require(0 <= self.error_limit <= 1, f"error_limit={self.error_limit} must be in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class TimeLimits:
    """Limits of the phases of a trial, in seconds."""

    placement_s: float = 120.0
    start_s: float = 600.0
    measure_s: float = 600.0
    stop_s: float = 30.0

    def __post_init__(self) -> None:
        for label, value in asdict(self).items():
            require(value > 0, f"{label}={value} must be above 0")
