"""Stand-ins for the nodes of a cluster, all on this machine: Ray nodes with the labels and resources of node pools.

What is placed on them goes the ordinary way (placement groups, label selectors, actors); only the GPUs are not there.
All of it ends with the driver, however that ends: the kernel ends a node's processes with the thread that started them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from cluster.placement import CLIENT_CPUS, HOST_CPUS_PER_GPU, ROUTER_CPUS
from cluster.ray_session import ClusterError, RayCluster, connect, keep_ray_quiet
from search_spaces.hardware import DeviceKind, NodePool

_log = logging.getLogger(__name__)
MOST_NODES = 16
"""Each node costs some 150 MB and half a second of one core to start."""
OBJECT_STORE_BYTES = 80 * 2**20
"""Nearly the least that Ray takes; results of trials are files."""


@contextmanager
def emulated_cluster(pools: Sequence[NodePool], *, trials_at_once: int = 1) -> Iterator[RayCluster]:
    """The nodes of `pools` on this machine, joined; they end with the block.

    Raises `ClusterError` for pools that nothing can stand for (CPU pools are measured for real) or too many nodes.
    """
    _check(pools)
    keep_ray_quiet()
    from ray.cluster_utils import Cluster

    cluster: Any = Cluster()
    try:
        for pool in pools:
            for _ in range(pool.nodes):
                cluster.add_node(**_node(pool, trials_at_once))
        with connect(cluster.address, pools, trials_at_once=trials_at_once) as joined:
            note = (
                f"the {sum(p.nodes for p in pools)} nodes are EMULATED on this machine: no figure of this study is "
                "measured on the hardware that it names"
            )
            _log.warning(note)
            yield replace(joined, local=True, warnings=(*joined.warnings, note))
    finally:
        cluster.shutdown()


def _check(pools: Sequence[NodePool]) -> None:
    on_cpu = [pool.name for pool in pools if pool.device.kind is not DeviceKind.GPU]
    if on_cpu:
        raise ClusterError(
            f"node pool {on_cpu[0]!r} has CPUs, which are measured and never emulated; give its nodes a GPU, or leave "
            "emulation out"
        )
    nodes = sum(pool.nodes for pool in pools)
    if nodes > MOST_NODES:
        raise ClusterError(
            f"the node pools have {nodes} nodes, and this machine stands for at most {MOST_NODES}; declare fewer, or "
            "start Ray nodes with the pools' labels and join them with --address"
        )


def _node(pool: NodePool, trials_at_once: int) -> dict[str, object]:
    """What `ray start` of one node would be told; any node may hold the clients and routers of all trials."""
    spare = trials_at_once * (CLIENT_CPUS + ROUTER_CPUS)
    marker = {} if pool.accelerator_type is None else {f"accelerator_type:{pool.accelerator_type}": 1.0}
    return {
        "num_cpus": math.ceil(pool.devices_per_node * HOST_CPUS_PER_GPU + spare),
        "num_gpus": pool.devices_per_node,
        "labels": dict(pool.labels),
        "resources": marker,
        "object_store_memory": OBJECT_STORE_BYTES,
        "include_dashboard": False,
    }
