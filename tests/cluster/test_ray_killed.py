"""However a driver ends, its engines end with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import ray

from cluster.janitor import tagged_processes
from cluster.ray_session import RayCluster
from tests.support.processes import is_alive

pytestmark = [pytest.mark.ray, pytest.mark.engine, pytest.mark.long]

ROOT = Path(__file__).parents[2]
GONE_LIMIT_S = 10.0


@contextmanager
def driver(address: str, study: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A driver whose deployment is under load; it, and what it left, are ended with the test."""
    command = [sys.executable, str(ROOT / "tests/support/ray_driver.py"), address, study, str(folder)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (folder / "driver.log").open("wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, process_group=0)
    try:
        deadline = time.monotonic() + 120.0
        while not (folder / "pids").exists():
            text = (folder / "driver.log").read_text()
            assert process.poll() is None, text
            assert time.monotonic() < deadline, text
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.wait()
        for left in tagged_processes(study):
            psutil.Process(left.pid).kill()


def own_study(name: str) -> str:
    """A study of this test session only: others may run on the same machine."""
    return f"{name}-{os.getpid()}"


def replica_pids(folder: Path) -> list[int]:
    return list(json.loads((folder / "pids").read_text()).values())


def wait_until_none_left(study: str, pids: list[int]) -> float:
    """Seconds until no process of the study is left; fails after ten."""
    began = time.monotonic()
    while tagged_processes(study) or any(map(is_alive, pids)):
        assert time.monotonic() - began < GONE_LIMIT_S, tagged_processes(study)
        time.sleep(0.05)
    return time.monotonic() - began


def wait_until_free(cpus: float) -> None:
    began = time.monotonic()
    while ray.available_resources().get("CPU", 0.0) < cpus:
        assert time.monotonic() - began < GONE_LIMIT_S, ray.available_resources()
        time.sleep(0.1)


def test_a_killed_driver_of_a_joined_cluster_leaves_nothing(ray_cluster: RayCluster, tmp_path: Path) -> None:
    study, cpus = own_study("killed-joined"), ray.cluster_resources()["CPU"]
    wait_until_free(cpus)
    with driver(ray_cluster.address, study, tmp_path) as process:
        pids = replica_pids(tmp_path)
        assert all(map(is_alive, pids))
        assert len(pids) == 3
        assert {p.pid for p in tagged_processes(study)} >= set(pids)
        process.kill()
        wait_until_none_left(study, pids)
        wait_until_free(cpus)


def test_ctrl_c_in_a_terminal_stops_cleanly(tmp_path: Path) -> None:
    study = own_study("interrupted")
    with driver("local", study, tmp_path) as process:
        pids = replica_pids(tmp_path)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: Ray and the engines get it too
        assert process.wait(20.0) == 0, (tmp_path / "driver.log").read_text()
        assert (tmp_path / "closed").exists()
        wait_until_none_left(study, pids)
        assert [path.name for path in tmp_path.glob("*-1")] == [], "the deployment's folder goes with it"


def test_a_killed_driver_that_started_ray_leaves_nothing(tmp_path: Path) -> None:
    study = own_study("killed-local")
    with driver("local", study, tmp_path) as process:
        pids = replica_pids(tmp_path)
        family = [p for p in psutil.Process(process.pid).children(recursive=True) if "Agent" not in p.name()]
        assert len(family) > len(pids)
        process.kill()
        wait_until_none_left(study, pids)
        # Ray's own agents, left out above, look for their head for a minute before they end
        _, left = psutil.wait_procs(family, timeout=GONE_LIMIT_S)
        assert [p for p in left if is_alive(p.pid)] == []
