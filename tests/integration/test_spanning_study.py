"""A study whose every replica needs two nodes, by the real command: proposed, predicted, placed, measured, recorded."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.engine, pytest.mark.long, pytest.mark.timeout(420)]

TUNER = [sys.executable, "-m", "tuner.cli"]
STUDY = """
name: {name}
model: {{name: Llama-3.1-70B}}
workload: {{isl: 128, osl: 16, concurrency: [4]}}
objectives: [output_tokens_per_s_per_gpu, ttft_p50_ms]
node_pools: {{h100: {{device: h100_sxm, nodes: 2, gpus_per_node: 2, price_per_hour: 6, labels: {{gpu: h100}}}}}}
engines: {{emulated: {{max_num_seqs: [16, 64]}}}}
space: {{modes: [aggregated], replicas: 1, tp: 2, pp: 2}}
emulation: {{nodes: true}}
budget: {{trials: 2, confirm: 1, control_every: 0}}
measurement: {{requests: 12, lateness_limit_ms: 5000}}
"""


def tuner(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*TUNER, *words], cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def test_replicas_over_two_nodes_are_measured(tmp_path: Path) -> None:
    name = f"spanning-{uuid.uuid4().hex[:8]}"
    (tmp_path / "study.yaml").write_text(STUDY.format(name=name))
    done = tuner(tmp_path, "study", "run", "study.yaml", "--no-progress", "--json")
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout)  # and nothing but JSON on standard output
    found = json.loads(tuner(tmp_path, "study", "show", name, "--json").stdout)
    assert found["counts"]["measured"] == 2, found
    for trial in found["trials"]:
        assert {"node.mixed-0.0", "node.mixed-0.1"} <= trial["environment"].keys()
        assert {"log_mixed-0.0", "log_mixed-0.1"} <= set(trial["artifacts"])
        assert trial["metrics"]["price_per_hour"] == pytest.approx(12.0)
