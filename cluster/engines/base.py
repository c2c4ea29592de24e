"""The port of an engine: how a replica of it is launched, watched and understood."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from search_spaces.model import ModelSpec
from search_spaces.outcome import FailureReason
from search_spaces.problem import Problem
from search_spaces.serving import Pool, ServingConfig
from search_spaces.workload import Workload


@dataclass(frozen=True, kw_only=True)
class LaunchCommand:
    """A process to start.

    `argv` is an argument vector (never a shell string), `env` goes on top of the caller's environment, and
    `ready_path` answers 200 over HTTP when the process serves. `files` are the texts, by path, of the files that were
    written for it into its work folder and that `argv` names: whoever starts it elsewhere writes them there.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    ready_path: str = "/health"


@dataclass(frozen=True, kw_only=True)
class ReplicaSpec:
    """One replica to launch on a node.

    `device_ids` are the GPU indices, or the cores, that the replica may use; `work_dir` is its own folder, and
    `shared_dir` one that all replicas of the deployment see (KV hand-over by file). `peer` is the other pool of a
    disaggregated deployment, None where aggregated.
    """

    trial: str
    pool: Pool
    index: int
    host: str
    port: int
    model: ModelSpec
    workload: Workload
    device_ids: tuple[int, ...]
    work_dir: Path
    shared_dir: Path
    peer: Pool | None = None


@dataclass(frozen=True, kw_only=True)
class RouterSpec:
    """The router of a deployment: base URLs of its replicas by role (`mixed_urls` where it is aggregated)."""

    trial: str
    host: str
    port: int
    model: ModelSpec
    prefill_urls: tuple[str, ...] = ()
    decode_urls: tuple[str, ...] = ()
    mixed_urls: tuple[str, ...] = ()
    prefill_pool: Pool | None = None
    decode_pool: Pool | None = None
    shared_dir: Path


@runtime_checkable
class PerDeployment(Protocol):
    """A backend that must be told of each deployment, on the coordinator, before its processes are launched."""

    def for_deployment(self, config: ServingConfig, problem: Problem) -> EngineBackend:
        """The backend for the deployment of `config`: what it has worked out travels with it."""
        ...


class EngineBackend(Protocol):
    """What the cluster needs to know of an engine. Implementations hold no state and never import the engine.

    Measurements of an `emulated` engine are marked as such.
    """

    name: str
    emulated: bool

    def prepare(self, model: ModelSpec, directory: Path) -> ModelSpec:
        """Make what the replicas load (once per node and study), and return the model with its `source` set."""
        ...

    def replica_command(self, replica: ReplicaSpec) -> LaunchCommand:
        """The process of one replica, which serves OpenAI-compatible HTTP."""
        ...

    def router_command(self, router: RouterSpec) -> LaunchCommand:
        """The process in front of several replicas, which serves the same HTTP."""
        ...

    def classify(self, exit_code: int | None, log_tail: str, *, ready: bool) -> FailureReason:
        """Class of a failure from its exit code (None while alive) and last lines; `ready` tells boot from load."""
        ...

    def version(self) -> str:
        """Version of the engine, as installed."""
        ...


@dataclass(frozen=True, kw_only=True)
class HttpCall:
    """A request without a body to a replica, below its base URL; any 2xx answer says that it was done."""

    path: str
    method: str = "POST"


@runtime_checkable
class ResetsCaches(Protocol):
    """A backend whose replicas can forget earlier prompts while they are up.

    A deployment that stays up for a next measurement is reset before it, so that no run answers from the caches of
    the run before.
    """

    def reset_calls(self, pool: Pool) -> tuple[HttpCall, ...]:
        """What makes an idle replica of `pool` forget every earlier prompt; empty where it keeps none."""
        ...
