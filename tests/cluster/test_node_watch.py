"""The watch over nodes, with a real agent on the session's Ray node."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import psutil
import pytest

from cluster.processes import ProcessId
from cluster.ray_nodes import NodeWatch, WatchRule
from cluster.ray_session import RayCluster
from tests.support.ray_problem import POOL

pytestmark = pytest.mark.ray

RULE = WatchRule(beat_s=0.05, silence_s=1.5, start_s=60.0, scan_s=600.0, distrust_s=2.0)
WAIT_S = 60.0


@pytest.fixture
def watch(ray_cluster: RayCluster) -> Iterator[NodeWatch]:
    """A watch whose agent has answered."""
    joined = replace(ray_cluster, local=False)  # on a cluster of this machine alone there would be no agent
    made = NodeWatch(cluster=joined, study=f"watch-{os.getpid()}", coordinator=ProcessId.of(os.getpid()), rule=RULE)
    try:
        until(made, lambda: any(watched.heard for watched in made._watched.values()))
        yield made
    finally:
        made.close()


def until(watch: NodeWatch, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        watch.turn(frozenset())
        time.sleep(0.02)


def agents() -> list[psutil.Process]:
    found = []
    for process in psutil.Process(os.getpid()).children(recursive=True):
        try:
            found += [process] if "NodeAgent" in " ".join(process.cmdline()) else []
        except psutil.NoSuchProcess:
            continue
    return found


def test_a_silent_agent_makes_its_node_lost_until_it_answers_again(
    watch: NodeWatch, caplog: pytest.LogCaptureFixture
) -> None:
    (node,) = watch.nodes()
    assert watch.capacity([POOL]) == {POOL.name: 1}
    (agent,) = agents()
    agent.send_signal(signal.SIGSTOP)
    try:
        until(watch, lambda: node.node_id in watch.lost)
        assert watch.nodes() == []
        assert watch.capacity([POOL]) == {POOL.name: 0}
        assert "does not answer and counts as lost" in caplog.text
    finally:
        agent.send_signal(signal.SIGCONT)
    until(watch, lambda: not watch.lost)
    assert watch.capacity([POOL]) == {POOL.name: 1}


def test_an_agent_that_dies_is_replaced_and_its_node_is_not_lost(watch: NodeWatch) -> None:
    (agent,) = agents()
    before = next(iter(watch._watched.values())).agent
    agent.kill()
    until(watch, lambda: next(iter(watch._watched.values())).agent is not before)
    assert not watch.lost
    until(watch, lambda: next(iter(watch._watched.values())).heard)
    assert not watch.lost


def test_a_coordinator_that_was_away_blames_no_node(watch: NodeWatch) -> None:
    (agent,) = agents()
    agent.send_signal(signal.SIGSTOP)
    try:
        watched = next(iter(watch._watched.values()))
        away_s = 100.0
        watched.asked_s -= away_s
        watch._looked_s -= away_s
        watch.turn(frozenset())
        assert not watch.lost, "the answer may lie waiting; it gets its full time again"
        until(watch, lambda: bool(watch.lost))
    finally:
        agent.send_signal(signal.SIGCONT)


def test_a_distrusted_node_is_trusted_again_after_a_while(watch: NodeWatch) -> None:
    (node,) = watch.nodes()
    watch.distrust(node.node_id)
    assert watch.distrusted == {node.node_id}
    assert watch.trusted_capacity([POOL]) == {POOL.name: 0}
    assert watch.capacity([POOL]) == {POOL.name: 1}, "where there is no other it is used"
    time.sleep(RULE.distrust_s)
    assert watch.distrusted == frozenset()


def test_a_node_is_there_while_its_raylet_listens(watch: NodeWatch) -> None:
    (node,) = watch.nodes()
    assert not watch.is_lost(node.node_id)
    assert watch.is_lost("a node that was never there")
