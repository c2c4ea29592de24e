"""What a node is: for the record of every measurement."""

from __future__ import annotations

import os
import platform
import re
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """`machine` is the same for all nodes on one kernel (they share cores); `gpu_ids` are those of the caller.

    `sees_folder` says whether the node shares the coordinator's work folder.
    """

    node_id: str
    host: str
    machine: str
    cores: tuple[int, ...]
    cpu_model: str
    gpu_models: tuple[str, ...] = ()
    gpu_driver: str = ""
    gpu_ids: tuple[int, ...] = ()
    sees_folder: bool = True
    python: str = platform.python_version()


def machine_id() -> str:
    """Identity of the running kernel: containers on one machine share it, and its cores."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text(encoding="ascii").strip() if boot.exists() else socket.gethostname()


def usable_cores() -> tuple[int, ...]:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def cpu_model() -> str:
    """Name of the processor as the kernel has it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def gpu_driver() -> str:
    """Version of the NVIDIA kernel driver as its file has it (`... Kernel Module  550.54.15  DATE`), empty for none."""
    path = Path("/proc/driver/nvidia/version")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = re.search(r"\b\d+\.\d+(?:\.\d+)?\b", text)
    return found.group() if found else ""


def gpu_models() -> tuple[str, ...]:
    """Names of the NVIDIA GPUs as their driver has them; empty where there is none."""
    files = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return tuple(line.partition(":")[2].strip() for line in lines if line.startswith("Model:"))
