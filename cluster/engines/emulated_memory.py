"""The memory of emulated GPUs: a ledger of files, which replicas fill and tests can fill too.

One file for each process and device, in a folder for each node. What a process that has ended held counts no more,
however it ended.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cluster.device_memory import DeviceMemory
from cluster.processes import ProcessId


def default_ledger() -> Path:
    """Where this user's emulated GPUs are booked on a machine."""
    return Path(tempfile.gettempdir()) / f"tuner-emulated-gpus-{os.getuid()}"


def hold(folder: Path, devices: Sequence[int], used_bytes: float) -> None:
    """Book `used_bytes` of each of `devices` for this process; `folder` is the node's, beside those of others.

    What dead processes have booked on nodes that are gone is removed on the way.
    """
    _prune(folder.parent)
    owner = ProcessId.of(os.getpid())
    booking = json.dumps({"owner": str(owner), "bytes": used_bytes})
    for device in devices:
        _write(folder, f"{device}.{owner.pid}", booking)


def _write(folder: Path, name: str, text: str) -> None:
    """Write a file as a whole; the folder may be pruned by another process until it holds one."""
    for last in (False, False, True):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            new = folder / f".{name}.new"
            new.write_text(text, encoding="utf-8")
            new.rename(folder / name)
        except FileNotFoundError:
            if last:
                raise
        else:
            return


def _prune(ledger: Path) -> None:
    """Remove the bookings of dead processes, and the folders of nodes that have none."""
    for folder in ledger.glob("*/"):
        for file in folder.glob("*.*"):
            device, _, _ = file.name.partition(".")
            if device.isdigit():
                _bookings(folder, int(device))
        with suppress(OSError):  # it is in use, or another process was first
            folder.rmdir()


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
