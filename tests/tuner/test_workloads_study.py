"""Studies of conversations and of a trace, by the command, on the embedded engine."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import pytest

from cluster.load.timings import Phase, read_timings
from tests.support.cli_study import CliStudy

pytestmark = [pytest.mark.long, pytest.mark.ray, pytest.mark.engine]
STUDY = """
name: {name}
workload: {workload}
objectives: [output_tokens_per_s, ttft_p50_ms]
node_pools: {{local: {{cpus_per_node: 2}}}}
engines: {{llamacpp: {{threads: 1, max_num_seqs: [2, 4], batch_size: 512, ubatch_size: 512, kv_cache_dtype: f16,
  flash_attention: true}}}}
budget: {{trials: 2, confirm: 1, control_every: 0}}
measurement: {{requests: 16, lateness_limit_ms: 3000}}
limits: {{start_s: 90, measure_s: 90}}
"""
WORKLOADS = {
    "conversations": "{isl: 40, osl: 8, turns: 3, think_time: 0.05, shared_prefix: 0.5, concurrency: 2}",
    "trace": "{trace: {file: trace.jsonl, format: mooncake, time_scale: 2}}",
}


@pytest.mark.parametrize("kind", WORKLOADS)
def test_a_study_of_it(kind: str, tmp_path: Path) -> None:
    name = f"test-{uuid.uuid4().hex[:8]}"
    (tmp_path / "study.yaml").write_text(STUDY.format(name=name, workload=WORKLOADS[kind]))
    rows = [{"timestamp": 400 * i, "input_length": 60 + i, "output_length": 6, "hash_ids": [i // 3]} for i in range(40)]
    (tmp_path / "trace.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    study = CliStudy(folder=tmp_path, name=name)
    done = study.call("study", "run", "study.yaml", "--no-progress")
    assert done.returncode == 0, done.stderr
    shown = study.json("study", "show", name)
    measured = [trial for trial in shown["trials"] if trial["status"] == "measured"]
    assert len(measured) >= 2, shown
    for trial in measured:
        assert trial["errors"] == 0
        assert trial["predicted"], "the model says something of it"
    files = sorted((tmp_path / "tuner-data" / "artifacts").iterdir())
    timings = [read_timings(file) for file in files if file.read_bytes()[:4] == b"PAR1"]
    assert timings
    for run in timings:
        inputs = [request.input_tokens for request in run.of_phase(Phase.MEASURED)]
        if kind == "trace":
            due = [request.scheduled_ns / 1e9 for request in run.requests[:18]]
            assert due == pytest.approx([0.2 * i for i in range(18)], abs=1e-5)
            assert inputs == [60 + i for i in range(2, 18)]
        else:
            assert set(inputs) == {40, 40 + 8 + 40, 2 * (40 + 8) + 40}
