"""From a study file to a running deployment by the commands alone, and its front confirmed by another client."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest

from cluster.load.aiperf import AiperfError, find_aiperf
from cluster.processes import free_port
from tests.support.cli_study import CliStudy

pytestmark = [pytest.mark.long, pytest.mark.ray, pytest.mark.engine]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> CliStudy:
    """A small study that has ended."""
    study = CliStudy.create(tmp_path_factory.mktemp("study"), trials=2)
    done = study.call("study", "run", "study.yaml", "--no-progress")
    assert done.returncode == 0, done.stderr
    return study


def test_a_study_is_deployed_started_and_measured_again(measured: CliStudy) -> None:
    folder = measured.folder
    made = measured.json(
        "deploy", measured.name, "--target", "shell", "--out", "out", "--port", str(free_port("127.0.0.1"))
    )
    front = measured.json("study", "pareto", measured.name)["front"]
    assert made["trial"] == front[0]["trial"], "best is the first of the front"
    assert measured.call("deploy", measured.name, "--target", "shell", "--out", "out").returncode == 2, "no overwriting"
    with (folder / "out.log").open("w") as log:
        script = subprocess.Popen([folder / "out" / "start.sh"], stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for("serving ", folder / "out.log", script)
        bench = measured.call("bench", "out/benchmark.json", "--url", made["endpoint"], "--json")
        assert bench.returncode == 0, bench.stderr
        again = json.loads(bench.stdout)
        assert again["trial"] == made["trial"]
        assert again["requests"] == 8
        assert again["errors"] == 0
        assert again["metrics"]["output_tokens_per_s"] > 0
        assert again["measured_before"]["output_tokens_per_s"] == pytest.approx(
            front[0]["metrics"]["output_tokens_per_s"]
        )
    finally:
        script.terminate()
        script.wait(30)
    refused = measured.call("bench", "out/benchmark.json", "--url", made["endpoint"])
    assert refused.returncode == 3
    assert "transport" in refused.stderr


def wait_for(words: str, log: Path, script: subprocess.Popen[bytes], limit_s: float = 120.0) -> None:
    deadline = time.monotonic() + limit_s
    while words not in log.read_text():
        assert script.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def test_the_front_is_confirmed_by_aiperf(measured: CliStudy) -> None:
    try:
        find_aiperf()
    except AiperfError as error:
        pytest.skip(str(error))
    port = str(free_port("127.0.0.1"))
    found = measured.json("study", "confirm", measured.name, "--trial", "best", "--repeats", "2", "--port", port)
    (confirmation,) = found
    front = measured.json("study", "pareto", measured.name)["front"]
    assert confirmation["trial"] == front[0]["trial"]
    by_name = {row["metric"]: row for row in confirmation["metrics"]}
    assert by_name["tpot_p50_ms"]["built_in"] > 0
    assert by_name["tpot_p50_ms"]["interval"][0] <= by_name["tpot_p50_ms"]["ratio"]
    assert 0.2 < by_name["e2e_p50_ms"]["ratio"] < 5, "the same server, on a machine that others use"


def test_without_aiperf_the_way_to_it_is_told(measured: CliStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNER_AIPERF", "/nonexistent/aiperf")
    done = measured.call("study", "confirm", measured.name)
    assert done.returncode == 3
    assert "scripts/aiperf_env.sh" in done.stderr
