"""The example of emulated nodes, by the real command: three GPU types on this machine, marked wherever it shows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.ray, pytest.mark.engine, pytest.mark.long, pytest.mark.timeout(420)]

EXAMPLE = Path(__file__).parents[2] / "examples" / "emulated-70b.yaml"
TUNER = [sys.executable, "-m", "tuner.cli"]
SHORT = (
    "workload.isl=128",
    "workload.osl=16",
    "workload.concurrency=[4]",
    "measurement.requests=12",
    "measurement.lateness_limit_ms=5000",
    "emulation.faults={}",
    "budget.trials=3",
)
OPTIONS = [word for override in SHORT for word in ("--set", override)]


def tuner(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*TUNER, *words], cwd=folder, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """Folder, name and messages of a study of three trials."""
    folder, name = tmp_path_factory.mktemp("emulated-study"), f"emulated-{uuid.uuid4().hex[:8]}"
    done = tuner(folder, "study", "run", str(EXAMPLE), "--no-progress", "--set", f"name={name}", *OPTIONS)
    assert done.returncode == 0, done.stderr
    return folder, name, done.stdout + done.stderr


def shown(study: tuple[Path, str, str]) -> Any:
    folder, name, _ = study
    return json.loads(tuner(folder, "study", "show", name, "--json").stdout)


def test_every_trial_is_measured_and_marked(study: tuple[Path, str, str]) -> None:
    found = shown(study)
    assert found["counts"]["measured"] == 3, found
    assert found["emulated"] is True
    for trial in found["trials"]:
        assert trial["emulated"] is True
        assert trial["environment"]["engine_version"].startswith("EMULATED")
        assert trial["client_lateness_ms"] is not None


def test_the_front_was_confirmed_on_warm_deployments(study: tuple[Path, str, str]) -> None:
    """Three runs of each member, in orders of arrival of their own; the second run of a deployment needs no start."""
    folder, name, said = study
    front = json.loads(tuner(folder, "study", "pareto", name, "--json").stdout)["front"]
    assert front
    assert all(len(member["runs"]) == 3 for member in front)
    assert all(member["intervals"]["ttft_p50_ms"]["basis"] == "repeats" for member in front)
    trials = {trial["trial"]: trial for trial in shown(study)["trials"]}
    confirmations = [trials[number] for member in front for number in member["runs"][1:]]
    assert all(trial["origin"] == "confirm" for trial in confirmations)
    assert sum("start" not in trial["timings_s"] for trial in confirmations) >= len(front), "caches reset, no new start"
    assert shown(study)["stability"]["noise"]["ttft_p50_ms"]["degrees"] >= 2
    assert "confirming the front" in said


def test_the_defaults_of_both_modes_are_among_them(study: tuple[Path, str, str]) -> None:
    assert {"aggregated", "disaggregated"} <= {t["configuration"]["mode"] for t in shown(study)["trials"]}


def test_whoever_reads_the_output_knows(study: tuple[Path, str, str]) -> None:
    folder, name, said = study
    assert "nodes are EMULATED on this machine" in said
    assert "trial 0 emulated:" in said
    assert "(EMULATED" in tuner(folder, "study", "pareto", name).stdout
    assert "EMULATED" in (folder / "tuner-data" / "reports" / name / "front.html").read_text()


def test_a_killed_driver_leaves_no_node_and_no_engine(tmp_path: Path) -> None:
    name = f"emulated-{uuid.uuid4().hex[:8]}"
    command = [*TUNER, "study", "run", str(EXAMPLE), "--no-progress", "--set", f"name={name}", *OPTIONS]
    log = tmp_path / "run.log"
    with log.open("w") as sink:
        driver = subprocess.Popen(command, cwd=tmp_path, stdout=sink, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: "trial 0 emulated" in log.read_text(), 120.0, log)
        family = [p for p in psutil.Process(driver.pid).children(recursive=True) if not is_agent(p)]
        assert any("raylet" in process.name() for process in family)
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait(10)
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive, [process.cmdline() for process in alive]


def is_agent(process: psutil.Process) -> bool:
    """True for the agents of Ray's nodes, which look for their node every few seconds, and end within a minute."""
    return process.name().startswith("ray::") and "Agent" in process.name()


def wait_for(condition: Any, limit_s: float, log: Path) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
