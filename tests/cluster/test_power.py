"""Power of GPUs: nvidia-smi's answers, and means over the time of a measurement."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.engines.emulated import EmulatedBackend
from cluster.engines.llamacpp import LlamaCppBackend
from cluster.power import PowerLog, gpu_power_w, parse_smi_power, total_power_w
from cluster.processes import ProcessId, Tags
from cluster.ray_actors import ProcessActor, ReplicaJob, Seat
from tests.studies.toy import small_space, toy_problem


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


def test_a_part_without_a_figure_leaves_none_for_the_whole() -> None:
    assert total_power_w([100.0, 250.0]) == 350.0
    assert total_power_w([100.0, None]) is None
    assert total_power_w([]) is None


def test_a_replica_on_gpus_logs_its_power_and_an_emulated_one_does_not(
    smi: Callable[..., None], tmp_path: Path
) -> None:
    smi("0, 300.0\\n1, 200.0\\n")
    seat = Seat(host="127.0.0.1", cores=(), device_ids=(0, 1), on_gpu=True)
    problem = toy_problem()
    job = ReplicaJob(
        name="mixed-0",
        backend=LlamaCppBackend(),
        trial="t",
        pool=small_space(problem).default().config.pools[0],
        index=0,
        model=problem.model,
        workload=problem.workload,
        model_dir=tmp_path,
        work_dir=tmp_path,
        shared_dir=tmp_path,
    )
    actor = ProcessActor(Tags(coordinator=ProcessId.of(os.getpid()), study="s", trial="t"))
    assert actor.power_w(60.0) is None
    actor._watch_power(replace(job, backend=EmulatedBackend()), seat)
    assert actor._power is None
    actor._watch_power(job, replace(seat, on_gpu=False))
    assert actor._power is None
    actor._watch_power(job, seat)
    deadline = time.monotonic() + 20
    while actor.power_w(60.0) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert actor.power_w(60.0) == 500.0
    actor.stop(1.0)
