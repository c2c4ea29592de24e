"""Processes that the cluster starts: tagged, logged to a file, bound to their parent, ended with all their children."""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil

TAG_STUDY, TAG_TRIAL = "TUNER_STUDY", "TUNER_TRIAL"
TAG_OWNER, TAG_COORDINATOR = "TUNER_OWNER", "TUNER_COORDINATOR"
TAIL_LINES, TAIL_BYTES = 40, 16_384
LOG_LIMIT_BYTES = 1_000_000
_LAUNCHER = Path(__file__).with_name("launch.py")
_PROBE_LIMIT_S = 1.0
_FOLDERS = "tuner-of-"


@dataclass(frozen=True, kw_only=True)
class ProcessId:
    """A process that cannot be mistaken for a later one: host, number and when it was created (seconds, rounded)."""

    host: str
    pid: int
    created_s: int

    @classmethod
    def of(cls, pid: int) -> ProcessId:
        """The identity of a live process; raises `psutil.NoSuchProcess`."""
        return cls(host=socket.gethostname(), pid=pid, created_s=round(psutil.Process(pid).create_time()))

    @classmethod
    def parse(cls, text: str) -> ProcessId | None:
        """The identity that `str` wrote, None where `text` is none."""
        host, _, numbers = text.partition("|")
        pid, _, created = numbers.partition("|")
        if not (host and pid.isdigit() and created.isdigit()):
            return None
        return cls(host=host, pid=int(pid), created_s=int(created))

    def __str__(self) -> str:
        return f"{self.host}|{self.pid}|{self.created_s}"

    @property
    def is_here(self) -> bool:
        """True where it is (or was) a process of this host."""
        return self.host == socket.gethostname()

    @property
    def is_alive(self) -> bool:
        """True where it still runs; only for a process of this host. A zombie does not run."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.created_s) < 2
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def node_folder(coordinator: ProcessId) -> Path:
    """Where the actors of `coordinator` keep files that are their node's alone."""
    return Path(tempfile.gettempdir()) / f"{_FOLDERS}{coordinator}".replace("|", "+")


def remove_left_folders() -> None:
    """Remove the folders on this host whose coordinators were processes of it and are gone."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDERS}*"):
        coordinator = ProcessId.parse(folder.name.removeprefix(_FOLDERS).replace("+", "|"))
        if coordinator is not None and coordinator.is_here and not coordinator.is_alive:
            shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, kw_only=True)
class Tags:
    """Whose process it is: the study, the trial that started it, and the coordinator (the driver's process)."""

    study: str
    trial: str
    coordinator: ProcessId

    def environment(self) -> dict[str, str]:
        """The tags as environment variables, with this process as the owner."""
        return {
            TAG_STUDY: self.study,
            TAG_TRIAL: self.trial,
            TAG_OWNER: str(ProcessId.of(os.getpid())),
            TAG_COORDINATOR: str(self.coordinator),
        }


class ManagedProcess:
    """A child process with its log.

    Start it from a thread that lives as long as it may run: the kernel ends it with that thread. It gets no session of
    its own: such a one outlives a Ray actor.
    """

    def __init__(self, *, argv: Sequence[str], env: Mapping[str, str], log: Path, cores: Sequence[int] = ()) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        pin = ["--cores", ",".join(map(str, cores))] if cores else []
        command = [sys.executable, "-I", "-S", str(_LAUNCHER), *pin, "--", *argv]
        with log.open("ab") as sink:
            self._child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, env={**os.environ, **env}
            )

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._child.pid

    def exit_code(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        return self._child.poll()

    def wait(self, limit_s: float) -> int | None:
        """Exit code, or None where it still runs after `limit_s`."""
        try:
            return self._child.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            return None

    def tail(self) -> str:
        """Last lines of the log."""
        return log_tail(self.log)

    def terminate(self, limit_s: float) -> None:
        """End the process and its descendants: SIGTERM, and SIGKILL for what is left after `limit_s`."""
        try:
            family = [psutil.Process(self.pid), *psutil.Process(self.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            family = []
        end_processes(family, limit_s)
        self.wait(limit_s)


def end_processes(processes: Sequence[psutil.Process], limit_s: float) -> list[psutil.Process]:
    """SIGTERM to all, SIGKILL to those left after `limit_s`; returns what still runs a second later."""
    for process in processes:
        _signal(process, force=False)
    _, left = psutil.wait_procs(processes, timeout=limit_s)
    for process in left:
        _signal(process, force=True)
    _, left = psutil.wait_procs(left, timeout=1.0)
    return list(left)


def _signal(process: psutil.Process, *, force: bool) -> None:
    try:
        if force:
            process.kill()
        else:
            process.terminate()
    except psutil.NoSuchProcess:
        return


def log_tail(log: Path, lines: int = TAIL_LINES, limit_bytes: int = TAIL_BYTES) -> str:
    """Last `lines` lines of a file, at most `limit_bytes`; empty where there is none."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - limit_bytes))
            data = file.read()
    except FileNotFoundError:
        return ""
    return "\n".join(data.decode(errors="replace").splitlines()[-lines:])


def end_of_log(log: Path, limit_bytes: int = LOG_LIMIT_BYTES) -> bytes:
    """The last `limit_bytes` of a file, with a line that says what is left out; empty where there is none."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - limit_bytes))
            data = file.read()
    except FileNotFoundError:
        return b""
    return data if size <= limit_bytes else f"[the first {size - limit_bytes} bytes are left out]\n".encode() + data


def free_port(host: str) -> int:
    """A port of `host` that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def answers(url: str) -> bool:
    """True where `url` (http) answers 200 within a second."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=_PROBE_LIMIT_S)
    try:
        connection.request("GET", parts.path or "/")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def wait_until_answers(process: ManagedProcess, url: str, limit_s: float) -> bool:
    """True when `url` answers 200; False where `process` ended or `limit_s` has passed before."""
    deadline_s = time.monotonic() + limit_s
    pause_s = 0.01
    while process.exit_code() is None and time.monotonic() < deadline_s:
        if answers(url):
            return True
        time.sleep(pause_s)
        pause_s = min(0.1, pause_s * 1.5)
    return False
