"""What becomes of a candidate: a prediction before it is measured, then a measurement or a failure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from search_spaces.metrics import ServingMetrics


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Expected metrics by name (see `search_spaces.metrics.METRICS`).

    `log_stddev` is the standard deviation of the natural logarithm of each metric, as a measurement would show it;
    `log_noise` is the part of it that repeating the measurement would show too (none where it is not known).
    `infeasible` says why the candidate cannot run (then `metrics` is empty), None where it can. `breakdown_ms` is the
    time per operation of a step.
    """

    metrics: Mapping[str, float]
    log_stddev: Mapping[str, float] = field(default_factory=dict)
    log_noise: Mapping[str, float] = field(default_factory=dict)
    infeasible: str | None = None
    breakdown_ms: Mapping[str, float] = field(default_factory=dict)


class FailureReason(StrEnum):
    """Classes of failure."""

    OUT_OF_MEMORY_AT_BOOT = "out_of_memory_at_boot"
    OUT_OF_MEMORY_UNDER_LOAD = "out_of_memory_under_load"
    STARTUP_TIMEOUT = "startup_timeout"
    INVALID_FLAGS = "invalid_flags"
    KV_CACHE_TOO_SMALL = "kv_cache_too_small"
    ENGINE_CRASH = "engine_crash"
    MEASUREMENT_TIMEOUT = "measurement_timeout"
    REQUESTS_FAILED = "requests_failed"
    TRANSPORT = "transport"
    LATE_CLIENT = "late_client"
    PLACEMENT = "placement"
    UNHEALTHY_NODE = "unhealthy_node"
    LOST_NODE = "lost_node"
    LOST_COORDINATOR = "lost_coordinator"

    @property
    def is_infrastructure(self) -> bool:
        """True where the configuration is not to blame: such a failure teaches the sampler nothing and is retried."""
        return self in _INFRASTRUCTURE


_INFRASTRUCTURE = frozenset(
    {
        FailureReason.TRANSPORT,
        FailureReason.LATE_CLIENT,
        FailureReason.PLACEMENT,
        FailureReason.UNHEALTHY_NODE,
        FailureReason.LOST_NODE,
        FailureReason.LOST_COORDINATOR,
    }
)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a candidate gave no measurement.

    `detail` says it in a sentence; `log_tail` holds the engine's own last lines.
    """

    reason: FailureReason
    detail: str
    log_tail: str = ""
    artifacts: Mapping[str, str] = field(default_factory=dict)
    timings_s: Mapping[str, float] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def retryable(self) -> bool:
        """True where another try may succeed."""
        return self.reason.is_infrastructure


@dataclass(frozen=True, kw_only=True)
class LaunchedPart:
    """The share of one node in a replica that spans several: addresses and devices of all of its nodes, by rank."""

    rank: int
    hosts: tuple[str, ...]
    devices: tuple[int, ...]
    rendezvous_port: int


@dataclass(frozen=True, kw_only=True)
class LaunchedProcess:
    """A replica or router as it was started for a measurement, exact enough to start the same one elsewhere.

    `trial` is the one that the deployment was started for (a warm deployment is measured for others too), `node` the
    host's name and `cluster_node` what the cluster calls it, `host` and `port` where it listens, `device_ids` the GPUs
    or cores that it was given. `env` holds what was added to the environment, `files` the SHA-256 of each file that was
    written for it, by path. `model_source` is what a replica loaded (None for a router), `engine_version` what its
    engine called itself on its node, None where the tool knows that. `part` is None for a process that is a whole
    replica, or the router.
    """

    name: str
    trial: str
    node: str
    host: str
    port: int
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    device_ids: tuple[int, ...] = ()
    work_dir: str
    shared_dir: str
    model_source: str | None = None
    engine_version: str | None = None
    cluster_node: str = ""
    part: LaunchedPart | None = None


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One run of a search for the highest request rate: whether `request_rate` met every SLO, and what was measured.

    `metrics` is None where the run gave none, and `detail` says why: too many requests failed (not met), or nothing
    could be told of the server (`met` is None).
    """

    request_rate: float
    met: bool | None
    metrics: ServingMetrics | None = None
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Figures measured on a real deployment.

    `timings_s` are the seconds of each phase (placement, start, warm_up, measure, stop; absent where a warm deployment
    was reused). `client_lateness_ms` is the p99 of how late the load client sent or read: the validity gate.
    `environment` names engine, node and software versions. `artifacts` maps a name to a file path. `processes` are the
    replicas in the order of their pools, then the router; empty where they were not recorded. `probes` are the runs of
    a search for the highest rate, in order; `metrics` are then those of the highest rate that met every SLO, or of the
    lowest one that was tried where none did.
    """

    metrics: ServingMetrics
    client_lateness_ms: float
    timings_s: Mapping[str, float] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    artifacts: Mapping[str, str] = field(default_factory=dict)
    emulated: bool = False
    processes: tuple[LaunchedProcess, ...] = ()
    probes: tuple[Probe, ...] = ()

    @property
    def highest_rate(self) -> tuple[float | None, float | None]:
        """The interval of the highest rate: the highest one that was met, the lowest one that was not; None for none.

        (3.1, 3.4) says that 3.1 requests/s met every SLO and 3.4 did not; (64, None) that the upper end of the search
        was met, (None, 0.1) that its lower end was not. (None, None) where no rate was searched.
        """
        met = [probe.request_rate for probe in self.probes if probe.met]
        missed = [probe.request_rate for probe in self.probes if probe.met is False]
        return max(met, default=None), min(missed, default=None)


Outcome = Measurement | Failure
