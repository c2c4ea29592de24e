"""The nodes of a joined cluster, watched: an agent on each answers heartbeats and keeps the node clean.

Ray takes tens of seconds to see that a node has gone without a word, and meanwhile places work there. Here a node whose
agent does not answer in time counts as lost, until it answers again.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.janitor import Leases, TaggedProcess, end_orphans, end_tagged, tagged_processes
from cluster.placement import NodeView, live_nodes
from cluster.processes import ProcessId, node_folder
from cluster.ray_session import RayCluster
from search_spaces.hardware import NodePool

CLOSE_LIMIT_S = 3.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WatchRule:
    """How nodes are watched, in seconds.

    An agent is asked every `beat_s` and must answer within `silence_s`, its first answer within `start_s`. It looks for
    processes without a lease every `scan_s`, and takes the coordinator for lost after `abandoned_s` without a word. A
    node on which something was unhealthy is avoided for `distrust_s` where others can do its work, and those of
    `avoided_hosts` always are.
    """

    beat_s: float = 2.0
    silence_s: float = 20.0
    start_s: float = 90.0
    scan_s: float = 30.0
    abandoned_s: float = 300.0
    distrust_s: float = 300.0
    avoided_hosts: frozenset[str] = frozenset()


class NodeAgent:
    """An actor on each node; a plain class."""

    def __init__(self, study: str, coordinator: ProcessId, rule: WatchRule) -> None:
        self._study, self._coordinator, self._rule = study, coordinator, rule
        self._lock = threading.Lock()
        self._leases = Leases(coordinator, abandoned_s=rule.abandoned_s, now_s=time.monotonic())
        self._ended: list[TaggedProcess] = []
        self._closed = threading.Event()
        threading.Thread(target=self._keep_clean, daemon=True).start()

    def beat(self, trials: frozenset[str]) -> list[TaggedProcess]:
        """The coordinator lives and runs `trials`; returns the processes that were ended here since the last time."""
        with self._lock:
            self._leases.renew(trials, time.monotonic())
            ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        """End nothing any more, and remove what the coordinator's actors have kept on this node alone."""
        self._closed.set()
        shutil.rmtree(node_folder(self._coordinator), ignore_errors=True)  # mostly there is none

    def _keep_clean(self) -> None:
        while not self._closed.wait(self._rule.scan_s):
            found = tagged_processes(self._study)
            with self._lock:
                unwanted = self._leases.without(found, time.monotonic())
            end_tagged(unwanted)
            orphans = end_orphans(self._study)
            with self._lock:
                self._ended += [*unwanted, *orphans]


@dataclass(kw_only=True)
class _Watched:
    """A node and its agent; `asked_s` is when the question that waits for its answer was put."""

    agent: Any
    question: Any
    asked_s: float
    heard: bool = False
    lost: bool = False

    def overdue(self, rule: WatchRule, now_s: float) -> bool:
        return now_s - self.asked_s > (rule.silence_s if self.heard else rule.start_s)


class NodeWatch:
    """The nodes as they really are. Never waits; `turn` is called often.

    On a cluster of this machine alone there are no agents: its nodes end with this process.
    """

    def __init__(
        self, *, cluster: RayCluster, study: str, coordinator: ProcessId, rule: WatchRule | None = None
    ) -> None:
        self._cluster, self._study, self._coordinator = cluster, study, coordinator
        self._rule = rule or WatchRule()
        self._watched: dict[str, _Watched] = {}
        self._nodes: list[NodeView] = []
        self._looked_s = float("-inf")
        self._capacity: dict[tuple[tuple[str, int], ...], dict[str, int]] = {}
        self._distrusted: dict[str, float] = {}
        self._dead: set[str] = set()
        self.ended: list[TaggedProcess] = []
        self._look()

    @property
    def lost(self) -> frozenset[str]:
        """Ids of nodes that Ray counts as alive and that do not answer."""
        return frozenset(self._dead.union(node_id for node_id, watched in self._watched.items() if watched.lost))

    @property
    def distrusted(self) -> frozenset[str]:
        """Ids of nodes that are better avoided for a while."""
        now_s = time.monotonic()
        avoided = {node.node_id for node in self._nodes if node.host in self._rule.avoided_hosts}
        return frozenset(avoided.union(node_id for node_id, until_s in self._distrusted.items() if now_s < until_s))

    def is_lost(self, node_id: str) -> bool:
        """True where the node does not answer, or where its Ray is found to be gone now."""
        if node_id not in self.lost and self._cluster.is_lost(node_id):
            self._dead.add(node_id)  # for good: a raylet that starts again has another id
            self._capacity.clear()
        return node_id in self.lost

    def distrust(self, node_id: str) -> None:
        """Something on the node was not as it should be."""
        self._distrusted[node_id] = time.monotonic() + self._rule.distrust_s

    def nodes(self) -> list[NodeView]:
        """The nodes that are there, as of the last turn."""
        lost = self.lost
        return [node for node in self._nodes if node.node_id not in lost]

    def trusted_capacity(self, pools: Sequence[NodePool]) -> dict[str, int]:
        """How many nodes that are not distrusted each of `pools` has."""
        shunned = self.distrusted
        return live_nodes(pools, [node for node in self.nodes() if node.node_id not in shunned])

    def capacity(self, pools: Sequence[NodePool]) -> dict[str, int]:
        """How many nodes each of `pools` has, as of the last turn."""
        key = tuple((pool.name, pool.nodes) for pool in pools)
        if key not in self._capacity:
            self._capacity[key] = live_nodes(pools, self.nodes())
        return self._capacity[key]

    def turn(self, trials: frozenset[str]) -> None:
        """Hear from the agents, and tell them which trials are run."""
        now_s = time.monotonic()
        since_s = now_s - self._looked_s
        if since_s < self._rule.beat_s:
            return
        if since_s > self._rule.silence_s / 2.0:  # this process itself was away: answers may lie waiting
            for watched in self._watched.values():
                watched.asked_s = now_s
        self._look()
        if self._cluster.local:
            return
        known = {node.node_id for node in self._nodes}
        for gone in self._watched.keys() - known:
            del self._watched[gone]
        for node_id in known:
            self._beat(node_id, trials, now_s)

    def close(self) -> None:
        """End the agents."""
        import ray

        farewells = [watched.agent.close.remote() for watched in self._watched.values() if not watched.lost]
        if farewells:
            ray.wait(farewells, num_returns=len(farewells), timeout=CLOSE_LIMIT_S)
        for watched in self._watched.values():
            ray.kill(watched.agent)
        self._watched.clear()

    def _look(self) -> None:
        self._looked_s = time.monotonic()
        self._nodes = self._cluster.nodes()
        self._dead &= {node.node_id for node in self._nodes}
        self._capacity.clear()

    def _beat(self, node_id: str, trials: frozenset[str], now_s: float) -> None:
        """Take the answer of a node's agent and ask it again; one that is gone is replaced."""
        watched = self._watched.get(node_id)
        if watched is None:
            agent = self._make_agent(node_id)
            self._watched[node_id] = _Watched(agent=agent, question=agent.beat.remote(trials), asked_s=now_s)
            return
        answered = self._answered(watched)
        if answered is None:
            self._judge(node_id, watched, lost=watched.overdue(self._rule, now_s))
        elif answered:
            watched.heard = True
            self._judge(node_id, watched, lost=False)
            watched.question, watched.asked_s = watched.agent.beat.remote(trials), now_s
        else:
            watched.agent = self._make_agent(node_id)
            watched.question, watched.heard = watched.agent.beat.remote(trials), False
            self._judge(node_id, watched, lost=watched.overdue(self._rule, now_s))

    def _answered(self, watched: _Watched) -> bool | None:
        """True where the agent has answered, False where it is gone, None where it is still to be waited for."""
        import ray

        done, _ = ray.wait([watched.question], timeout=0, fetch_local=False)
        if not done:
            return None
        try:
            self.ended += ray.get(watched.question, timeout=1.0)
        except ray.exceptions.RayError:
            return False
        return True

    def _judge(self, node_id: str, watched: _Watched, *, lost: bool) -> None:
        if lost != watched.lost:
            watched.lost = lost
            self._capacity.clear()
            host = next((node.host for node in self._nodes if node.node_id == node_id), "?")
            what = "does not answer and counts as lost" if lost else "answers again"
            _log.warning("node %s (%s) %s", host, node_id[:8], what)

    def _make_agent(self, node_id: str) -> Any:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        there = NodeAffinitySchedulingStrategy(node_id, soft=False)
        options = {"num_cpus": 0, "max_restarts": 0, "scheduling_strategy": there}
        return ray.remote(NodeAgent).options(**options).remote(self._study, self._coordinator, self._rule)
