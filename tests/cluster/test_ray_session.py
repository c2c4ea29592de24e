from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from math import isqrt
from pathlib import Path

import pytest

from cluster.node_facts import usable_cores
from cluster.placement import PlacementError, check_pools
from cluster.processes import free_port
from cluster.ray_session import ClusterError, RayCluster, connect
from tests.support.ray_problem import POOL

JOIN = """
import sys, time
from cluster.ray_session import ClusterError, connect
try:
    with connect(sys.argv[1], []) as cluster:
        print("joined", len(cluster.nodes()), cluster.local)
except ClusterError as error:
    print("refused", error)
"""


def test_nothing_listens_there_is_told_at_once() -> None:
    port = free_port("127.0.0.1")
    began = time.monotonic()
    with pytest.raises(ClusterError, match=rf"no Ray cluster listens at 127.0.0.1:{port} .*ray start --head"):
        connect(f"127.0.0.1:{port}", [POOL])
    assert time.monotonic() - began < 20.0, "Ray itself tries for longer"


@pytest.mark.parametrize("address", ["here", "ray://127.0.0.1:10001", "host:port"])
def test_an_address_that_is_none_names_a_good_one(address: str) -> None:
    with pytest.raises(ClusterError, match="give host:port of the head node"):
        connect(address, [POOL])


def test_a_local_ray_holds_one_node() -> None:
    with pytest.raises(ClusterError, match=r"have 2 nodes, and a Ray that is started here has one; join a cluster"):
        connect(None, [replace(POOL, nodes=2)])


@pytest.mark.ray
def test_a_function_runs_on_a_pool_with_its_cores(ray_cluster: RayCluster) -> None:
    assert ray_cluster.run_on_pool(POOL, 1, 60.0, isqrt, 17) == 4
    assert ray_cluster.run_on_pool(POOL, 1, 60.0, os.sched_getaffinity, 0) == {usable_cores()[0]}


@pytest.mark.ray
def test_a_function_on_a_pool_raises_here_and_has_a_limit(ray_cluster: RayCluster) -> None:
    with pytest.raises(ValueError, match="nonnegative"):
        ray_cluster.run_on_pool(POOL, 1, 60.0, isqrt, -1)
    with pytest.raises(ClusterError, match=r"sleep on node pool 'here' did not end within 0.3 s"):
        ray_cluster.run_on_pool(POOL, 1, 0.3, time.sleep, 60.0)


@pytest.mark.ray
def test_a_function_runs_on_every_node(ray_cluster: RayCluster) -> None:
    (node,) = ray_cluster.nodes()
    assert ray_cluster.run_on_every_node(60.0, isqrt, 17) == {node.node_id: 4}


@pytest.mark.ray
def test_a_node_where_a_function_dies_is_left_out(ray_cluster: RayCluster, caplog: pytest.LogCaptureFixture) -> None:
    assert ray_cluster.run_on_every_node(60.0, os._exit, 1) == {}
    assert "_exit did not run on node" in caplog.text
    with pytest.raises(ValueError, match="isqrt"):
        ray_cluster.run_on_every_node(60.0, isqrt, -1)


@pytest.mark.ray
def test_a_pool_that_the_cluster_lacks_is_told_at_once(ray_cluster: RayCluster) -> None:
    with pytest.raises(PlacementError, match="'here' needs 1 nodes with 2 CPUs and zone=moon, but the cluster has 0"):
        check_pools([replace(POOL, labels={"zone": "moon"})], ray_cluster.nodes())


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.slow
def test_joining_takes_a_token_that_is_at_hand(ray_cluster: RayCluster) -> None:
    assert _join(ray_cluster.address, {}) == "joined 1 False"


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.slow
def test_a_refused_token_is_told_with_what_to_set(ray_cluster: RayCluster, tmp_path: Path) -> None:
    none = _join(ray_cluster.address, {"RAY_AUTH_MODE": "token", "HOME": str(tmp_path)})
    assert "refused" in none
    assert "no authentication token was found" in none
    assert "set RAY_AUTH_MODE=token and give its token in RAY_AUTH_TOKEN" in none
    wrong = _join(ray_cluster.address, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64})
    assert "refused" in wrong
    assert "With RAY_AUTH_MODE=token here" in wrong


DYING = """
import os, sys
from pathlib import Path
from cluster import ray_session
tries, deaths = Path(sys.argv[2]), int(sys.argv[3])
class Dying(ray_session._Probe):
    def python(self):
        with tries.open("a") as file:
            file.write("x")
        if len(tries.read_text()) <= deaths:
            os._exit(1)
        return super().python()
ray_session._Probe = Dying
"""


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.slow
def test_a_probe_that_dies_with_its_node_is_sent_again(ray_cluster: RayCluster, tmp_path: Path) -> None:
    once, always = tmp_path / "once", tmp_path / "always"
    assert _join(ray_cluster.address, {}, DYING + JOIN, str(once), "1") == "joined 1 False", "and nothing of Ray's"
    assert once.read_text() == "xx"
    assert "an actor does not work there" in _join(ray_cluster.address, {}, DYING + JOIN, str(always), "9")
    assert always.read_text() == "xxx"


def _join(address: str, env: Mapping[str, str], program: str = JOIN, *arguments: str) -> str:
    """What a process without Ray's variables prints when it joins."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", program, address, *arguments],
        env=clean | env,
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
    )
    return done.stdout.strip() or done.stderr
