"""The GPU check where there is no GPU: what it refuses, what it records, and the whole of it against a stand-in."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_check import Figure, Machine, Record, StepRow, TrialRow, catalogue_name, errors_of, markdown
from search_spaces.errors import TunerError

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"
NVIDIA_SMI = "#!/bin/sh\necho 'NVIDIA Tesla T4, 570.1'\n"


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100_sxm"),
        ("NVIDIA H200", "h200_sxm"),
        ("NVIDIA A100-SXM4-80GB", "a100_sxm"),
        ("NVIDIA B200", "b200_sxm"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx_4090"),
    ],
)
def test_the_drivers_names_are_found_in_the_catalogue(told: str, name: str) -> None:
    assert catalogue_name(told) == name


def test_other_gpus_want_a_name() -> None:
    with pytest.raises(TunerError, match="no 'NVIDIA H100 PCIe'; name the nearest with --device: a100_sxm"):
        catalogue_name("NVIDIA H100 PCIe")


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--out", str(folder), *words]
    environment = os.environ | {"PATH": f"{folder}:/usr/bin:/bin"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_without_a_gpu_or_with_an_unknown_one_it_says_what_to_do(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 2
    if "no nvidia-smi is on the path" not in done.stderr:
        pytest.skip("this machine has a GPU")
    (tmp_path / "nvidia-smi").write_text(NVIDIA_SMI)
    (tmp_path / "nvidia-smi").chmod(stat.S_IRWXU)
    done = run(tmp_path)
    assert (done.returncode, "no 'NVIDIA Tesla T4'" in done.stderr) == (2, True)


@pytest.mark.long
def test_with_nothing_to_measure_with_it_writes_nothing(tmp_path: Path) -> None:
    done = run(tmp_path, "--cpu", "--vllm", "no-vllm", "--python", sys.executable)
    if done.returncode == 0:
        pytest.skip("torch and transformers are installed here")
    assert done.returncode == 2
    assert "nothing was measured: no-vllm is no program: nothing was served; " in done.stderr
    assert "timed no steps of transformers: ModuleNotFoundError" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_record_tells_ratios_failures_and_what_was_left_out() -> None:
    figures = {
        "ttft_p50_ms": Figure(measured=20.0, model_alone=1.5, before_measuring=0.9),
        "tpot_p50_ms": Figure(measured=4.0, model_alone=0.5, before_measuring=None),
    }
    good = TrialRow(trial=0, status="measured", load="concurrency=8", options=({},), figures=figures, failure=None)
    bad = TrialRow(
        trial=1, status="failed", load="concurrency=64", options=({},), figures={}, failure="out_of_memory_at_boot: a|b"
    )
    errors = errors_of([good, bad])
    assert errors["ttft_p50_ms"] == pytest.approx({"model alone": 0.5, "before measuring": 0.1})
    assert errors["tpot_p50_ms"] == pytest.approx({"model alone": 0.5})
    record = Record(
        at="now",
        tuner="1",
        machine=Machine(device="h100_sxm", name="NVIDIA H100", driver="570"),
        left_out=("no torch",),
        serving=(good, bad),
        errors=errors,
        timed_with="transformers 5",
        steps=(StepRow(step="prefill", batch=1, isl=512, ms=12.5, predicted=1.25),),
    )
    text = markdown(record)
    for line in (
        "- Left out: no torch",
        "| 0 | concurrency=8 | ttft_p50_ms | 20.00 | 1.50 | 0.90 |",
        "| 0 | concurrency=8 | tpot_p50_ms | 4.00 | 0.50 | - |",
        "| 1 | concurrency=64 | failed: out_of_memory_at_boot: a/b | | | |",
        "| prefill | 1 | 512 | 12.50 | 1.25 |",
    ):
        assert line in text
    assert "CPU" not in text


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.long
def test_the_whole_of_it_against_a_stand_in_of_vllm(tmp_path: Path) -> None:
    standin = Path(__file__).parents[1] / "support" / "vllm_standin.py"
    program = tmp_path / "vllm"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {standin} "$@"\n')
    program.chmod(stat.S_IRWXU)
    done = run(tmp_path / "out", "--cpu", "--vllm", str(program), "--trials", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "out" / "gpu-check-cpu.json").read_text())
    assert [row["failure"] for row in record["serving"] if row["failure"]] == []
    assert record["errors"]["ttft_p50_ms"].keys() == {"model alone", "before measuring"}
    assert "NO check of a GPU" in (tmp_path / "out" / "gpu-check-cpu.md").read_text()
