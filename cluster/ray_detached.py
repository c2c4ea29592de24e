"""A program that runs on the cluster and outlives the process that asked for it: a coordinator without a terminal.

A detached Ray actor without reserved resources starts it as a child and restarts it where it is killed; Ray restarts
the actor where its node dies. Ray's own job server would do the first half. It is part of `ray[default]` alone, wants a
shell line, and shows a job's environment, with whatever secrets it holds, to everybody who can see the dashboard; what
an actor is made with is shown nowhere.
"""

from __future__ import annotations

import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.processes import ManagedProcess
from cluster.ray_session import ClusterError

NAMESPACE = "tuner"
RESTARTS = 3
LINGER_S = 30.0
"""How long the actor of an ended program can still be asked for its end."""
ANSWER_LIMIT_S = 60.0
STOP_LIMIT_S = 30.0
_HEAD = "node:__internal_head__"
_ENDED_ON_REQUEST = (-signal.SIGTERM, -signal.SIGINT)
TRY_AGAIN = 75
"""Exit code of a program that asks to be started again later: EX_TEMPFAIL of <sysexits.h>."""
PAUSES_S = (10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 600.0, 600.0)


@dataclass(frozen=True, kw_only=True)
class Program:
    """A Python program: `arguments` follow the interpreter's name.

    `files` (text by absolute path) are written before it starts; `environment` may hold secrets. `name` is the same for
    programs of which one may run. `pauses_s` says how often it is restarted, and how long after a code `TRY_AGAIN`.
    """

    name: str
    arguments: tuple[str, ...]
    log: str
    pauses_s: tuple[float, ...] = PAUSES_S
    files: Mapping[str, str] = field(default_factory=dict, repr=False)
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, kw_only=True)
class ProgramState:
    """Where a program runs; `exit_code` is None while it does, and `tail` the end of its log."""

    host: str
    pid: int
    exit_code: int | None
    tail: str


class ProgramHost:
    """The actor. Its constructor starts the program, so that a restarted actor does so too."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._process: ManagedProcess | None = None
        self._started = threading.Event()
        self._exit_code: int | None = None
        for path, text in program.files.items():
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(text, encoding="utf-8")
        threading.Thread(target=self._run, daemon=True).start()  # the child dies with the thread that starts it

    def state(self) -> ProgramState:
        """What has become of the program."""
        self._started.wait(ANSWER_LIMIT_S)
        process = self._process
        return ProgramState(
            host=socket.gethostname(),
            pid=process.pid if process else 0,
            exit_code=self._exit_code,
            tail=process.tail() if process else "",
        )

    def _run(self) -> None:
        """Start the program, again where it was killed, and leave the cluster some time after its end."""
        import ray

        for pause_s in (*self._program.pauses_s, None):
            self._process = self._start()
            self._started.set()
            while (code := self._process.wait(60.0)) is None:
                continue
            killed = code < 0 and code not in _ENDED_ON_REQUEST
            if pause_s is None or not (killed or code == TRY_AGAIN):
                break
            time.sleep(pause_s if code == TRY_AGAIN else 0.0)
        self._exit_code = code
        time.sleep(LINGER_S)
        myself: Any = ray.get_runtime_context().current_actor
        ray.kill(myself, no_restart=True)

    def _start(self) -> ManagedProcess:
        program = self._program
        argv = [sys.executable, *program.arguments]
        return ManagedProcess(argv=argv, env=program.environment, log=Path(program.log))


@dataclass(frozen=True, kw_only=True)
class DetachedProgram:
    """A program that was started on the cluster."""

    name: str

    def state(self) -> ProgramState | None:
        """What has become of it; None where the cluster knows nothing of it any more."""
        import ray

        try:
            actor: Any = ray.get_actor(self.name, namespace=NAMESPACE)
            state: ProgramState = ray.get(actor.state.remote(), timeout=ANSWER_LIMIT_S)
        except (ValueError, ray.exceptions.RayActorError):
            return None
        except ray.exceptions.GetTimeoutError as error:
            raise ClusterError(f"the actor {self.name!r} did not answer within {ANSWER_LIMIT_S:g} s") from error
        return state


def start_detached(program: Program, *, on_this_node: bool) -> DetachedProgram:
    """Start `program` on the node of this process, or on the head node, which lives as long as the cluster.

    This process is connected to the cluster (see `cluster.ray_session.connect`). The caller makes sure that no program
    of that name runs: what is left of an ended one is removed.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    _remove(program.name)
    node = ray.get_runtime_context().get_node_id() if on_this_node else _head_node()
    actor: Any = ray.remote(ProgramHost)
    actor.options(
        name=program.name,
        namespace=NAMESPACE,
        lifetime="detached",
        num_cpus=0,
        max_restarts=RESTARTS,
        max_concurrency=2,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=not on_this_node),
    ).remote(program)
    return DetachedProgram(name=program.name)


def _remove(name: str) -> None:
    """End an actor of that name and wait until the name is free."""
    import ray

    deadline = time.monotonic() + STOP_LIMIT_S
    while True:
        try:
            ray.kill(ray.get_actor(name, namespace=NAMESPACE), no_restart=True)
        except ValueError:
            return
        if time.monotonic() > deadline:
            raise ClusterError(
                f"the actor {name!r} does not end within {STOP_LIMIT_S:g} s; look at the cluster's nodes"
            )
        time.sleep(0.2)


def _head_node() -> str:
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]  # ray leaves it without types
    heads = [node["NodeID"] for node in nodes if node["Alive"] and _HEAD in node["Resources"]]
    return str(heads[0]) if heads else str(ray.get_runtime_context().get_node_id())
