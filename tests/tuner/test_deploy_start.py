"""A deployed script starts what was measured, word for word, answers requests, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from cluster.engines.llamacpp import LlamaCppBackend
from cluster.load.measure import LoadMeasurement
from cluster.processes import free_port
from cluster.ray_runner import RayTrialRunner
from cluster.ray_session import RayCluster
from cluster.runner import Running
from search_spaces.measuring import MeasurementRule
from search_spaces.outcome import Measurement
from search_spaces.serving import Mode
from tests.support.deployable import EMBEDDED, embedded, on_gpus, record
from tests.support.ray_problem import PROBLEM, aggregated, disaggregated, request
from tuner.deploy.bench import load_benchmark, load_run, run_benchmark
from tuner.deploy.chosen import Chosen, choose
from tuner.deploy.command import Target, make_files, write_files
from tuner.deploy.machines import Output
from tuner.report import StudyReport
from tuner.study_file import parse_study

pytestmark = pytest.mark.engine
START_LIMIT_S = 120.0
FEW = MeasurementRule(requests=6, lateness_limit_ms=5000.0)


@contextmanager
def started(chosen: Chosen, out: Path) -> Iterator[tuple[Output, psutil.Process]]:
    """The deployment of `chosen` by its shell script, until the block ends; then nothing of it may run."""
    output, files = make_files(chosen, Target.SHELL, out, port=ports(1 + len(chosen.measurement.processes)))
    write_files(files, out)
    with (out / "out.log").open("w") as log:
        script = subprocess.Popen([out / "start.sh"], stdout=log, stderr=subprocess.STDOUT, cwd="/")
    family: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + START_LIMIT_S
        while "serving " not in (text := (out / "out.log").read_text()):
            assert script.poll() is None, text + logs(out)
            assert time.monotonic() < deadline, text + logs(out)
            time.sleep(0.1)
        family = psutil.Process(script.pid).children(recursive=True)
        yield output, psutil.Process(script.pid)
    finally:
        script.send_signal(signal.SIGTERM)
        script.wait(30)
        _, left = psutil.wait_procs(family, timeout=10)
        for process in left:
            process.kill()
    assert not left


def logs(out: Path) -> str:
    return "".join(f"[{path.name}]\n{path.read_text()}" for path in (out / "logs").glob("*.log"))


def ports(count: int) -> int:
    """The first of `count` ports in a row that nothing listens on now."""
    for _ in range(100):
        first = free_port("127.0.0.1")
        if first + count < 65535 and all(is_free(port) for port in range(first, first + count)):
            return first
    raise AssertionError("no ports in a row are free")


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def answer(endpoint: str, model: str) -> str:
    body = json.dumps({"model": model, "prompt": [7, 8, 9], "max_tokens": 4, "temperature": 0}).encode()
    headers = {"Content-Type": "application/json"}
    call = urllib.request.Request(f"{endpoint}/v1/completions", body, headers)  # noqa: S310 - always http
    with urllib.request.urlopen(call, timeout=60) as reply:  # noqa: S310 - likewise
        return str(json.load(reply)["choices"][0]["text"])


def running_argv(script: psutil.Process) -> list[tuple[str, ...]]:
    """Command lines of the processes of the deployment, from the kernel."""
    return [tuple(process.cmdline()) for process in script.children()]


@pytest.mark.ray
@pytest.mark.parametrize("mode", Mode)
def test_what_was_measured_on_the_cluster_is_what_runs(mode: Mode, ray_cluster: RayCluster, tmp_path: Path) -> None:
    """A trial measured by the runner; its record stored and read; the script's processes, as the kernel shows them."""
    chosen = measured_on(ray_cluster, mode, tmp_path)
    with started(chosen, tmp_path / "out") as (output, script):
        assert [part.command.argv for part in output.parts] == running_argv(script)
        for part in output.parts:
            assert part.measured.argv[:-1] == part.command.argv[:-1]
            before, after = json.loads(part.measured.argv[-1]), json.loads(part.command.argv[-1])
            changed = {key for key in before if before[key] != after[key]}
            assert changed <= {"host", "port", "model_path", "slot_dir", "prefill_urls", "decode_urls"}
        assert answer(output.endpoint, "tiny")
        benchmark = replace(load_benchmark(tmp_path / "out" / "benchmark.json"), rule=FEW)
        run = load_run(benchmark, output.endpoint, timings=tmp_path / "t.parquet", seed=None, api_key=None)
        again = run_benchmark(benchmark, run)
        assert isinstance(again, LoadMeasurement), again
        assert again.metrics.requests == FEW.requests


def measured_on(cluster: RayCluster, mode: Mode, folder: Path) -> Chosen:
    """A trial of the embedded engine, measured on Ray."""
    runner = RayTrialRunner(
        study=f"deploy-tests-{os.getpid()}",
        backends={"llamacpp": LlamaCppBackend()},
        cluster=cluster,
        work_dir=folder / "deployments",
    )
    asked = request("d-7", aggregated() if mode is Mode.AGGREGATED else disaggregated(), folder)
    try:
        handle = runner.start(asked)
        deadline = time.monotonic() + 120
        while isinstance(outcome := runner.poll(handle), Running):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        runner.close()
    assert isinstance(outcome, Measurement), outcome
    report = StudyReport(
        name="d",
        status="finished",
        problem=PROBLEM,
        trials=(record(7, asked.candidate, outcome),),
        storage="sqlite:///x.db",
    )
    return choose(report, parse_study(EMBEDDED), "7")


def test_the_emulated_engine_deployed(tmp_path: Path) -> None:
    chosen = on_gpus("emulated", tmp_path, Mode.DISAGGREGATED, tp=2)
    with started(chosen, tmp_path / "out") as (output, script):
        assert [part.command.argv for part in output.parts] == running_argv(script)
        assert answer(output.endpoint, "Llama-3.1-70B")


def test_when_one_process_ends_all_end(tmp_path: Path) -> None:
    chosen = embedded(tmp_path, replicas=2)
    with started(chosen, tmp_path / "out") as (_, script):
        replica = next(p for p in script.children() if "llamacpp_server" in " ".join(p.cmdline()))
        replica.kill()
        assert script.wait(30) == 1
    assert "a process has ended" in (tmp_path / "out" / "out.log").read_text()


def test_a_process_that_cannot_start_is_told(tmp_path: Path) -> None:
    chosen = embedded(tmp_path)
    out = tmp_path / "out"
    _, files = make_files(chosen, Target.SHELL, out, port=ports(2))
    write_files(files, out)
    for model in (out / "models").iterdir():
        model.write_text("no model")
    done = subprocess.run([out / "start.sh"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "ended before mixed-0 answered" in done.stderr
    assert "did not load" in logs(out)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's process list is read")
def test_quoting_reaches_the_process(tmp_path: Path) -> None:
    """A model name with everything a shell could trip over arrives as it is."""
    name = "a'b\"c $(id) `id` ${HOME} *;&|\\ é"
    chosen = embedded(tmp_path)
    problem = replace(chosen.problem, model=replace(chosen.problem.model, name=name))
    processes = tuple(
        replace(p, argv=(*p.argv[:-1], json.dumps(json.loads(p.argv[-1]) | {"model_name": name})))
        for p in chosen.measurement.processes
    )
    hostile = replace(chosen, problem=problem, measurement=replace(chosen.measurement, processes=processes))
    with started(hostile, tmp_path / "out") as (output, script):
        (argv,) = running_argv(script)
        assert json.loads(argv[-1])["model_name"] == name
        assert answer(output.endpoint, name)
