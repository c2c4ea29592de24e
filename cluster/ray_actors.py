"""The actor that owns a process of a deployment: a replica, a part of one, or the router.

A plain class; `cluster.ray_deployment` makes actors of it. It answers with small values: of a log, with its end.
Nothing heavy is imported here, as each actor is a new interpreter that a deployment waits for.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from cluster.device_memory import gpu_memory, wait_for_host_memory, wait_until_free
from cluster.engines.base import (
    ChecksCommand,
    EngineBackend,
    LaunchCommand,
    NeedsHostMemory,
    OwnDevices,
    ReplicaPart,
    ReplicaSpec,
    RouterSpec,
)
from cluster.engines.child_process import API_KEY_VARIABLE
from cluster.engines.log_signs import telling_line
from cluster.janitor import end_owned
from cluster.launched import launched
from cluster.memory_kills import KillCount, kill_count, killed_for_memory
from cluster.node_facts import NodeFacts, cpu_model, gpu_driver, gpu_models, machine_id, usable_cores
from cluster.power import PowerLog, gpu_power_w
from cluster.processes import (
    ManagedProcess,
    ProcessId,
    Tags,
    end_of_log,
    free_port,
    log_tail,
    node_folder,
    wait_until_answers,
)
from search_spaces.errors import InvalidValueError
from search_spaces.model import ModelSpec
from search_spaces.outcome import Failure, FailureReason, LaunchedProcess
from search_spaces.serving import Pool
from search_spaces.workload import Workload

PORT_TRIES = 3
READ_LINES, READ_BYTES = 400, 131_072
"""How much of a dead process's log is read for the cause; what is kept is less."""
MEMORY_LIMIT_S = 60.0
"""How long a replica waits for the memory of its devices to be free, within the limit of its start."""
MARKER = ".coordinator"
"""File of the coordinator in a deployment's folder: a node that sees it shares the folder."""


@dataclass(frozen=True, kw_only=True)
class ReplicaJob:
    """A replica, or the part of one, to serve; what only its node knows is added there. `name` is its bundle's."""

    backend: EngineBackend
    name: str
    trial: str
    pool: Pool
    index: int
    model: ModelSpec
    workload: Workload
    model_dir: Path
    work_dir: Path
    shared_dir: Path
    peer: Pool | None = None
    part: ReplicaPart | None = None

    @property
    def log(self) -> Path:
        """The log file of the process."""
        return self.work_dir / f"{self.name}.log"

    @property
    def serves_http(self) -> bool:
        """False for a part that only takes part: it is up as soon as it runs."""
        return self.part is None or self.part.leads

    def moved_to(self, folder: Path) -> ReplicaJob:
        """The job on a node that keeps its files in `folder`."""
        return replace(self, work_dir=folder, shared_dir=folder / "shared", model_dir=folder.parent / "models")

    def spec(self, seat: Seat, port: int) -> ReplicaSpec:
        """The replica on its node; makes the model's files where they are not there yet."""
        return ReplicaSpec(
            trial=self.trial,
            pool=self.pool,
            index=self.index,
            host=seat.host,
            port=port,
            model=_prepared(self.backend, self.model, self.model_dir),
            workload=self.workload,
            device_ids=seat.device_ids,
            work_dir=self.work_dir,
            shared_dir=self.shared_dir,
            peer=self.peer,
            part=self.part,
            api_key=seat.api_key,
            node=seat.node,
        )

    def command(self, seat: Seat, port: int) -> tuple[LaunchCommand, LaunchedProcess]:
        """The process and its record; raises what the backend raises for a bad configuration."""
        spec = self.spec(seat, port)
        command = self.backend.replica_command(spec)
        record = launched(self.name, command, spec, work_dir=self.work_dir)
        if isinstance(self.backend, ChecksCommand):
            record = replace(record, engine_version=self.backend.check_command(command, self.pool))
        return command, record


@dataclass(frozen=True, kw_only=True)
class RouterJob:
    """The router to serve; host, port and key in `spec` are replaced on its node."""

    backend: EngineBackend
    spec: RouterSpec
    work_dir: Path
    name: str = "router"
    serves_http: bool = True

    @property
    def log(self) -> Path:
        """The router's log file."""
        return self.work_dir / f"{self.name}.log"

    def moved_to(self, folder: Path) -> RouterJob:
        """The job on a node that keeps its files in `folder`."""
        return replace(self, work_dir=folder, spec=replace(self.spec, shared_dir=folder / "shared"))

    def command(self, seat: Seat, port: int) -> tuple[LaunchCommand, LaunchedProcess]:
        """The process and its record."""
        spec = replace(self.spec, host=seat.host, port=port, api_key=seat.api_key)
        command = self.backend.router_command(spec)
        return command, launched(self.name, command, spec, work_dir=self.work_dir)


Job = ReplicaJob | RouterJob


@dataclass(frozen=True, kw_only=True)
class Serving:
    """A process that serves, or takes part in a replica that does; `launched` is how it was started."""

    url: str
    pid: int
    launched: LaunchedProcess


@dataclass(frozen=True, kw_only=True)
class Seat:
    """Where a process runs: the address of its node, the cores that it keeps to, and the ids of its devices.

    `on_gpu` says what the devices are, `node` is the cluster's name for the node. `api_key` is what clients must send.
    """

    host: str
    cores: tuple[int, ...]
    device_ids: tuple[int, ...] = ()
    on_gpu: bool = False
    node: str = ""
    api_key: str | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class Account:
    """How a process is: why it died (None while it lives), and the last lines of its log."""

    death: Failure | None
    tail: str


class ProcessActor:
    """Owns one process of a deployment. Calls may overlap: `serve`, `watch` and `stop` each wait in a thread."""

    def __init__(self, tags: Tags) -> None:
        self._tags, self._own_folder = tags, node_folder(tags.coordinator)
        self._process: ManagedProcess | None = None
        self._job: Job | None = None
        self._kills: KillCount | None = None
        self._power: PowerLog | None = None
        self._stopping = threading.Event()
        # the kernel ends a process with the thread that started it: this one lives as long as the actor
        self._starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="process-starter")

    def facts(self, folder: Path) -> NodeFacts:
        """The node of this actor, its GPUs, and whether it sees the coordinator's `folder`."""
        return node_facts(folder)

    def free_port(self, host: str) -> int:
        """A port of this node's address `host` that nothing listens on now."""
        return free_port(host)

    def serve(self, job: Job, seat: Seat, limit_s: float) -> Serving | Failure:
        """Start the process of `job` and wait until it serves; tries other ports where one was taken meanwhile."""
        self._job = job = (
            job if (job.work_dir / MARKER).exists() else job.moved_to(self._own_folder / job.work_dir.name)
        )
        failure: Failure | None = None
        deadline_s = time.monotonic() + limit_s
        whole = isinstance(job, RouterJob) or job.part is None
        for _ in range(PORT_TRIES if whole else 1):  # the other parts of a replica would not come along
            if self._stopping.is_set():
                return Failure(reason=FailureReason.LOST_COORDINATOR, detail="stopped before it was started")
            outcome = self._serve_once(job, seat, deadline_s)
            if isinstance(outcome, Serving) or outcome.reason is not FailureReason.TRANSPORT:
                late = isinstance(outcome, Failure) and outcome.reason is FailureReason.STARTUP_TIMEOUT
                return failure if failure is not None and late else outcome  # the taken port took the time
            failure = outcome
        return failure or Failure(reason=FailureReason.TRANSPORT, detail="no port was tried")

    def watch(self) -> bool:
        """Wait until the process ends; True where it was not stopped on purpose."""
        process = self._process
        if process is None:
            return False
        while process.wait(3600.0) is None:
            continue
        return not self._stopping.is_set()

    def account(self, grace_s: float, *, ready: bool) -> Account:
        """How the process is; waits `grace_s` for one that is about to die. `ready` says whether all had served."""
        process, job = self._process, self._job
        if process is None or job is None:
            return Account(death=None, tail="")
        dead = process.wait(grace_s) is not None and not self._stopping.is_set()
        return Account(death=self._ended(process, job.backend, ready=ready) if dead else None, tail=process.tail())

    def power_w(self, window_s: float) -> float | None:
        """Mean electric power of the process's GPUs over the last `window_s`, None where they do not report it."""
        return None if self._power is None else self._power.mean_w(window_s)

    def log(self) -> bytes:
        """The end of the process's log."""
        return b"" if self._job is None else end_of_log(self._job.log)

    def stop(self, limit_s: float) -> bytes:
        """End the process and its descendants; returns the end of its log."""
        self._stopping.set()
        if self._power is not None:
            self._power.close()
        if self._process is not None:
            self._process.terminate(limit_s)
            end_owned(ProcessId.of(os.getpid()), self._tags.study)  # what a process left that has crashed
        log = self.log()
        if self._job is not None and self._job.work_dir.parent == self._own_folder:
            shutil.rmtree(self._job.work_dir, ignore_errors=True)  # another actor of this node may do the same
        return log

    def _serve_once(self, job: Job, seat: Seat, deadline_s: float) -> Serving | Failure:
        port, began_s = free_port(seat.host), time.monotonic()
        job.work_dir.mkdir(parents=True, exist_ok=True)
        try:
            if isinstance(job, ReplicaJob):
                job.shared_dir.mkdir(parents=True, exist_ok=True)
                taken = self._memory_taken(job, seat, min(deadline_s - began_s, MEMORY_LIMIT_S))
                if taken is not None:
                    return Failure(reason=FailureReason.UNHEALTHY_NODE, detail=f"{job.name} was not started: {taken}")
            command, record = job.command(seat, port)
        except InvalidValueError as error:
            return Failure(reason=FailureReason.INVALID_FLAGS, detail=str(error))
        self._kills = kill_count()
        self._process = process = self._starter.submit(self._start, command, job.log, seat).result()
        url = f"http://{seat.host}:{port}"
        limit_s = deadline_s - time.monotonic()
        if not job.serves_http or wait_until_answers(process, url + command.ready_path, limit_s):
            self._watch_power(job, seat)
            return Serving(url=url, pid=process.pid, launched=record)
        if process.exit_code() is not None:
            return self._ended(process, job.backend, ready=False)
        reason = job.backend.classify(None, process.tail(), ready=False)
        within_s = max(0.0, deadline_s - began_s)
        detail = f"{job.name} did not answer {command.ready_path} within {within_s:.0f} s; raise start_s"
        return Failure(reason=reason, detail=detail, log_tail=process.tail())

    def _memory_taken(self, job: ReplicaJob, seat: Seat, limit_s: float) -> str | None:
        """What is still in use after `limit_s` of the memory that the replica is to have, None where it is free."""
        backend, given_up = job.backend, self._stopping.is_set
        if isinstance(backend, OwnDevices):
            return wait_until_free(partial(backend.device_memory, seat.node, seat.device_ids), limit_s, given_up)
        if seat.on_gpu:
            return wait_until_free(partial(gpu_memory, seat.device_ids), limit_s, given_up)
        if isinstance(backend, NeedsHostMemory):
            return wait_for_host_memory(backend.host_memory_bytes(job.spec(seat, 0)), limit_s, given_up)
        return None

    def _watch_power(self, job: Job, seat: Seat) -> None:
        """Read the power of the replica's own GPUs from now on; emulated ones have none."""
        if isinstance(job, ReplicaJob) and seat.on_gpu and not isinstance(job.backend, OwnDevices):
            self._power = PowerLog(read=partial(gpu_power_w, seat.device_ids))
            self._power.start()

    def _start(self, command: LaunchCommand, log: Path, seat: Seat) -> ManagedProcess:
        command.write_files()
        key = {} if seat.api_key is None else {API_KEY_VARIABLE: seat.api_key}
        env = {**command.env, **self._tags.environment(), **key}
        return ManagedProcess(argv=command.argv, env=env, log=log, cores=seat.cores)

    def _ended(self, process: ManagedProcess, backend: EngineBackend, *, ready: bool) -> Failure:
        code, tail = process.exit_code(), process.tail()
        when = "under load" if ready else "before it served"
        how = f"was ended by signal {-code}" if code is not None and code < 0 else f"exited with code {code}"
        said = log_tail(process.log, READ_LINES, READ_BYTES)
        reason, by = self._reason(backend, code, said, ready=ready)
        cause = telling_line(said)  # engines of several processes say much after the cause
        why = "" if cause is None or cause in tail else f": {cause.strip()}"
        return Failure(reason=reason, detail=f"{process.log.stem} {how} {when}{by}{why}", log_tail=tail)

    def _reason(self, backend: EngineBackend, code: int | None, tail: str, *, ready: bool) -> tuple[FailureReason, str]:
        """Class of an end and, for one by signal 9, who sent that as far as the kernel tells."""
        reason = backend.classify(code, tail, ready=ready)
        killed, for_memory = code == -signal.SIGKILL, killed_for_memory(self._kills)
        if for_memory and (killed or reason is FailureReason.ENGINE_CRASH):
            memory = FailureReason.OUT_OF_MEMORY_UNDER_LOAD if ready else FailureReason.OUT_OF_MEMORY_AT_BOOT
            return memory, f", {'' if killed else 'after a process was ended '}by the kernel for want of memory"
        if not killed or for_memory is None:
            return reason, ""
        said = backend.classify(1, tail, ready=ready)  # what its log says, whoever ended it then
        mute = said is FailureReason.ENGINE_CRASH
        return FailureReason.UNHEALTHY_NODE if mute else said, ", and not by the kernel for want of memory"


def node_facts(folder: Path) -> NodeFacts:
    """Facts of the node on which this actor runs; `folder` is one of the coordinator's."""
    import ray

    context = ray.get_runtime_context()
    return NodeFacts(
        node_id=context.get_node_id(),
        host=socket.gethostname(),
        machine=machine_id(),
        cores=usable_cores(),
        cpu_model=cpu_model(),
        gpu_models=gpu_models(),
        gpu_driver=gpu_driver(),
        gpu_ids=_gpu_numbers(context.get_accelerator_ids().get("GPU", ())),
        sees_folder=(folder / MARKER).exists(),
    )


def _gpu_numbers(ids: Sequence[str]) -> tuple[int, ...]:
    """Ray's ids of GPUs as numbers; raises `InvalidValueError` for UUIDs, as a raylet has them that was started so."""
    named = [gpu for gpu in ids if not gpu.isdigit()]
    if named:
        raise InvalidValueError(
            f"Ray calls a GPU of this node {named[0]!r}; start Ray there with CUDA_VISIBLE_DEVICES as numbers, or unset"
        )
    return tuple(int(gpu) for gpu in ids)


def _prepared(backend: EngineBackend, model: ModelSpec, directory: Path) -> ModelSpec:
    """`backend.prepare`, one replica of a node at a time: the first makes the files, the others find them."""
    import fcntl

    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return backend.prepare(model, directory)
