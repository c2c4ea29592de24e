"""Collectives between the GPUs of a node, timed with torch.distributed: one process for each GPU."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, Literal

from search_spaces.errors import TunerError

REPEATS, WARM_UPS = 20, 5
LIMIT_S = 600.0
CollectiveName = Literal["all_reduce", "all_gather", "reduce_scatter", "alltoall", "p2p"]
OPERATIONS: tuple[CollectiveName, ...] = ("all_reduce", "all_gather", "reduce_scatter", "alltoall")
"""Collectives under the tables' names; `p2p` is a message from rank 0 to rank 1."""


def measure_collective(
    operation: CollectiveName, ranks: int, elements: Sequence[int], backend: str = "nccl"
) -> list[float]:
    """Milliseconds of `operation` on each number of bfloat16 elements over `ranks` GPUs of this node.

    As in the public tables, elements are those of the larger side: of the gathered tensor, of the one that is reduced,
    of what a rank sends to all. They are rounded down to a multiple of the ranks. Raises `TunerError` where a process
    fails. `backend` gloo uses CPUs.
    """
    from cluster.processes import free_port

    host, port = "127.0.0.1", free_port("127.0.0.1")
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = os.environ | {"MASTER_ADDR": host, "MASTER_PORT": str(port), "PYTHONPATH": path}
    asked = [operation, backend, str(ranks), json.dumps(list(elements))]
    command = [sys.executable, "-m", "tuner.collect_collectives", *asked]
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
            raise TunerError(f"{operation} over {ranks} GPUs failed (code {process.returncode}): {last[0]}")
    return [float(value) for value in json.loads(ended[0][0])]


def run_rank(operation: CollectiveName, backend: str, ranks: int, elements: Sequence[int], rank: int) -> list[float]:
    """One process of the collective: median milliseconds for each number of elements."""
    torch = importlib.import_module("torch")
    dist = importlib.import_module("torch.distributed")
    on_gpu = backend == "nccl"
    device = f"cuda:{rank}" if on_gpu else "cpu"
    if on_gpu:
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, rank=rank, world_size=ranks)
    try:
        calls = [_call(torch, dist, operation, size, device) for size in elements]
        ways = 2.0 if operation == "p2p" else 1.0
        return [_one(torch, dist, call, on_gpu=on_gpu) / ways for call in calls]
    finally:
        dist.destroy_process_group()


def _call(torch: Any, dist: Any, operation: CollectiveName, elements: int, device: str) -> Callable[[], object]:
    """A call of `operation` whose larger side holds `elements` elements."""
    ranks = dist.get_world_size()
    share = max(elements // ranks, 1)

    def filled(size: int) -> Any:
        return torch.ones(size, dtype=torch.bfloat16, device=device)

    if operation == "all_reduce":
        data = filled(elements)
        return lambda: dist.all_reduce(data)
    if operation == "p2p":
        return _there_and_back(dist, filled(elements))
    whole, part = filled(share * ranks), filled(share)
    if operation == "all_gather":
        return lambda: dist.all_gather_into_tensor(whole, part)
    if operation == "reduce_scatter":
        return lambda: dist.reduce_scatter_tensor(part, whole)
    received = filled(share * ranks)
    return lambda: dist.all_to_all_single(received, whole)


def _there_and_back(dist: Any, data: Any) -> Callable[[], object]:
    """`data` from rank 0 to rank 1 and back again: the sender alone cannot tell when it has arrived."""
    rank = dist.get_rank()

    def call() -> None:
        for sender in (0, 1):
            if rank == sender:
                dist.send(data, 1 - rank)
            elif rank < 2:
                dist.recv(data, 1 - rank)

    return call


def _one(torch: Any, dist: Any, call: Callable[[], object], *, on_gpu: bool) -> float:
    """Median milliseconds of `call`, on this rank."""
    times: list[float] = []
    for _ in range(WARM_UPS + REPEATS):
        dist.barrier()
        _wait(torch, on_gpu=on_gpu)
        start = time.perf_counter()
        call()
        _wait(torch, on_gpu=on_gpu)
        times.append(1e3 * (time.perf_counter() - start))
    return median(times[WARM_UPS:])


def _wait(torch: Any, *, on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()


if __name__ == "__main__":
    _, name, library, count, sizes, own = sys.argv
    print(json.dumps(run_rank(name, library, int(count), json.loads(sizes), int(own))))  # type: ignore[arg-type]  # a
    # command line holds any word; `_call` takes an unknown one for alltoall and only this module starts it
