"""The memory of emulated GPUs: a ledger of files, which replicas fill and tests can fill too.

One file for each process and device, in a folder for each node. What a process that has ended held counts no more,
however it ended.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cluster.device_memory import DeviceMemory
from cluster.processes import ProcessId


def default_ledger() -> Path:
    """Where this user's emulated GPUs are booked on a machine."""
    return Path(tempfile.gettempdir()) / f"tuner-emulated-gpus-{os.getuid()}"


def hold(folder: Path, devices: Sequence[int], used_bytes: float) -> None:
    """Book `used_bytes` of each of `devices` for this process; `folder` is the node's."""
    folder.mkdir(parents=True, exist_ok=True)
    owner = ProcessId.of(os.getpid())
    for device in devices:
        new = folder / f".{device}.{owner.pid}.new"
        new.write_text(json.dumps({"owner": str(owner), "bytes": used_bytes}), encoding="utf-8")
        new.rename(folder / f"{device}.{owner.pid}")


def in_use(folder: Path, devices: Sequence[int], total_bytes: float) -> tuple[DeviceMemory, ...]:
    """Memory of `devices` of `total_bytes` each, by the bookings of processes that live; others are removed."""
    booked = {device: _bookings(folder, device) for device in devices}
    return tuple(
        DeviceMemory(
            device=device,
            total_bytes=total_bytes,
            used_bytes=sum(held.values()),
            holders=tuple(sorted(held)),
        )
        for device, held in booked.items()
    )


def _bookings(folder: Path, device: int) -> dict[int, float]:
    """Bytes by the process that holds them."""
    held = {}
    for file in folder.glob(f"{device}.*"):
        try:
            booking = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:  # another reader has removed it
            continue
        owner = ProcessId.parse(booking["owner"])
        if owner is not None and owner.is_alive:
            held[owner.pid] = float(booking["bytes"])
        else:
            file.unlink(missing_ok=True)
    return held
