"""Campaigns, experiments and the service on one joined Ray cluster whose node stands for one with GPUs (EMULATED)."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from studies.history import StudyHistory
from studies.records import TrialStatus
from studies.storage import open_storage
from tests.support.commands import Invoke
from tests.support.ray_head import RayHead, ray_head

pytestmark = [pytest.mark.ray, pytest.mark.engine, pytest.mark.long, pytest.mark.timeout(600)]

TUNER = [sys.executable, "-m", "tuner.cli"]
TOKEN = "fedcba9876543210" * 4
COMMON = """
  model: {name: Llama-3.1-8B}
  objectives: [output_tokens_per_s_per_gpu, ttft_p50_ms]
  node_pools: {h100: {device: h100_sxm, gpus_per_node: 2, price_per_hour: 24, labels: {gpu: h100}}}
  engines: {emulated: {max_num_seqs: [16, 64], max_num_batched_tokens: [2048], enable_chunked_prefill: true,
    enable_prefix_caching: true, kv_cache_dtype: auto, gpu_memory_utilization: 0.9}}
  space: {modes: [aggregated], tp: [1, 2]}
  workload: {isl: 128, osl: 16, concurrency: [2]}
  measurement: {requests: 12, lateness_limit_ms: 5000}
  limits: {start_s: 120, measure_s: 120}
  budget: {trials: 1, confirm: 1, control_every: 0}
"""
OWN = textwrap.dedent(COMMON)
"""The same as a study file of its own."""


@dataclass
class Joined:
    """Commands in `folder`, with the storage beside it, of a user of the cluster."""

    head: RayHead
    folder: Path

    @property
    def url(self) -> str:
        return f"sqlite:///{self.folder}/tuner-data/studies.db"

    @property
    def environment(self) -> dict[str, str]:
        return {**self.head.environment, "TUNER_STORAGE": self.url, "TUNER_LEASE_EXPIRY_S": "12"}

    def __call__(self, *args: str) -> subprocess.CompletedProcess[str]:
        there = ("--address", self.head.address)
        return subprocess.run(
            [*TUNER, *args, *there],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:  # a short path
        options = {"num_gpus": 2, "labels": "gpu=h100", "object_store_memory": 80 * 2**20}
        with ray_head(Path(folder), TOKEN, 12, **options) as started:
            yield started


@pytest.fixture
def joined(head: RayHead, tmp_path: Path) -> Joined:
    return Joined(head=head, folder=tmp_path)


@pytest.fixture
def invoke(joined: Joined, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Invoke:
    """Commands that need the storage alone, in this process: they are as another machine would give them."""
    monkeypatch.chdir(joined.folder)
    monkeypatch.setenv("TUNER_STORAGE", joined.url)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return Invoke(monkeypatch, capsys)


CAMPAIGN = f"""
name: NAME
common: {COMMON}
matrix:
  users:
    few: {{workload: {{concurrency: [2, 4]}}, budget: {{trials: 3}}}}
budget: {{cost: 1000}}
slices: {{trials: 1}}
"""


def test_a_detached_campaign_is_killed_paused_resumed_and_stopped(joined: Joined, invoke: Invoke) -> None:
    name = f"away-{uuid.uuid4().hex[:6]}"
    (joined.folder / "campaign.yaml").write_text(CAMPAIGN.replace("NAME", name))

    def status() -> Any:
        done = invoke("campaign", "status", name, "--json")
        assert done.code == 0, done.err
        return json.loads(done.out)

    def wait_for(condition: Callable[[Any], object]) -> Any:
        deadline = time.monotonic() + 240
        while not condition(found := status()):
            assert time.monotonic() < deadline, f"{found}\n{invoke('campaign', 'logs', name).out}"
            time.sleep(0.2)
        return found

    begun = joined("campaign", "run", "campaign.yaml", "--detach")
    assert begun.returncode == 0, begun.stderr
    assert re.search(rf"Campaign {name} runs detached: process \d+ on host ", begun.stdout)
    first = wait_for(lambda found: found["running"] and "slice 1, search in" in invoke("campaign", "logs", name).out)
    refused = invoke("campaign", "run", "campaign.yaml")
    assert (refused.code, f"campaign '{name}' is run already: {first['runner']}" in refused.err) == (2, True)
    os.kill(pid_of(first["runner"]), signal.SIGSTOP)  # it shall not end its slice for the pause
    paused = invoke("campaign", "pause", name)
    os.kill(pid_of(first["runner"]), signal.SIGKILL)
    assert paused.code == 0
    second = wait_for(lambda found: found["runner"] not in (None, first["runner"]))
    assert second["state"] == "paused"
    wait_for(lambda _: "nothing is begun: paused" in invoke("campaign", "logs", name).out)  # who comes next keeps it
    resumed = invoke("campaign", "resume", name)
    assert (resumed.code, "is run already" in resumed.err) == (0, True)
    wait_for(lambda found: found["studies"][0]["measured"] >= 1)
    stopped = invoke("campaign", "stop", name)
    assert stopped.code == 0, stopped.err
    at_rest = status()
    assert (at_rest["state"], at_rest["runner"]) == ("stopped", None)
    trials = StudyHistory(open_storage(joined.url), f"{name}.few").trials()
    finished = [trial.key for trial in trials if trial.is_finished]
    assert len(finished) == len(set(finished)) == at_rest["studies"][0]["measured"]
    assert not [trial for trial in trials if trial.status is TrialStatus.RUNNING]
    told = invoke("campaign", "logs", name).out
    for part in ("slice 1, search in", f"slice 1 of {name}.few was not finished; it goes on"):
        assert part in told
    wait_until_gone(str(joined.folder))


def test_experiments_run_on_a_joined_cluster_and_are_compared(joined: Joined, invoke: Invoke) -> None:
    name = f"pair-{uuid.uuid4().hex[:6]}"
    experiments = "experiments: {one: {space: {tp: [1]}}, two: {space: {tp: [2]}}}"
    (joined.folder / "study.yaml").write_text(f"name: {name}{OWN}{experiments}\n")
    done = joined("study", "run", "study.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    for experiment in ("one", "two"):
        assert f"experiment {experiment}: done" in done.stderr
        assert any(line.startswith(f"[{experiment}] ") and "trial 0 emulated:" in line for line in lines), done.stdout
        (trial,) = StudyHistory(open_storage(joined.url), f"{name}.{experiment}").trials()
        assert trial.status is TrialStatus.MEASURED
    compared = invoke("study", "compare", name, "--json")
    assert compared.code == 0, compared.err
    assert {f"{name}.one", f"{name}.two"} <= set(re.findall(r'"([^"]+)"', compared.out))


@pytest.mark.skipif(find_spec("fastapi") is None, reason="the extra serve is not installed")
def test_the_service_gives_a_submitted_study_to_the_cluster(joined: Joined) -> None:
    name = f"sent-{uuid.uuid4().hex[:6]}"
    write = "w" * 32
    command = [*TUNER, "serve", "--port", "0", "--address", joined.head.address]
    environment = {**joined.environment, "TUNER_WRITE_TOKEN": write, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=joined.folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            api = f"{process.stdout.readline().split()[1]}api/v1"
            with httpx.Client(headers={"Authorization": f"Bearer {write}"}, timeout=400) as asked:
                sent = asked.post(f"{api}/studies", json={"study": f"name: {name}{OWN}"})
                assert sent.status_code == 202, sent.text
                run = ended_run(asked, f"{api}/submissions/{name}")
                assert (run["exit_code"], f"Study {name} " in run["tail"]) == (0, True), run["tail"]
                told = asked.get(f"{api}/studies/{name}/trials/stream").text  # until nobody runs it any more
                status = asked.get(f"{api}/studies/{name}/status").json()
        finally:
            process.terminate()
    assert told.endswith("event: end\ndata: {}\n\n")
    assert '"status": "measured"' in told
    assert (status["state"], status["trials"]["measured"], status["coordinator"]) == ("finished", 1, None)
    wait_until_gone(str(joined.folder))


def ended_run(asked: httpx.Client, url: str) -> Any:
    """The run of a submitted study once its command has returned."""
    deadline = time.monotonic() + 240
    while (run := asked.get(url).json())["exit_code"] is None:
        assert time.monotonic() < deadline, run
        time.sleep(0.2)
    return run


def pid_of(runner: str) -> int:
    found = re.search(r"process (\d+) on host", runner)
    assert found, runner
    return int(found[1])


def wait_until_gone(text: str) -> None:
    """Wait until no process has `text` in its command line."""
    deadline = time.monotonic() + 60
    while left := [p.pid for p in psutil.process_iter(["cmdline"]) if text in " ".join(p.info["cmdline"] or ())]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
