"""A campaign on emulated nodes by the real command: killed with -9 in the middle of a slice, it goes on."""

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

import pytest

from studies.history import StudyHistory
from studies.records import TrialStatus
from studies.storage import open_storage

pytestmark = [pytest.mark.ray, pytest.mark.engine, pytest.mark.long, pytest.mark.timeout(600)]

TUNER = [sys.executable, "-m", "tuner.cli", "campaign"]
CAMPAIGN = """
name: {name}
common:
  model: {{name: Llama-3.1-8B}}
  objectives: [output_tokens_per_s_per_gpu, ttft_p50_ms]
  node_pools: {{h100: {{device: h100_sxm, gpus_per_node: 8, price_per_hour: 24, labels: {{gpu: h100}}}}}}
  engines: {{emulated: {{max_num_seqs: [16, 64], max_num_batched_tokens: [2048], enable_chunked_prefill: true,
    enable_prefix_caching: true, kv_cache_dtype: auto, gpu_memory_utilization: 0.9}}}}
  space: {{modes: [aggregated], tp: [1, 2]}}
  measurement: {{requests: 12, lateness_limit_ms: 5000}}
  limits: {{start_s: 120, measure_s: 120}}
  budget: {{trials: 2, confirm: 1, control_every: 0}}
matrix:
  users:
    short: {{workload: {{isl: 128, osl: 16, concurrency: [2, 4]}}}}
    long: {{workload: {{isl: 256, osl: 16, concurrency: [2, 4]}}}}
budget: {{cost: 1000}}
slices: {{trials: 2}}
"""


def test_a_killed_campaign_goes_on_and_loses_and_repeats_nothing(tmp_path: Path) -> None:
    name = f"killed-{uuid.uuid4().hex[:6]}"
    (tmp_path / "campaign.yaml").write_text(CAMPAIGN.format(name=name))
    log = tmp_path / "first.log"
    with log.open("w") as sink:
        first = subprocess.Popen(
            [*TUNER, "run", "campaign.yaml", "--no-progress"], cwd=tmp_path, stdout=sink, stderr=subprocess.STDOUT
        )
    try:
        wait_for("trial 1 (", first, log)
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.wait(60)
    assert status(tmp_path, name)["state"] in {"died", "stopped"}
    done = subprocess.run(
        [*TUNER, "resume", name, "--no-progress"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"slice 1 of {name}.short was not finished; it goes on" in done.stderr
    found = status(tmp_path, name)
    assert found["over"] == "nothing is left to gain: every study is closed"
    assert [study["measured"] for study in found["studies"]] == [2, 2]
    assert found["slices"] == 2, "the slice that was cut off was finished, not given anew"
    assert found["emulated"] is True
    storage = open_storage(f"sqlite:///{tmp_path}/tuner-data/studies.db")
    for cell in ("short", "long"):
        trials = StudyHistory(storage, f"{name}.{cell}").trials()
        finished = [trial.key for trial in trials if trial.is_finished]
        assert len(finished) == len(set(finished)) == 2
        assert not [trial for trial in trials if trial.status in (TrialStatus.RUNNING, TrialStatus.WAITING)]
    assert StudyHistory(storage, f"{name}.long").earlier, "the second study learnt from the first"


def status(folder: Path, name: str) -> Any:
    done = subprocess.run(
        [*TUNER, "status", name, "--json"], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def wait_for(text: str, process: subprocess.Popen[bytes], log: Path, limit_s: float = 240.0) -> None:
    deadline = time.monotonic() + limit_s
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
