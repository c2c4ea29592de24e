"""All-reduce between the GPUs of a node, timed with torch.distributed: one process for each GPU."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

from search_spaces.errors import TunerError

REPEATS, WARM_UPS = 20, 5
LIMIT_S = 600.0


def measure_all_reduce(ranks: int, elements: Sequence[int], backend: str = "nccl") -> list[float]:
    """Milliseconds of an all-reduce of each number of bfloat16 elements over `ranks` GPUs of this node.

    Raises `TunerError` where a process fails. `backend` gloo uses CPUs.
    """
    from cluster.processes import free_port

    host, port = "127.0.0.1", free_port("127.0.0.1")
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = os.environ | {"MASTER_ADDR": host, "MASTER_PORT": str(port), "PYTHONPATH": path}
    command = [sys.executable, "-m", "tuner.collect_collectives", backend, str(ranks), json.dumps(list(elements))]
    running = [
        subprocess.Popen(
            [*command, str(rank)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(ranks)
    ]
    try:
        ended = [process.communicate(timeout=LIMIT_S) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (_, errors) in zip(running, ended, strict=True):
        if process.returncode:
            last = errors.strip().splitlines()[-1:] or ["it said nothing"]
            raise TunerError(f"the all-reduce over {ranks} GPUs failed (code {process.returncode}): {last[0]}")
    return [float(value) for value in json.loads(ended[0][0])]


def run_rank(backend: str, ranks: int, elements: Sequence[int], rank: int) -> list[float]:
    """One process of the all-reduce: median milliseconds for each number of elements."""
    torch = importlib.import_module("torch")
    dist = importlib.import_module("torch.distributed")
    device = f"cuda:{rank}" if backend == "nccl" else "cpu"
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, rank=rank, world_size=ranks)
    try:
        return [_one(torch, dist, torch.ones(size, dtype=torch.bfloat16, device=device)) for size in elements]
    finally:
        dist.destroy_process_group()


def _one(torch: Any, dist: Any, data: Any) -> float:
    """Median milliseconds of an all-reduce of `data`."""
    times: list[float] = []
    for _ in range(WARM_UPS + REPEATS):
        dist.barrier()
        _wait(torch, data)
        start = time.perf_counter()
        dist.all_reduce(data)
        _wait(torch, data)
        times.append(1e3 * (time.perf_counter() - start))
        data.fill_(1)
    return median(times[WARM_UPS:])


def _wait(torch: Any, data: Any) -> None:
    if data.is_cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    print(json.dumps(run_rank(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4]))))
