"""Power of GPUs: nvidia-smi's answers, and means over the time of a measurement."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.power import PowerLog, gpu_power_w, parse_smi_power


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a program called nvidia-smi on the path that prints a text; NVML is not there."""
    monkeypatch.setitem(sys.modules, "pynvml", None)

    def install(text: str, code: int = 0) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\ncase \"$1\" in *power.draw*) printf '{text}';; *) exit 3;; esac\nexit {code}\n")
        program.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    return install


def test_the_gpus_of_a_replica_are_summed(smi: Callable[..., None]) -> None:
    smi("0, 98.50\\n1, 412.25\\n2, 400.75\\n")
    assert gpu_power_w([1, 2]) == pytest.approx(813.0)
    assert gpu_power_w([]) is None
    assert gpu_power_w([1, 7]) is None, "a GPU without a figure leaves no figure for the whole"


def test_a_program_that_fails_or_says_nothing_gives_none(
    smi: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    smi("0, 98.50\\n", code=9)
    assert gpu_power_w([0]) is None
    monkeypatch.setenv("PATH", "/nowhere")
    assert gpu_power_w([0]) is None


def test_gpus_that_report_no_power_are_left_out() -> None:
    assert parse_smi_power("0, [N/A]\n1, 70.1\nno devices were found\n") == {1: 70.1}


def test_the_mean_is_that_of_the_window() -> None:
    now = [0.0]
    readings = iter([100.0, 200.0, 300.0, 400.0])
    log = PowerLog(read=lambda: next(readings), period_s=0.0, clock=lambda: now[0])
    for at in (0.0, 10.0, 20.0, 30.0):  # sampled by hand: the thread is not started
        now[0] = at
        log._samples.append((at, log.read() or 0.0))
    assert log.mean_w(15.0) == pytest.approx(350.0)
    assert log.mean_w(100.0) == pytest.approx(250.0)
    now[0] = 1000.0
    assert log.mean_w(1.0) is None


def test_a_log_samples_until_it_is_closed_and_one_that_cannot_read_has_no_figure() -> None:
    log = PowerLog(read=lambda: 50.0, period_s=0.01)
    log.start()
    deadline = time.monotonic() + 10
    while log.mean_w(60.0) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert log.mean_w(60.0) == 50.0
    log.close()
    assert log._thread is not None
    assert not log._thread.is_alive()
    blind = PowerLog(read=lambda: None, period_s=0.01)
    blind.start()
    blind.close()
    assert blind.mean_w(60.0) is None
