"""The port of an engine: how a replica of it is launched, watched and understood."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from cluster.device_memory import DeviceMemory
from search_spaces.errors import InvalidValueError, require
from search_spaces.model import ModelSpec
from search_spaces.outcome import FailureReason
from search_spaces.problem import Problem
from search_spaces.serving import Pool, ServingConfig
from search_spaces.workload import Workload


@dataclass(frozen=True, kw_only=True)
class LaunchCommand:
    """A process to start.

    `argv` is an argument vector (never a shell string), `env` goes on top of the caller's environment, and
    `ready_path` answers 200 over HTTP when the process serves. `files` are the texts, by path, of the files that
    `argv` names: whoever starts it writes them first.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    ready_path: str = "/health"

    def write_files(self) -> None:
        """Write `files`, making their folders."""
        for path, text in self.files.items():
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(text, encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class ReplicaPart:
    """The share of one node in a replica that spans several.

    `rank` counts the replica's nodes. The one of rank 0 leads: it alone serves HTTP, and is ready when the whole
    replica is. `hosts` are the nodes' addresses and `devices` the devices on each, both by rank. The parts may meet at
    `rendezvous_port` of the leader's address, which was free a moment ago.
    """

    rank: int
    hosts: tuple[str, ...]
    devices: tuple[int, ...]
    rendezvous_port: int

    def __post_init__(self) -> None:
        require(
            len(self.hosts) == len(self.devices) >= 2,
            f"a replica that spans nodes has two or more, each with its devices; got {self.hosts} and {self.devices}",
        )
        require(0 <= self.rank < len(self.hosts), f"rank={self.rank} must be in [0, {len(self.hosts)})")

    @property
    def leads(self) -> bool:
        """True for the part that serves HTTP."""
        return self.rank == 0

    @property
    def leader_host(self) -> str:
        """The address of the part that leads."""
        return self.hosts[0]

    @property
    def first_device(self) -> int:
        """Devices of the parts before this one."""
        return sum(self.devices[: self.rank])


@dataclass(frozen=True, kw_only=True)
class ReplicaSpec:
    """One replica to launch on a node, or a node's part of one.

    `device_ids` are the GPU indices, or the cores, that the process may use; `work_dir` is its own folder, and
    `shared_dir` one that all replicas of the deployment see (KV hand-over by file). `peer` is the other pool of a
    disaggregated deployment, None where aggregated. `part` is None for a replica that is whole. Clients send `api_key`
    as a bearer token: it belongs into the environment of the process (which holds it as TUNER_API_KEY anyway), never
    into `argv`. `node` is the cluster's name for the node.
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
    part: ReplicaPart | None = None
    api_key: str | None = field(default=None, repr=False)
    node: str = ""

    @property
    def source(self) -> str:
        """What the engine loads; raises `InvalidValueError` where the model was not prepared."""
        if self.model.source is None:
            raise InvalidValueError(f"model {self.model.name!r} has no source; call prepare() first")
        return self.model.source


@dataclass(frozen=True, kw_only=True)
class RouterSpec:
    """The router of a deployment: base URLs of its replicas by role (`mixed_urls` where it is aggregated).

    Replicas and clients of the router want `api_key`, as of a replica.
    """

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
    api_key: str | None = field(default=None, repr=False)


@runtime_checkable
class PerDeployment(Protocol):
    """A backend that must be told of each deployment, on the coordinator, before its processes are launched."""

    def for_deployment(self, config: ServingConfig, problem: Problem) -> EngineBackend:
        """The backend for the deployment of `config`: what it has worked out travels with it."""
        ...


@runtime_checkable
class SpansNodes(Protocol):
    """A backend whose replicas may span nodes: its `replica_command` heeds `ReplicaSpec.part`."""

    def span_refusal(self, pool: Pool, devices: tuple[int, ...]) -> str | None:
        """Why a replica of `pool` cannot be split over nodes with so many devices each, None where it can be."""
        ...


@runtime_checkable
class NeedsSharedFolder(Protocol):
    """A backend whose replicas hand something over through files in `ReplicaSpec.shared_dir`."""

    def needs_shared_folder(self, config: ServingConfig) -> bool:
        """True where replicas of `config` that are on several nodes must see one folder."""
        ...


@runtime_checkable
class OwnDevices(Protocol):
    """A backend whose devices are not the node's: it says itself how much of their memory is in use."""

    def device_memory(self, node: str, device_ids: tuple[int, ...]) -> tuple[DeviceMemory, ...]:
        """Memory of the devices of `node`, called on that node."""
        ...


@runtime_checkable
class NeedsHostMemory(Protocol):
    """A backend whose replicas live in the memory of the host."""

    def host_memory_bytes(self, replica: ReplicaSpec) -> float:
        """Bytes of weights and KV cache of a replica, called on its node after `prepare`."""
        ...


@runtime_checkable
class ChecksCommand(Protocol):
    """A backend whose engine lives in an environment of its own, and says there what it knows."""

    def check_command(self, command: LaunchCommand, pool: Pool) -> str:
        """Version of the engine that `command` starts, called on the replica's node before it is started.

        Raises `InvalidValueError` for what that version does not know.
        """
        ...


@runtime_checkable
class HandsOver(Protocol):
    """A backend that says how KV caches go from prefill to decode replicas."""

    def transport(self, config: ServingConfig) -> str | None:
        """What carries them, for the record of a measurement; None where nothing is handed over."""
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
