"""The whole way of an engine that lives apart, on Ray: checked, launched, paired, measured, diagnosed.

vLLM itself is a stand-in here (`make test-vllm` takes the real one); Ray, the router and the load generator are real.
"""

from __future__ import annotations

import os
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.engines.installation import Installation
from cluster.engines.vllm import VllmBackend
from cluster.janitor import tagged_processes
from cluster.ray_runner import RayTrialRunner
from cluster.ray_session import RayCluster
from cluster.runner import Running
from search_spaces.hardware import DeviceKind
from search_spaces.outcome import Failure, FailureReason, Measurement, Outcome
from search_spaces.serving import OptionValue, Pool, Role, ServingConfig, make_options
from tests.support import vllm_standin
from tests.support.ray_problem import POOL, request

pytestmark = [pytest.mark.ray, pytest.mark.engine, pytest.mark.long]

STUDY = f"standin-tests-{os.getpid()}"
SMALL: dict[str, OptionValue] = {"max_num_seqs": 8, "max_num_batched_tokens": 512, "cpu_kv_cache_gib": 1}


@contextmanager
def runner(cluster: RayCluster, folder: Path, env: Mapping[str, str]) -> Iterator[RayTrialRunner]:
    program = (sys.executable, str(Path(vllm_standin.__file__)))
    found = Installation(device=DeviceKind.CPU, command=program, env={**env, "TUNER_TEST": "1"})
    backend = VllmBackend(installations={POOL.name: found})
    made = RayTrialRunner(study=STUDY, backends={"vllm": backend}, cluster=cluster, work_dir=folder / "deployments")
    try:
        yield made
    finally:
        made.close()
    assert tagged_processes(STUDY) == []


def config(*roles: Role, **options: OptionValue) -> ServingConfig:
    pools = (Pool(role=role, node_pool=POOL.name, options=make_options({**SMALL, **options})) for role in roles)
    return ServingConfig(engine="vllm", pools=tuple(pools))


def outcome(made: RayTrialRunner, asked: ServingConfig, folder: Path, trial: str = "t") -> Outcome:
    handle = made.start(request(trial, asked, folder))
    deadline = time.monotonic() + 120
    while isinstance(state := made.poll(handle), Running):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return state


SPLIT = (Role.PREFILL, Role.DECODE)


def test_a_split_deployment_is_launched_paired_and_measured(ray_cluster: RayCluster, tmp_path: Path) -> None:
    with runner(ray_cluster, tmp_path, {}) as made:
        found = outcome(made, config(*SPLIT), tmp_path)
        assert isinstance(found, Measurement), f"{found.detail}\n{found.log_tail}"
        again = outcome(made, config(*SPLIT), tmp_path, "again")
        assert isinstance(again, Measurement), again
        urls = [f"http://{p.host}:{p.port}/metrics" for p in again.processes if p.model_source is not None]
        texts = [urllib.request.urlopen(url, timeout=10).read().decode() for url in urls]  # noqa: S310  of this test
    assert found.environment["engine"] == "vllm"
    assert found.environment["engine_version"] == "vLLM 9.9.9"
    assert found.environment["kv_transport"] == "NixlConnector over UCX (its own choice)"
    assert float(found.environment["kv_tokens_handed_over"]) >= 16 * 50
    assert all("standin_resets 2" in text or "standin_resets 1" in text for text in texts)
    prefill, decode = (process for process in found.processes if process.model_source is not None)
    assert "kv_producer" in " ".join(prefill.argv)
    assert "kv_consumer" in " ".join(decode.argv)
    assert Path(str(prefill.model_source), "tokenizer.json").is_file()
    assert not any(key in str(found.processes) for key in ("Bearer", found.environment.get("api_key", "Bearer")))


def test_a_split_deployment_that_hands_nothing_over_is_a_failure(ray_cluster: RayCluster, tmp_path: Path) -> None:
    with runner(ray_cluster, tmp_path, {"STANDIN_FORGETS": "1"}) as made:
        found = outcome(made, config(*SPLIT), tmp_path)
    assert isinstance(found, Failure)
    assert found.reason is FailureReason.REQUESTS_FAILED
    assert "decode replicas computed every prompt themselves" in found.detail


def test_a_flag_that_this_version_does_not_know_is_found_before_the_launch(
    ray_cluster: RayCluster, tmp_path: Path
) -> None:
    with runner(ray_cluster, tmp_path, {}) as made:
        found = outcome(made, config(Role.MIXED, scheduling_policy="priority"), tmp_path)
    assert isinstance(found, Failure)
    assert found.reason is FailureReason.INVALID_FLAGS
    assert "vllm 9.9.9" in found.detail
    assert "does not know --scheduling-policy" in found.detail
    assert not list((tmp_path / "t").glob("*.log"))


def test_the_cause_above_a_long_traceback_is_told(ray_cluster: RayCluster, tmp_path: Path) -> None:
    words = "(EngineCore pid=7) torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    with runner(ray_cluster, tmp_path, {"STANDIN_DIES": words}) as made:
        found = outcome(made, config(Role.MIXED), tmp_path)
    assert isinstance(found, Failure)
    assert found.reason is FailureReason.OUT_OF_MEMORY_AT_BOOT
    assert words in found.detail
