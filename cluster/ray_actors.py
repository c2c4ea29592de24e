"""The actor that owns a process of a deployment: a replica or the router.

A plain class; `cluster.ray_deployment` makes actors of it. It returns small values: logs are files. Nothing heavy is
imported here, as each actor is a new interpreter that a deployment waits for.
"""

from __future__ import annotations

import hashlib
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.engines.base import EngineBackend, LaunchCommand, ReplicaSpec, RouterSpec
from cluster.node_facts import NodeFacts, cpu_model, gpu_models, machine_id, usable_cores
from cluster.processes import ManagedProcess, Tags, free_port, wait_until_answers
from search_spaces.errors import InvalidValueError
from search_spaces.model import ModelSpec
from search_spaces.outcome import Failure, FailureReason, LaunchedProcess
from search_spaces.serving import Pool
from search_spaces.workload import Workload

PORT_TRIES = 3
REDACTED = "***"
"""Stands for an API key in the record of a process."""


@dataclass(frozen=True, kw_only=True)
class ReplicaJob:
    """A replica to serve; host, port and the devices' ids are added on its node."""

    backend: EngineBackend
    trial: str
    pool: Pool
    index: int
    model: ModelSpec
    workload: Workload
    model_dir: Path
    work_dir: Path
    shared_dir: Path
    peer: Pool | None = None

    @property
    def log(self) -> Path:
        """The replica's log file."""
        return self.work_dir / f"{self.pool.role}-{self.index}.log"

    def launch(self, host: str, port: int, device_ids: tuple[int, ...]) -> tuple[LaunchCommand, LaunchedProcess]:
        """The process and its record; raises what the backend raises for a bad configuration."""
        spec = ReplicaSpec(
            trial=self.trial,
            pool=self.pool,
            index=self.index,
            host=host,
            port=port,
            model=_prepared(self.backend, self.model, self.model_dir),
            workload=self.workload,
            device_ids=device_ids,
            work_dir=self.work_dir,
            shared_dir=self.shared_dir,
            peer=self.peer,
        )
        command = self.backend.replica_command(spec)
        record = launched(self.log.stem, command, spec, work_dir=self.work_dir)
        return command, replace(record, device_ids=device_ids, model_source=spec.model.source)


@dataclass(frozen=True, kw_only=True)
class RouterJob:
    """The router to serve; host and port in `spec` are replaced on its node."""

    backend: EngineBackend
    spec: RouterSpec
    work_dir: Path

    @property
    def log(self) -> Path:
        """The router's log file."""
        return self.work_dir / "router.log"

    def launch(self, host: str, port: int, device_ids: tuple[int, ...]) -> tuple[LaunchCommand, LaunchedProcess]:
        """The process and its record."""
        del device_ids
        spec = replace(self.spec, host=host, port=port)
        command = self.backend.router_command(spec)
        return command, launched(self.log.stem, command, spec, work_dir=self.work_dir)


Job = ReplicaJob | RouterJob


@dataclass(frozen=True, kw_only=True)
class Serving:
    """A process that serves; `launched` is how it was started."""

    url: str
    pid: int
    launched: LaunchedProcess


def launched(name: str, command: LaunchCommand, spec: ReplicaSpec | RouterSpec, *, work_dir: Path) -> LaunchedProcess:
    """The record of the process `command`, started on this machine as `spec` says; the API key is not written down."""

    def redacted(text: str) -> str:
        return text.replace(spec.api_key, REDACTED) if spec.api_key else text

    return LaunchedProcess(
        name=name,
        trial=spec.trial,
        node=socket.gethostname(),
        host=spec.host,
        port=spec.port,
        argv=tuple(map(redacted, command.argv)),
        env={key: redacted(value) for key, value in command.env.items()},
        files={path: hashlib.sha256(redacted(text).encode()).hexdigest() for path, text in command.files.items()},
        work_dir=str(work_dir),
        shared_dir=str(spec.shared_dir),
    )


@dataclass(frozen=True, kw_only=True)
class Seat:
    """Where a process runs: the address of its node, the cores that it keeps to, and the ids of its devices."""

    host: str
    cores: tuple[int, ...]
    device_ids: tuple[int, ...] = ()


class ProcessActor:
    """Owns one process of a deployment. Calls may overlap: `serve`, `watch` and `stop` each wait in a thread."""

    def __init__(self, tags: Tags) -> None:
        self._tags = tags
        self._process: ManagedProcess | None = None
        self._stopping = threading.Event()
        # the kernel ends a process with the thread that started it: this one lives as long as the actor
        self._starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="process-starter")

    def facts(self) -> NodeFacts:
        """The node of this actor, and its GPUs."""
        return node_facts()

    def serve(self, job: Job, seat: Seat, limit_s: float) -> Serving | Failure:
        """Start the process of `job` and wait until it serves; tries other ports where one was taken meanwhile."""
        failure = Failure(reason=FailureReason.TRANSPORT, detail="no port was tried")
        for _ in range(PORT_TRIES):
            if self._stopping.is_set():
                return Failure(reason=FailureReason.LOST_COORDINATOR, detail="stopped before it was started")
            outcome = self._serve_once(job, seat, limit_s)
            if isinstance(outcome, Serving) or outcome.reason is not FailureReason.TRANSPORT:
                return outcome
            failure = outcome
        return failure

    def watch(self, backend: EngineBackend) -> Failure | None:
        """Wait until the process ends: why it did, or None where it was stopped on purpose."""
        process = self._process
        if process is None:
            return None
        while process.wait(3600.0) is None:
            continue
        return None if self._stopping.is_set() else self._ended(process, backend, ready=True)

    def autopsy(self, backend: EngineBackend, grace_s: float) -> Failure | None:
        """Why the process is dead, None where it lives; waits `grace_s` for one that is about to die."""
        process = self._process
        if process is None or process.wait(grace_s) is None:
            return None
        return self._ended(process, backend, ready=True)

    def tail(self) -> str:
        """Last lines of the process's log."""
        return "" if self._process is None else self._process.tail()

    def stop(self, limit_s: float) -> None:
        """End the process and its descendants."""
        self._stopping.set()
        if self._process is not None:
            self._process.terminate(limit_s)

    def _serve_once(self, job: Job, seat: Seat, limit_s: float) -> Serving | Failure:
        port = free_port(seat.host)
        try:
            command, record = job.launch(seat.host, port, seat.device_ids)
        except InvalidValueError as error:
            return Failure(reason=FailureReason.INVALID_FLAGS, detail=str(error))
        self._process = process = self._starter.submit(self._start, command, job.log, seat.cores).result()
        url = f"http://{seat.host}:{port}"
        if wait_until_answers(process, url + command.ready_path, limit_s):
            return Serving(url=url, pid=process.pid, launched=record)
        if process.exit_code() is not None:
            return self._ended(process, job.backend, ready=False)
        reason = job.backend.classify(None, process.tail(), ready=False)
        detail = f"{job.log.stem} did not answer {command.ready_path} within {limit_s:.0f} s; raise start_s"
        return Failure(reason=reason, detail=detail, log_tail=process.tail())

    def _start(self, command: LaunchCommand, log: Path, cores: tuple[int, ...]) -> ManagedProcess:
        command.write_files()
        env = {**command.env, **self._tags.environment()}
        return ManagedProcess(argv=command.argv, env=env, log=log, cores=cores)

    def _ended(self, process: ManagedProcess, backend: EngineBackend, *, ready: bool) -> Failure:
        code, tail = process.exit_code(), process.tail()
        when = "under load" if ready else "before it served"
        how = f"was ended by signal {-code}" if code is not None and code < 0 else f"exited with code {code}"
        return Failure(
            reason=backend.classify(code, tail, ready=ready),
            detail=f"{process.log.stem} {how} {when}",
            log_tail=tail,
        )


def node_facts() -> NodeFacts:
    """Facts of the node on which this actor runs."""
    import ray

    context = ray.get_runtime_context()
    return NodeFacts(
        node_id=context.get_node_id(),
        host=socket.gethostname(),
        machine=machine_id(),
        cores=usable_cores(),
        cpu_model=cpu_model(),
        gpu_models=gpu_models(),
        gpu_ids=tuple(int(gpu) for gpu in context.get_accelerator_ids().get("GPU", ())),
    )


def _prepared(backend: EngineBackend, model: ModelSpec, directory: Path) -> ModelSpec:
    """`backend.prepare`, one replica of a node at a time: the first makes the files, the others find them."""
    import fcntl

    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return backend.prepare(model, directory)
