"""The port through which trials are measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from search_spaces.measuring import MeasurementRule, TimeLimits
from search_spaces.outcome import Outcome
from search_spaces.problem import Problem
from search_spaces.serving import Candidate, ServingConfig


@dataclass(frozen=True, kw_only=True)
class TrialRequest:
    """One candidate to measure. `trial` names it in tags, logs and leases; `artifact_dir` receives its files.

    `first_rate` is where a search for the highest rate begins, None for the middle (see `Workload.rate_search`).
    """

    trial: str
    candidate: Candidate
    problem: Problem
    rule: MeasurementRule
    limits: TimeLimits
    artifact_dir: Path
    seed: int
    first_rate: float | None = None


@dataclass(frozen=True, kw_only=True)
class TrialHandle:
    """JSON-able reference to a running trial."""

    trial: str
    config_key: str


@dataclass(frozen=True, kw_only=True)
class Running:
    """A trial that has no outcome yet; `phase` is placement, start, warm_up, measure or stop."""

    phase: str
    elapsed_s: float


class TrialRunner(Protocol):
    """Measures candidates on deployments that it starts, reuses and stops.

    A deployment stays up after a measurement, so that a next request with the same configuration and another load
    needs no start; it is stopped when a request needs its devices, on `release` and on `close`.
    """

    def start(self, request: TrialRequest) -> TrialHandle:
        """Begin `request` without waiting."""
        ...

    def poll(self, handle: TrialHandle) -> Running | Outcome:
        """State of the trial; never raises for a fault of the deployment, which is a `Failure`."""
        ...

    def stop(self, handle: TrialHandle) -> None:
        """End the trial and its deployment; a no-op when it has ended."""
        ...

    def warm(self) -> tuple[ServingConfig, ...]:
        """Configurations whose deployments are up and idle."""
        ...

    def release(self) -> None:
        """Stop every idle deployment."""
        ...

    def close(self) -> None:
        """Stop everything; nothing that the runner started outlives this call."""
        ...
