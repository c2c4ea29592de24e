"""Is the memory of a device really free? Read on the node, from the driver or the kernel, before a replica starts.

A process that was killed may hold its memory for seconds, and what other programs hold Ray does not know.
"""

from __future__ import annotations

import csv
import importlib
import io
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import psutil

GIB = 2.0**30
FREE_SHARE = 0.05
"""Share of a GPU's memory that drivers and idle contexts take: up to that it counts as free."""
FREE_BYTES = 1.5 * GIB
"""The same for small GPUs, in bytes."""
IDLE_SHARE = 0.7
"""Share of its memory that a host surely has available when nothing else runs on it."""
PAUSE_S = 0.25
_SMI_LIMIT_S = 20.0


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """Memory of one device (`device` as the node numbers it). `holders` are process ids, as far as they are known."""

    device: int
    total_bytes: float
    used_bytes: float
    holders: tuple[int, ...] = ()

    @property
    def is_free(self) -> bool:
        """True where no more is in use than an idle device shows."""
        return self.used_bytes <= max(FREE_SHARE * self.total_bytes, FREE_BYTES)

    def __str__(self) -> str:
        by = f" by process {', '.join(map(str, self.holders))}" if self.holders else ""
        return f"device {self.device} has {self.used_bytes / GIB:.1f} of {self.total_bytes / GIB:.1f} GiB in use{by}"


def wait_until_free(
    read: Callable[[], Sequence[DeviceMemory]], limit_s: float, given_up: Callable[[], bool] = lambda: False
) -> str | None:
    """None as soon as all devices that `read` gives are free; what is in use where that takes over `limit_s`."""
    deadline_s = time.monotonic() + limit_s
    while True:
        taken = [memory for memory in read() if not memory.is_free]
        if not taken or given_up():
            return None
        if time.monotonic() >= deadline_s:
            return "; ".join(map(str, taken))
        time.sleep(PAUSE_S)


def wait_for_host_memory(
    needed_bytes: float, limit_s: float, given_up: Callable[[], bool] = lambda: False
) -> str | None:
    """None when the host has `needed_bytes` available; what it has where that takes over `limit_s`.

    A need beyond what an idle host has is for the engine to refuse: nothing is waited for.
    """
    deadline_s = time.monotonic() + limit_s
    while True:
        memory = psutil.virtual_memory()
        if not memory.available < needed_bytes <= IDLE_SHARE * memory.total or given_up():
            return None
        if time.monotonic() >= deadline_s:
            return (
                f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB of the host's memory are available, "
                f"and the replica takes {needed_bytes / GIB:.1f}"
            )
        time.sleep(PAUSE_S)


def gpu_memory(devices: Sequence[int]) -> tuple[DeviceMemory, ...]:
    """Memory of NVIDIA GPUs by NVML, else by nvidia-smi; empty where neither can be asked."""
    if not devices:
        return ()
    by_nvml = _by_nvml(devices)
    return _by_smi(devices) if by_nvml is None else by_nvml


def _by_nvml(devices: Sequence[int]) -> tuple[DeviceMemory, ...] | None:
    try:
        nvml = importlib.import_module("pynvml")  # of the package nvidia-ml-py, where it is installed
        nvml.nvmlInit()
    except ImportError:
        return None
    except nvml.NVMLError:
        return None
    try:
        return tuple(_nvml_device(nvml, device) for device in devices)
    except nvml.NVMLError:
        return None
    finally:
        nvml.nvmlShutdown()


def _nvml_device(nvml: ModuleType, device: int) -> DeviceMemory:
    handle = nvml.nvmlDeviceGetHandleByIndex(device)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    holders = tuple(process.pid for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle))
    return DeviceMemory(device=device, total_bytes=memory.total, used_bytes=memory.used, holders=holders)


def _by_smi(devices: Sequence[int]) -> tuple[DeviceMemory, ...]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    query = [program, "--query-gpu=index,memory.total,memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_SMI_LIMIT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(memory for memory in parse_smi(done.stdout) if memory.device in devices)


def parse_smi(text: str) -> tuple[DeviceMemory, ...]:
    """Memory of all GPUs from lines of `index, total MiB, used MiB`; those without figures are left out."""
    rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(text))]
    return tuple(
        DeviceMemory(device=int(row[0]), total_bytes=float(row[1]) * 2**20, used_bytes=float(row[2]) * 2**20)
        for row in rows
        if len(row) == 3 and all(cell.isdigit() for cell in row)
    )
