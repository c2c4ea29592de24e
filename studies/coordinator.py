"""Who runs a study: a process that cannot be mistaken for another one, on this machine or elsewhere."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

CLOCK_STEP_S = 5.0
"""Start times of a process are derived from the wall clock, which may be stepped between two readings."""


@dataclass(frozen=True, kw_only=True)
class Coordinator:
    """The process that holds a lease.

    `id` is drawn anew for every lease. `machine` tells boots and containers apart, since their process numbers mean
    different things. `created` is the process's start, in seconds since the epoch.
    """

    id: str
    host: str
    machine: str
    pid: int
    created: float

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host}"

    @property
    def is_this_process(self) -> bool:
        """True where it is the process that asks."""
        return self.machine == this_machine() and self.pid == os.getpid() and self._is_same(psutil.Process())

    @property
    def is_gone(self) -> bool:
        """True where it certainly does not run any more; False for a process of another machine, and where unsure."""
        if self.machine != this_machine():
            return False
        try:
            process = psutil.Process(self.pid)
            return not self._is_same(process) or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    def _is_same(self, process: psutil.Process) -> bool:
        return abs(process.create_time() - self.created) < CLOCK_STEP_S


def this_coordinator(lease_id: str) -> Coordinator:
    """This process, as the holder of lease `lease_id`."""
    process = psutil.Process()
    return Coordinator(
        id=lease_id,
        host=socket.gethostname(),
        machine=this_machine(),
        pid=process.pid,
        created=process.create_time(),
    )


@cache
def this_machine() -> str:
    """This boot of this kernel and this namespace of processes; outside Linux the host's name."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    try:
        return f"{boot.read_text().strip()} {namespace.readlink()}"
    except OSError:
        return socket.gethostname()
