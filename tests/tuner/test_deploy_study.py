"""From a study file to a running deployment by the commands alone."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.cli_study import CliStudy

pytestmark = [pytest.mark.long, pytest.mark.ray, pytest.mark.engine]


def test_a_study_is_run_deployed_started_and_measured_again(tmp_path: Path) -> None:
    study = CliStudy.create(tmp_path, trials=2)
    done = study.call("study", "run", "study.yaml", "--no-progress")
    assert done.returncode == 0, done.stderr
    made = study.json("deploy", study.name, "--target", "shell", "--out", "out", "--port", "18470")
    front = study.json("study", "pareto", study.name)["front"]
    assert made["trial"] == front[0]["trial"], "best is the first of the front"
    assert study.call("deploy", study.name, "--target", "shell", "--out", "out").returncode == 2, "nothing overwritten"
    with (tmp_path / "out.log").open("w") as log:
        script = subprocess.Popen([tmp_path / "out" / "start.sh"], stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while "serving " not in (tmp_path / "out.log").read_text():
            assert script.poll() is None, (tmp_path / "out.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        bench = study.call("bench", "out/benchmark.json", "--url", made["endpoint"], "--json")
        assert bench.returncode == 0, bench.stderr
        again = json.loads(bench.stdout)
        assert again["trial"] == made["trial"]
        assert again["requests"] == front[0]["requests"]
        assert again["errors"] == 0
        assert again["metrics"]["output_tokens_per_s"] > 0
        assert again["measured_before"]["output_tokens_per_s"] == front[0]["metrics"]["output_tokens_per_s"]
    finally:
        script.terminate()
        script.wait(30)
    refused = study.call("bench", "out/benchmark.json", "--url", made["endpoint"])
    assert refused.returncode == 3
    assert "transport" in refused.stderr
