"""The short form of `benchmarks/scale.py`: the costs of the coordinator are measured, and nothing is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from studies.history import StudyHistory
from studies.records import TrialStatus
from studies.storage import open_storage

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(900)]

SCALE = Path(__file__).parents[2] / "benchmarks" / "scale.py"


def test_the_costs_of_a_study_on_many_nodes_are_measured(tmp_path: Path) -> None:
    """The limits are far from those of the benchmark: a test runs on whatever machine, beside whatever else."""
    size = ["--trials", "40", "--nodes", "15", "--parallel", "8", "--speed-up", "20"]
    done = subprocess.run(
        [sys.executable, str(SCALE), *size, "--json", "--keep", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=880,
        check=False,
    )
    assert done.stdout, done.stderr[-3000:]
    answer = json.loads(done.stdout)
    assert answer["finished"] == 40
    assert len(answer["rows"]) == 10
    for row in answer["rows"]:
        parts = ("ask_s", "tell_s", "learn_s", "notice_s")
        assert all(row[part] >= 0 for part in parts), row
        assert row["overhead_s"] >= max(row["ask_s"], row["tell_s"])
    assert 0 < answer["cpu_median_s"] < 10
    assert "trials held" in answer["busy"]
    trials = StudyHistory(open_storage(f"sqlite:///{tmp_path}/studies.db"), "scale").trials()
    keys = [trial.key for trial in trials if trial.is_finished]
    assert len(keys) == len(set(keys)) == 40
    assert {trial.status for trial in trials} <= {TrialStatus.MEASURED, TrialStatus.FAILED, TrialStatus.LOST}
