"""Replicas that end badly: of memory, by a signal of their own, leaving a child behind."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path

from cluster.engines.base import LaunchCommand, ReplicaSpec
from cluster.engines.llamacpp import LlamaCppBackend
from cluster.processes import ProcessId, Tags
from cluster.ray_actors import MARKER, ProcessActor, ReplicaJob, Seat
from search_spaces.model import ModelSpec
from search_spaces.outcome import Failure
from search_spaces.serving import Pool, Role
from tests.support.ray_problem import PROBLEM

HELD = "held = [bytearray(2**24) for _ in range(200)]"
PROGRAMS = {
    "hog": f"print('loading', flush=True); {HELD}",
    "child": "import subprocess, sys; print('loading', flush=True); "
    f"subprocess.run([sys.executable, '-c', {HELD!r}]); sys.exit(1)",
    "parent": "import subprocess, sys; "
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True); "
    "print('child', child.pid, flush=True); import os; os._exit(3)",
    "suicide": "print('loading', flush=True); import os; os.kill(os.getpid(), 9)",
}


class Hog(LlamaCppBackend):
    """llama.cpp's backend, whose replicas run `program` instead."""

    def __init__(self, program: str) -> None:
        self._program = program

    def prepare(self, model: ModelSpec, directory: Path) -> ModelSpec:
        del directory
        return model

    def replica_command(self, replica: ReplicaSpec) -> LaunchCommand:
        del replica
        return LaunchCommand(argv=(sys.executable, "-c", PROGRAMS[self._program]))


def outcome(folder: Path, program: str) -> dict[str, object]:
    """What the actor of a replica says of it."""
    return asdict(served(make_actor(), folder, program))


def make_actor() -> ProcessActor:
    """The actor of a replica, as a plain object."""
    return ProcessActor(Tags(study=f"hog-{os.getpid()}", trial="t", coordinator=ProcessId.of(os.getpid())))


def served(actor: ProcessActor, folder: Path, program: str) -> Failure:
    """How a replica ends that runs `program`."""
    (folder / MARKER).touch()
    job = ReplicaJob(
        backend=Hog(program),
        name="mixed-0",
        trial="t",
        pool=Pool(role=Role.MIXED, node_pool="here"),
        index=0,
        model=PROBLEM.model,
        workload=PROBLEM.workload,
        model_dir=folder,
        work_dir=folder,
        shared_dir=folder / "shared",
    )
    found = actor.serve(job, Seat(host="127.0.0.1", cores=()), 30.0)
    assert isinstance(found, Failure)
    return found
