"""Processes that a test starts and owns: each is ended with the test, whatever becomes of it."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

STOP_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Child:
    """A running process and the file that holds what it writes to stdout and stderr."""

    process: subprocess.Popen[bytes]
    log_path: Path

    @property
    def log(self) -> str:
        """Everything that it has written so far."""
        return self.log_path.read_text(errors="replace")

    def wait(self, timeout_s: float = 20.0) -> int:
        """Its exit code; raises `subprocess.TimeoutExpired` where it goes on."""
        return self.process.wait(timeout_s)


@contextmanager
def child(argv: Sequence[str], log_path: Path, env: Mapping[str, str] | None = None) -> Iterator[Child]:
    """The running process `argv` with `env` on top of this one's; terminated, then killed, at the end."""
    with log_path.open("wb") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT, env=os.environ | dict(env or {}))
    try:
        yield Child(process, log_path)
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End `process` and wait for it."""
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(STOP_TIMEOUT_S)


def free_port() -> int:
    """A port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_healthy(url: str, owner: Child, timeout_s: float = 30.0) -> None:
    """Return when `url`/health answers 200; fail with the log of `owner` where it ends or takes longer."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        assert owner.process.poll() is None, f"{url} ended with {owner.process.returncode}:\n{owner.log}"
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):  # noqa: S310 - a server of the test's own
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.02)
    raise AssertionError(f"{url} was not healthy within {timeout_s} s:\n{owner.log}")


def is_alive(pid: int) -> bool:
    """True where a process `pid` runs (a zombie does not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_until_gone(pid: int, timeout_s: float) -> float:
    """Seconds until process `pid` has ended; fails where that takes longer than `timeout_s`."""
    started = time.monotonic()
    while is_alive(pid):
        assert time.monotonic() - started < timeout_s, f"process {pid} is still alive after {timeout_s} s"
        time.sleep(0.01)
    return time.monotonic() - started
