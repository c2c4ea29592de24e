"""A Ray cluster of one node that is started as an operator would, with token authentication, for commands to join."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.processes import free_port

START_LIMIT_S = 90.0
STOP_LIMIT_S = 30.0


@dataclass(frozen=True)
class RayHead:
    """`environment` is what a process needs to join at `address`; `folder` holds Ray's own logs."""

    address: str
    folder: Path
    environment: Mapping[str, str] = field(repr=False)


@contextmanager
def ray_head(folder: Path, token: str, cpus: int = 4, **more: object) -> Iterator[RayHead]:
    """A running head node; everything in it ends with the block. `folder` has a short path: Ray makes sockets there.

    `more` are options of `ray start`, with `_` for `-`.
    """
    port = free_port()
    clean = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment = {**clean, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "PYTHONPATH": str(Path.cwd())}
    options = {
        "--port": port,
        "--node-ip-address": "127.0.0.1",
        "--num-cpus": cpus,
        "--temp-dir": folder,
        "--include-dashboard": "false",
        **{f"--{key.replace('_', '-')}": value for key, value in more.items()},
    }
    argv = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    log = (folder / "head.log").open("wb")
    hasty = environment | {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}  # Ray's 30 s are for services with users
    with log:
        process = subprocess.Popen(
            [*argv, *(f"{key}={value}" for key, value in options.items())], stdout=log, stderr=log, env=hasty
        )
    try:
        _wait_until_listening(port, process, folder / "head.log")
        yield RayHead(address=f"127.0.0.1:{port}", folder=folder, environment=environment)
    finally:
        process.terminate()
        try:
            process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_LIMIT_S)


def _wait_until_listening(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while "Ray runtime started" not in log.read_text():
        assert process.poll() is None, f"ray start ended:\n{log.read_text()}"
        assert time.monotonic() < deadline, f"ray start takes longer than {START_LIMIT_S} s:\n{log.read_text()}"
        time.sleep(0.2)
    socket.create_connection(("127.0.0.1", port), timeout=5).close()
