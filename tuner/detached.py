"""Giving a coordinator, of a study or of a campaign, to a Ray cluster that goes on when this command ends."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cluster.placement import check_pools
from cluster.ray_detached import DetachedProgram, Program, ProgramState, start_detached
from cluster.ray_session import connect
from search_spaces.errors import TunerError
from search_spaces.hardware import NodePool
from studies.lease import is_free, read_lease
from studies.redaction import redacted
from studies.storage import Storage
from tuner.places import DATA_VARIABLE, STORAGE_VARIABLE, Place
from tuner.remote import FOLLOW_S, Job
from tuner.session import LEASE_EXPIRY_VARIABLE, LEASE_WAIT_VARIABLE, lease_times

BEGIN_LIMIT_S = 180.0
LEASE_WAIT_S = 180.0
"""How long a coordinator that was restarted waits for the lease of the one before, which may have died elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """The `job` of a detached coordinator, and how it is begun.

    `arguments` are those of `tuner`, but for the address; `files` (text by absolute path) are written on its node, and
    `environment` may hold secrets. Each of `node_pools` holds pools that the cluster must have at the same time.
    """

    job: Job
    arguments: tuple[str, ...]
    node_pools: Sequence[Sequence[NodePool]]
    files: Mapping[str, str] = field(default_factory=dict, repr=False)
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)


def require_address(address: str | None) -> str:
    """`address`; raises `TunerError` where there is none."""
    if address is None:
        raise TunerError(
            "--detach needs a Ray cluster that goes on when this command ends; give its address with --address or "
            "RAY_ADDRESS (auto for the one that runs on this machine)"
        )
    return address


def detach(task: Task, place: Place, storage: Storage, address: str) -> None:
    """Run `task` on the Ray cluster at `address`, and return when its coordinator holds the lease there.

    The caller has looked whether the lease is free. Raises `TunerError` where the coordinator does not begin, and
    `PlacementError` where the cluster lacks a node pool.
    """
    with connect(address, ()) as cluster:
        for pools in task.node_pools:
            check_pools(pools, cluster.nodes())
        program = start_detached(_program(task, place, cluster.address), on_this_node=place.file is not None)
        print("Waiting for the coordinator ...", file=sys.stderr)
        state = _wait_until_begun(program, storage, task)
    _say_detached(task.job, place, state)


def _program(task: Task, place: Place, address: str) -> Program:
    mark = hashlib.sha256(place.absolute_url.encode()).hexdigest()[:8]
    return Program(
        name=f"coordinator of {task.job.lease} ({mark})",
        arguments=("-m", "tuner.cli", *task.arguments, "--address", address, "--no-progress"),
        log=str(place.coordinator(task.job.lease).with_suffix(".log")),
        files=task.files,
        environment={
            **task.environment,
            STORAGE_VARIABLE: place.absolute_url,
            DATA_VARIABLE: str(place.directory),
            LEASE_EXPIRY_VARIABLE: f"{lease_times().expiry_s:g}",
            LEASE_WAIT_VARIABLE: f"{LEASE_WAIT_S:g}",
        },
    )


def _wait_until_begun(program: DetachedProgram, storage: Storage, task: Task) -> ProgramState:
    """The program's state once it holds the task's lease, or has ended well before it was seen to."""
    coordinator = f"the coordinator of {task.job.kind} {task.job.name!r}"
    deadline = time.monotonic() + BEGIN_LIMIT_S
    while time.monotonic() < deadline:
        state = program.state()
        if state is None or state.exit_code not in (None, 0):
            tail = redacted(state.tail) if state else "its actor is gone; look at the cluster's nodes"
            raise TunerError(f"{coordinator} ended at once:\n{tail}")
        if state.exit_code == 0 or not is_free(read_lease(storage, task.job.lease)):
            return state
        time.sleep(FOLLOW_S)
    raise TunerError(f"{coordinator} did not begin within {BEGIN_LIMIT_S:g} s; look at its cluster")


def _say_detached(job: Job, place: Place, state: ProgramState) -> None:
    begun = "has ended" if state.exit_code == 0 else "runs"
    command = f"tuner {job.kind}"
    print(
        f"{job.kind.capitalize()} {job.name} {begun} detached: process {state.pid} on host {state.host}.\n"
        f"  its files         {place.directory} on that host\n"
        f"  how it stands     {command} status {job.name}\n"
        f"  what it does      {command} logs {job.name} -f\n"
        f"  end it            {command} stop {job.name}\n"
        "From any machine with the storage (TUNER_STORAGE or --storage)."
    )
