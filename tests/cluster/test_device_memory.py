from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from cluster.device_memory import GIB, DeviceMemory, gpu_memory, parse_smi, wait_for_host_memory, wait_until_free
from cluster.engines.emulated_memory import hold, in_use

HOLDER = """
import sys, time
from pathlib import Path
from cluster.engines.emulated_memory import hold
hold(Path(sys.argv[1]), [0, 1], 40e9)
print("held", flush=True)
time.sleep(60)
"""


def test_what_an_idle_device_shows_counts_as_free() -> None:
    assert DeviceMemory(device=0, total_bytes=80 * GIB, used_bytes=3.9 * GIB).is_free
    assert not DeviceMemory(device=0, total_bytes=80 * GIB, used_bytes=4.1 * GIB).is_free
    assert DeviceMemory(device=0, total_bytes=16 * GIB, used_bytes=1.4 * GIB).is_free


def test_a_device_that_gets_free_ends_the_wait() -> None:
    readings: Iterator[float] = iter([40.0, 40.0, 1.0])

    def read() -> tuple[DeviceMemory, ...]:
        return (DeviceMemory(device=3, total_bytes=80 * GIB, used_bytes=next(readings) * GIB, holders=(17,)),)

    assert wait_until_free(read, 10.0) is None
    assert next(readings, None) is None


def test_a_device_that_does_not_says_who_holds_what() -> None:
    taken = DeviceMemory(device=3, total_bytes=80 * GIB, used_bytes=40 * GIB, holders=(17,))
    free = DeviceMemory(device=4, total_bytes=80 * GIB, used_bytes=0.0)
    began = time.monotonic()
    assert wait_until_free(lambda: [taken, free], 0.3) == "device 3 has 40.0 of 80.0 GiB in use by process 17"
    assert 0.3 <= time.monotonic() - began < 30.0
    assert wait_until_free(lambda: [taken], 60.0, lambda: True) is None, "who gives up does not wait"


def test_lines_of_nvidia_smi() -> None:
    text = "0, 81559, 4\n1, 81559, 40960\n2, [N/A], [N/A]\n"
    assert parse_smi(text) == (
        DeviceMemory(device=0, total_bytes=81559 * 2**20, used_bytes=4 * 2**20),
        DeviceMemory(device=1, total_bytes=81559 * 2**20, used_bytes=40960 * 2**20),
    )


def test_no_devices_are_asked_for_nothing() -> None:
    assert gpu_memory(()) == ()


def test_host_memory_is_waited_for_unless_an_idle_host_would_not_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    total = psutil.virtual_memory().total
    assert wait_for_host_memory(1.0, 10.0) is None
    assert wait_for_host_memory(total * 2.0, 60.0) is None, "that is for the engine to refuse"
    full = SimpleNamespace(total=16 * GIB, available=2 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: full)
    said = wait_for_host_memory(4 * GIB, 0.3)
    assert said == "2.0 of 16.0 GiB of the host's memory are available, and the replica takes 4.0"
    assert wait_for_host_memory(14 * GIB, 60.0) is None, "nor has an idle host that much"
    monkeypatch.setattr(psutil, "virtual_memory", lambda: replace_available(full, 8 * GIB))
    assert wait_for_host_memory(4 * GIB, 60.0) is None


def replace_available(memory: SimpleNamespace, available: float) -> SimpleNamespace:
    return SimpleNamespace(total=memory.total, available=available)


def test_emulated_memory_is_held_by_processes_that_live(tmp_path: Path) -> None:
    node = tmp_path / "node"
    child = subprocess.Popen([sys.executable, "-c", HOLDER, str(node)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        hold(node, [1], 10e9)
        first, second, third = in_use(node, [0, 1, 10], 80e9)
        assert (first.used_bytes, first.holders) == (40e9, (child.pid,))
        assert (second.used_bytes, second.holders) == (50e9, tuple(sorted((child.pid, os.getpid()))))
        assert (third.used_bytes, third.holders) == (0, ())
    finally:
        child.kill()
        child.communicate()
    first, second = in_use(node, [0, 1], 80e9)
    assert (first.used_bytes, second.used_bytes) == (0, 10e9)
    assert [file.name for file in node.iterdir()] == [f"1.{os.getpid()}"]


def test_bookings_of_nodes_that_are_gone_do_not_pile_up(tmp_path: Path) -> None:
    child = subprocess.run(
        [sys.executable, "-c", HOLDER.replace("time.sleep(60)", ""), str(tmp_path / "old-node")], check=True
    )
    assert child.returncode == 0
    assert len(list((tmp_path / "old-node").iterdir())) == 2
    hold(tmp_path / "new-node", [0], 10e9)
    hold(tmp_path / "newer-node", [0], 10e9)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["new-node", "newer-node"]


@pytest.mark.parametrize("text", ["", "garbage", "a, b, c\n"])
def test_what_is_no_figure_is_left_out(text: str) -> None:
    assert parse_smi(text) == ()
