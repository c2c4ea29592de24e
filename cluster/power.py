"""Electric power of a replica's GPUs, read on their node while it is measured: by NVML, else by nvidia-smi.

What is read is what the board reports for the whole GPU, idle share and memory included; hosts, networks and cooling
are not in it. CPU pools have no figure: a package's counter cannot tell one replica's cores from another's.
"""

from __future__ import annotations

import csv
import importlib
import io
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

SAMPLE_S = 1.0
KEPT = 20_000
"""Samples that are kept: over five hours."""
_SMI_LIMIT_S = 20.0


def gpu_power_w(devices: Sequence[int]) -> float | None:
    """Watts that the GPUs `devices` draw now, summed; None where one of them cannot be read."""
    if not devices:
        return None
    by_nvml = _by_nvml(devices)
    return _by_smi(devices) if by_nvml is None else by_nvml


def _by_nvml(devices: Sequence[int]) -> float | None:
    try:
        nvml = importlib.import_module("pynvml")  # of the package nvidia-ml-py, where it is installed
        nvml.nvmlInit()
    except ImportError:
        return None
    except nvml.NVMLError:
        return None
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(device) for device in devices]
        return float(sum(nvml.nvmlDeviceGetPowerUsage(handle) for handle in handles)) / 1000.0  # milliwatts
    except nvml.NVMLError:
        return None
    finally:
        nvml.nvmlShutdown()


def _by_smi(devices: Sequence[int]) -> float | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=index,power.draw", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_SMI_LIMIT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    watts = parse_smi_power(done.stdout)
    return sum(watts[device] for device in devices) if all(device in watts for device in devices) else None


def parse_smi_power(text: str) -> dict[int, float]:
    """Watts by GPU from lines of `index, watts`; GPUs that report none are left out."""
    found: dict[int, float] = {}
    for row in csv.reader(io.StringIO(text)):
        cells = [cell.strip() for cell in row]
        if len(cells) == 2 and cells[0].isdigit():
            try:
                found[int(cells[0])] = float(cells[1])
            except ValueError:
                continue
    return found


def total_power_w(watts: Sequence[float | None]) -> float | None:
    """The sum; None where one is not known, since a part says nothing of the whole."""
    known = [value for value in watts if value is not None]
    return sum(known) if known and len(known) == len(watts) else None


@dataclass
class PowerLog:
    """Samples `read` in a thread of its own until it is closed; a reading of None ends the log without a figure."""

    read: Callable[[], float | None]
    period_s: float = SAMPLE_S
    clock: Callable[[], float] = time.monotonic
    _samples: list[tuple[float, float]] = field(default_factory=list)
    _ended: threading.Event = field(default_factory=threading.Event)
    _blind: bool = False
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to sample; nothing happens where it samples already."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="power-log", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(self.period_s + _SMI_LIMIT_S)

    def mean_w(self, window_s: float) -> float | None:
        """Mean over the last `window_s` seconds; None where nothing was read in them, or a reading failed."""
        since = self.clock() - window_s
        inside = [watts for at, watts in self._samples if at >= since]
        return sum(inside) / len(inside) if inside and not self._blind else None

    def _run(self) -> None:
        while not self._ended.is_set():
            watts = self.read()
            if watts is None:
                self._blind = True
                return
            self._samples.append((self.clock(), watts))
            del self._samples[:-KEPT]
            self._ended.wait(self.period_s)
