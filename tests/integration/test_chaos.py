"""The short form of `benchmarks/chaos.py`: a driver, an actor, an engine and a node are killed, and nothing is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.janitor import tagged_processes

pytestmark = [pytest.mark.ray, pytest.mark.engine, pytest.mark.long, pytest.mark.timeout(420)]

CHAOS = Path(__file__).parents[2] / "benchmarks" / "chaos.py"


def test_a_study_survives_a_kill_of_every_kind(tmp_path: Path) -> None:
    size = ["--trials", "12", "--kills", "4", "--nodes", "3", "--parallel", "2", "--seed", "0"]
    folder = tmp_path / "chaos"
    done = subprocess.run(
        [sys.executable, str(CHAOS), *size, "--calm-runs", "0", "--json", "--keep", str(folder)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    logs = "\n".join(path.read_text()[-3000:] for path in folder.glob("*.log"))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{logs}"
    answer = json.loads(done.stdout)
    assert answer["happened"]["killed"] == dict.fromkeys(("driver", "actor", "engine", "node"), 1)
    found = answer["disturbed"]
    assert found["finished"] == 12
    assert found["repeated"] >= 1, "a killed driver leaves the trial that it was measuring"
    left = ("lost_for_good", "measured_twice", "running", "waiting", "orphans")
    assert [found[key] for key in left] == [0] * len(left)
    assert [p for p in tagged_processes() if p.study.endswith(folder.name) and "chaos" in p.study] == []
