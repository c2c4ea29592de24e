"""Measures what one core of this node can do, in a few seconds, with numpy alone.

`measure_node` runs the measurement in a process of its own with one BLAS thread, so that the figures are those of one
core whatever the caller's settings are. Every figure is the best of several repeats: what the core can do undisturbed.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from search_spaces.errors import TunerError
from search_spaces.hardware import Device, DeviceKind

FORMAT = 1
_ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def measure_figures(*, seconds: float = 0.4, megabytes: int = 64) -> dict[str, float]:
    """Plain figures of one core: FLOP/s, memory, file and loopback bandwidth in bytes/s, total memory in bytes, cores.

    `seconds` is spent on each figure; buffers hold `megabytes`. Call it with one BLAS thread (see `measure_node`).
    """
    return {
        "format": float(FORMAT),
        "fp32_flops": _gemm_flops(seconds),
        "memory_bandwidth": _read_bandwidth(seconds, megabytes << 20),
        "file_bandwidth": _file_bandwidth(megabytes << 20),
        "loopback_bandwidth": _loopback_bandwidth(megabytes << 20),
        "memory_bytes": float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        "cores": float(os.cpu_count() or 1),
    }


def measure_node(*, seconds: float = 0.4, megabytes: int = 64, timeout_s: float = 120.0) -> dict[str, float]:
    """`measure_figures` in a fresh process with one BLAS thread; raises `TunerError` when that process fails."""
    command = [sys.executable, "-m", "perf_model.microbench", str(seconds), str(megabytes)]
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = os.environ | _ONE_THREAD | {"PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment, check=False)
    if done.returncode != 0:
        raise TunerError(f"the micro-benchmark of this node failed with code {done.returncode}: {done.stderr[-500:]}")
    figures = json.loads(done.stdout)
    return {str(name): float(value) for name, value in figures.items()}


def device_from_figures(figures: dict[str, float], *, name: str = "cpu-core") -> Device:
    """One core of the measured node as a `Device`; memory is an equal share of the node's."""
    return Device(
        name=name,
        kind=DeviceKind.CPU,
        memory_bytes=figures["memory_bytes"] / figures["cores"],
        memory_bandwidth=figures["memory_bandwidth"],
        flops={"fp32": figures["fp32_flops"]},
        link_bandwidth=figures["file_bandwidth"],
        network_bandwidth=figures["loopback_bandwidth"],
    )


def measure_device(*, name: str = "cpu-core", seconds: float = 0.4) -> Device:
    """One core of this node, measured now."""
    return device_from_figures(measure_node(seconds=seconds), name=name)


def _best_s(work: Callable[[], object], seconds: float) -> float:
    """Shortest duration of `work` among repeats that take about `seconds`, at least 3."""
    best, spent, repeats = float("inf"), 0.0, 0
    while repeats < 3 or spent < seconds:
        start = time.perf_counter()
        work()
        took = time.perf_counter() - start
        best, spent, repeats = min(best, took), spent + took, repeats + 1
    return best


def _gemm_flops(seconds: float) -> float:
    rows, inner, columns = 256, 1024, 1024
    left = np.random.default_rng(0).random((rows, inner), dtype=np.float32)
    right = np.random.default_rng(1).random((inner, columns), dtype=np.float32)
    return 2.0 * rows * inner * columns / _best_s(lambda: left @ right, seconds)


def _read_bandwidth(seconds: float, size: int) -> float:
    """Bytes/s of reading a matrix larger than the caches, as decoding reads its weights."""
    matrix = np.ones((size // 4096, 1024), dtype=np.float32)
    vector = np.ones(1024, dtype=np.float32)
    return matrix.nbytes / _best_s(lambda: matrix @ vector, seconds)


def _file_bandwidth(size: int) -> float:
    """Bytes/s of writing a file and reading it again: how a KV cache goes from one process to another on a node."""
    data = bytes(size)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "blob"

        def hand_over() -> None:
            path.write_bytes(data)
            path.read_bytes()

        return size / _best_s(hand_over, 0.0)


def _loopback_bandwidth(size: int) -> float:
    """Bytes/s of a TCP stream to a thread of this process over 127.0.0.1."""
    data = bytes(size)
    with socket.create_server(("127.0.0.1", 0)) as server:
        start = time.perf_counter()
        reader = threading.Thread(target=_drain, args=(server,), daemon=True)
        reader.start()
        with socket.create_connection(server.getsockname()) as client:
            client.sendall(data)
        reader.join(timeout=60)
        return size / (time.perf_counter() - start)


def _drain(server: socket.socket) -> None:
    connection, _ = server.accept()
    with connection:
        while connection.recv(1 << 20):
            pass


if __name__ == "__main__":
    json.dump(measure_figures(seconds=float(sys.argv[1]), megabytes=int(sys.argv[2])), sys.stdout)
