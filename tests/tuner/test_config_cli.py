"""`tuner config` and `tuner profiles` in processes of their own; and the ten-line study, run for real."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cli_study import CliStudy

EXAMPLE = Path(__file__).parents[2] / "examples" / "ten-lines.yaml"


def tuner(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tuner.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_show_names_the_layer_of_every_value() -> None:
    shown = tuner("config", "show", str(EXAMPLE), "--set", "seed=3", "--json")
    assert shown.returncode == 0, shown.stderr
    tree = json.loads(shown.stdout)
    values = {row["key"]: (row["value"], row["layer"]) for row in tree["values"]}
    assert values["workload.isl.mean"] == (64, "study file")
    assert values["seed"] == (3, "command line")
    assert values["engines.llamacpp"] == ({}, "base/cpu-engine")
    assert values["limits.stop_s"] == (30.0, "default")
    assert all(row["layer"] for row in tree["values"])
    assert tree["layers"] == ["base/cpu-engine", "base/objectives", "engine/llamacpp"]


def test_show_as_text_names_the_line_of_the_study_file() -> None:
    text = tuner("config", "show", str(EXAMPLE)).stdout
    line = EXAMPLE.read_text().splitlines().index("  ttft_p95_ms: 1000") + 1
    assert any(
        row.startswith("slos.ttft_p95_ms ") and row.endswith(f"study file, line {line}") for row in text.splitlines()
    )


def test_layers_profiles_and_fields_are_listed(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("name: own\nstage: mode\nabout: ours\nset: {seed: 1}\n")
    listed = json.loads(tuner("config", "layers", "--layers", str(tmp_path), "--json").stdout)
    assert [layer["name"] for layer in listed if layer["stage"] == "mode"] == ["disaggregated", "own"]
    kinds = {layer["kind"] for layer in json.loads(tuner("profiles", "list", "--json").stdout)}
    assert kinds == {"quantisation", "slo", "hardware", "workload", "model"}
    shown = tuner("profiles", "show", "balanced").stdout
    assert "MLPerf" in shown
    assert "ttft_p99_ms: 2000" in shown
    unknown = tuner("profiles", "show", "balancd")
    assert unknown.returncode == 2
    assert "choose" in unknown.stderr
    assert "model_family" in tuner("config", "fields").stdout


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.engine
def test_the_ten_line_study_runs_on_the_embedded_engine(tmp_path: Path) -> None:
    study = CliStudy(folder=tmp_path, name="ten-lines")
    shutil.copy(EXAMPLE, tmp_path / "study.yaml")
    small = ("budget.trials=2", "budget.wall_time=240", "measurement.requests=8", "measurement.lateness_limit_ms=2000")
    overrides = [word for text in small for word in ("--set", text)]
    done = study.call("study", "run", "study.yaml", "--no-progress", *overrides)
    assert done.returncode == 0, done.stderr
    found = study.json("study", "show", "ten-lines")
    assert found["counts"]["measured"] == 2
    assert found["objectives"][0]["metric"] == "output_tokens_per_s_per_gpu"
    study.wait_for_silence()
