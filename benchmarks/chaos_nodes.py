"""The nodes of the chaos benchmark: a Ray cluster in a process of its own, whose nodes can be killed and replaced.

    python benchmarks/chaos_nodes.py NODES TRIALS_AT_ONCE

prints its address, and then obeys lines on its standard input: `kill N` ends the raylet of node N with SIGKILL and puts
a new node with the same labels in its place. It ends, with all nodes, when its standard input does. The head node runs
no trial: a cluster without its head is another fault (Ray's own, see its high availability), and is not tried here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cluster.placement import CLIENT_CPUS, HOST_CPUS_PER_GPU, ROUTER_CPUS
from cluster.ray_emulated import OBJECT_STORE_BYTES

GPU_TYPES = ("h200", "h100", "a100")
GPUS_PER_NODE = 4


def gpu_type(node: int) -> str:
    """The label of node `node`: the types take turns."""
    return GPU_TYPES[node % len(GPU_TYPES)]


class Nodes:
    """A head and `count` nodes with GPUs that are not there."""

    def __init__(self, count: int, trials_at_once: int) -> None:
        from ray.cluster_utils import Cluster

        self._trials_at_once = trials_at_once
        self._cluster: Any = Cluster()
        self._cluster.add_node(num_cpus=0, object_store_memory=OBJECT_STORE_BYTES, include_dashboard=False)
        self._started = 0
        self._nodes = [self._start(number) for number in range(count)]

    @property
    def address(self) -> str:
        """Where drivers join."""
        return str(self._cluster.address)

    def _start(self, number: int) -> Any:
        """A node with an address of its own, so that no driver takes it for its own node."""
        self._started += 1
        cpus = GPUS_PER_NODE * HOST_CPUS_PER_GPU + self._trials_at_once * (CLIENT_CPUS + ROUTER_CPUS)
        return self._cluster.add_node(
            num_cpus=int(cpus),
            num_gpus=GPUS_PER_NODE,
            labels={"gpu": gpu_type(number)},
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            node_ip_address=f"127.0.1.{self._started}",
        )

    def replace(self, number: int) -> int:
        """Kill the raylet of node `number` as it stands, and start a node in its place; returns what was killed."""
        node = self._nodes[number]
        raylet: int = node.all_processes["raylet"][0].process.pid
        self._cluster.remove_node(node, allow_graceful=False)
        self._nodes[number] = self._start(number)
        return raylet

    def close(self) -> None:
        """End all nodes."""
        self._cluster.shutdown()


def main() -> None:
    """Serve until standard input ends."""
    nodes = Nodes(int(sys.argv[1]), int(sys.argv[2]))
    try:
        print(json.dumps({"address": nodes.address}), flush=True)
        for line in sys.stdin:
            _, number = line.split()
            print(json.dumps({"killed": nodes.replace(int(number))}), flush=True)
    finally:
        nodes.close()


if __name__ == "__main__":
    main()
