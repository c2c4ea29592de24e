"""A study's nodes on this machine: prefill and decode on different GPU types, through the ordinary path."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from cluster.ray_emulated import MOST_NODES, emulated_cluster
from cluster.ray_session import ClusterError
from search_spaces.hardware import NodePool
from search_spaces.known_gpus import known_gpu
from tests.support.ray_problem import POOL

LIMIT_S = 240.0


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `tests.support.emulated_driver` found."""
    command = [sys.executable, "-m", "tests.support.emulated_driver", str(tmp_path_factory.mktemp("emulated"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.ray
@pytest.mark.engine
@pytest.mark.long
class TestThreeGpuTypes:
    def test_prefill_and_decode_land_on_their_gpu_types(self, answers: dict[str, Any]) -> None:
        apart = answers["apart"]
        assert apart["places"]["prefill-0"] == "h200"
        assert apart["places"]["decode-0"] == "a100"
        assert {"log_prefill-0", "log_decode-0", "router_stats"} <= set(apart["artifacts"])

    def test_replicas_of_one_pool_stay_on_it(self, answers: dict[str, Any]) -> None:
        places = answers["together"]["places"]
        assert (places["mixed-0"], places["mixed-1"]) == ("h100", "h100")

    def test_what_was_not_measured_is_marked(self, answers: dict[str, Any]) -> None:
        for name in ("apart", "together"):
            assert answers[name]["emulated"] is True
            assert answers[name]["engine"].startswith("EMULATED")
        assert any("EMULATED" in warning for warning in answers["warnings"])

    def test_the_times_are_those_of_the_profile(self, answers: dict[str, Any]) -> None:
        """A decode step takes 10 ms; the hand-over and the prompt's 6.4 ms come on top of the first token alone."""
        for name in ("apart", "together"):
            metrics = answers[name]["metrics"]
            assert 9.5 < metrics["tpot_p50_ms"] < 15.0, name
            assert metrics["ttft_p50_ms"] > 16.0, name

    def test_the_price_counts_both_gpu_types(self, answers: dict[str, Any]) -> None:
        assert answers["apart"]["metrics"]["price_per_hour"] == pytest.approx(2 * 16.0 / 4 + 4 * 6.0 / 4)

    def test_out_of_memory_under_load(self, answers: dict[str, Any]) -> None:
        failure = answers["out_of_memory"]
        assert failure["failure"] == "out_of_memory_under_load"
        assert "CUDA out of memory" in failure["log"]
        assert not failure["retryable"]

    def test_a_start_that_takes_too_long(self, answers: dict[str, Any]) -> None:
        failure = answers["hangs"]
        assert failure["failure"] == "startup_timeout"
        assert "emulated hang" in failure["log"]


def test_cpus_are_never_emulated() -> None:
    with pytest.raises(ClusterError, match="'here' has CPUs"), emulated_cluster([POOL]):
        pass


def test_a_laptop_stands_for_few_nodes() -> None:
    pool = NodePool(name="many", device=known_gpu("h100_sxm"), nodes=MOST_NODES + 1, devices_per_node=8)
    with pytest.raises(ClusterError, match=f"at most {MOST_NODES}"), emulated_cluster([pool]):
        pass
