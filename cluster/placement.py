"""Where the parts of a deployment go: a pure function from configuration and node pools to bundles of resources.

One bundle holds one process (a replica, the router) or the load generator. Device groups of a tensor-parallel rank set
never split over nodes; a replica splits over nodes between its pipeline stages or data-parallel ranks, and only where
it cannot be placed whole (it then has several bundles).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from search_spaces.errors import TunerError
from search_spaces.hardware import DeviceKind, NodePool
from search_spaces.problem import Problem
from search_spaces.serving import Mode, Pool, Role, ServingConfig

CLIENT_CPUS = 1.0
ROUTER_CPUS = 0.5
HOST_CPUS_PER_GPU = 1.0
"""CPUs that the host side of an engine reserves for each GPU."""
ACCELERATOR_SHARE = 0.001
"""Share of Ray's marker resource `accelerator_type:X` that a bundle asks for; nodes hold 1 of it."""


class PlacementError(TunerError):
    """A deployment, or a declared node pool, that no node of the cluster can hold."""


class BundleKind(StrEnum):
    """What runs in a bundle."""

    REPLICA = "replica"
    ROUTER = "router"
    CLIENT = "client"


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """Resources for one part of a deployment, all on one node.

    `group` counts the bundles of a replica, 0 for one that is whole. `node` is the number of the node in its pool on
    which the plan puts it: it shows that everything fits, and the cluster may choose another.
    """

    kind: BundleKind
    name: str
    cpus: float
    gpus: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    accelerator_type: str | None = None
    node_pool: str | None = None
    node: int | None = None
    role: Role | None = None
    index: int = 0
    group: int = 0
    devices: int = 0

    @property
    def resources(self) -> dict[str, float]:
        """Amounts by Ray's resource names."""
        amounts = {"CPU": self.cpus, "GPU": float(self.gpus)}
        if self.accelerator_type is not None:
            amounts[f"accelerator_type:{self.accelerator_type}"] = ACCELERATOR_SHARE
        return {name: amount for name, amount in amounts.items() if amount > 0}


@dataclass(frozen=True, kw_only=True)
class Placement:
    """All bundles of a deployment: its replicas in the order of its pools, then the router, then the client."""

    bundles: tuple[Bundle, ...]

    @property
    def replicas(self) -> tuple[Bundle, ...]:
        """The bundles of replicas."""
        return tuple(b for b in self.bundles if b.kind is BundleKind.REPLICA)

    @property
    def router(self) -> Bundle | None:
        """The bundle of the router, None where the load goes straight to the only replica."""
        return next((b for b in self.bundles if b.kind is BundleKind.ROUTER), None)

    @property
    def client(self) -> Bundle:
        """The bundle of the load generator."""
        return next(b for b in self.bundles if b.kind is BundleKind.CLIENT)

    @property
    def leaders(self) -> tuple[Bundle, ...]:
        """The bundles whose process serves HTTP: one of each replica."""
        return tuple(b for b in self.replicas if b.group == 0)

    def parts(self, leader: Bundle) -> tuple[Bundle, ...]:
        """The bundles of the replica of `leader`, which comes first; alone where the replica is whole."""
        return tuple(b for b in self.replicas if (b.role, b.index) == (leader.role, leader.index))

    @property
    def spanning(self) -> tuple[str, ...]:
        """Names of the bundles that are only a part of a replica and do not lead it: the engine must span nodes."""
        return tuple(b.name for b in self.replicas if b.group > 0)


def needs_router(config: ServingConfig) -> bool:
    """True where requests must be spread over replicas, or handed from prefill to decode."""
    return config.mode is Mode.DISAGGREGATED or config.pools[0].replicas > 1


def plan_placement(config: ServingConfig, problem: Problem, live: Mapping[str, int] | None = None) -> Placement:
    """Bundles of `config`; raises `PlacementError` where the pools cannot hold it, however idle they are.

    `live` is how many nodes of each pool there are now, None for as many as are declared.
    """
    nodes = {name: _free_nodes(problem.node_pool(name), live) for name in _pool_names([config])}
    parts: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for wanted in _largest_first(config):
        pool = config.pools[wanted[0]]
        parts[wanted] = _place_replica(pool, problem.node_pool(pool.node_pool), nodes[pool.node_pool])
    bundles = [
        bundle
        for (pool_index, index), placed in sorted(parts.items())
        for bundle in _replica_bundles(config.pools[pool_index], index, placed, problem)
    ]
    if needs_router(config):
        bundles.append(Bundle(kind=BundleKind.ROUTER, name="router", cpus=ROUTER_CPUS))
    bundles.append(Bundle(kind=BundleKind.CLIENT, name="client", cpus=CLIENT_CPUS))
    return Placement(bundles=tuple(bundles))


def fit_together(configs: Sequence[ServingConfig], problem: Problem, live: Mapping[str, int] | None = None) -> bool:
    """True where the pools hold all of `configs` at once (first-fit decreasing; client and router not counted).

    `live` as for `plan_placement`.
    """
    for name in _pool_names(configs):
        pool = problem.node_pool(name)
        free = _free_nodes(pool, live)
        replicas = [p for c in configs for p in c.pools if p.node_pool == name for _ in range(p.replicas)]
        try:
            for replica in sorted(replicas, key=lambda p: -p.devices_per_replica):
                _place_replica(replica, pool, free)
        except PlacementError:
            return False
    return True


def _pool_names(configs: Iterable[ServingConfig]) -> list[str]:
    return sorted({pool.node_pool for config in configs for pool in config.pools})


def _free_nodes(pool: NodePool, live: Mapping[str, int] | None) -> list[int]:
    nodes = pool.nodes if live is None else min(pool.nodes, live.get(pool.name, 0))
    return [pool.devices_per_node] * nodes


def _largest_first(config: ServingConfig) -> list[tuple[int, int]]:
    """(pool index, replica index), large replicas first."""
    wanted = [(p, i) for p, pool in enumerate(config.pools) for i in range(pool.replicas)]
    return sorted(wanted, key=lambda w: (-config.pools[w[0]].devices_per_replica, w))


def _place_replica(pool: Pool, nodes: NodePool, free: list[int]) -> list[tuple[int, int]]:
    """(node, devices) of each bundle of one replica, taken out of `free`: whole where possible, else by groups."""
    group = pool.parallelism.tp * pool.devices_per_rank
    _check_group(pool, nodes, group)
    whole = next((n for n, room in enumerate(free) if room >= pool.devices_per_replica), None)
    if whole is not None:
        free[whole] -= pool.devices_per_replica
        return [(whole, pool.devices_per_replica)]
    return _equal_parts(pool, free) or _any_parts(pool, nodes, free, group)


def _equal_parts(pool: Pool, free: list[int]) -> list[tuple[int, int]]:
    """A split into parts of one size on as few nodes as possible, as most engines want it; empty where there is none.

    Whole data-parallel ranks stay together where that is possible.
    """
    sizes = pool.parallelism
    for units in (sizes.dp, sizes.dp * sizes.pp):
        for count in (n for n in range(2, units + 1) if units % n == 0):
            share = pool.devices_per_replica // count
            roomy = [node for node, room in enumerate(free) if room >= share][:count]
            if len(roomy) == count:
                for node in roomy:
                    free[node] -= share
                return [(node, share) for node in roomy]
    return []


def _any_parts(pool: Pool, nodes: NodePool, free: list[int], group: int) -> list[tuple[int, int]]:
    """A split into groups wherever they fit."""
    placed: dict[int, int] = {}
    for _ in range(pool.parallelism.pp * pool.parallelism.dp):
        node = next((n for n, room in enumerate(free) if room >= group), None)
        if node is None:
            raise _full(pool, nodes, group)
        free[node] -= group
        placed[node] = placed.get(node, 0) + group
    return sorted(placed.items())


def _check_group(pool: Pool, nodes: NodePool, group: int) -> None:
    if group > nodes.devices_per_node:
        raise PlacementError(
            f"a replica of the {pool.role} pool needs {group} devices on one node (tp={pool.parallelism.tp} x "
            f"{pool.devices_per_rank} per rank), but a node of pool {nodes.name!r} has {nodes.devices_per_node}; "
            "lower tp or use pipeline stages"
        )


def _full(pool: Pool, nodes: NodePool, group: int) -> PlacementError:
    return PlacementError(
        f"{pool.replicas} replicas of {pool.devices_per_replica} devices (groups of {group}) in the {pool.role} pool "
        f"do not fit into pool {nodes.name!r} of {nodes.nodes} nodes x {nodes.devices_per_node} devices beside the "
        "rest of the deployment; use fewer or smaller replicas"
    )


def _replica_bundles(pool: Pool, index: int, placed: list[tuple[int, int]], problem: Problem) -> list[Bundle]:
    nodes = problem.node_pool(pool.node_pool)
    on_gpu = nodes.device.kind is DeviceKind.GPU
    bundles = []
    for group, (node, devices) in enumerate(placed):
        name = f"{pool.role}-{index}"
        bundle = Bundle(
            kind=BundleKind.REPLICA,
            name=name if len(placed) == 1 else f"{name}.{group}",
            cpus=devices * HOST_CPUS_PER_GPU if on_gpu else float(devices),
            gpus=devices if on_gpu else 0,
            labels=dict(nodes.labels),
            accelerator_type=nodes.accelerator_type,
            node_pool=nodes.name,
            node=node,
            role=pool.role,
            index=index,
            group=group if len(placed) > 1 else 0,
            devices=devices,
        )
        bundles.append(bundle)
    return bundles


@dataclass(frozen=True, kw_only=True)
class NodeView:
    """A live node of the cluster: what it offers, whoever uses it now."""

    node_id: str
    host: str
    ip: str
    cpus: float
    gpus: float
    labels: Mapping[str, str] = field(default_factory=dict)
    accelerator_types: frozenset[str] = frozenset()

    def belongs_to(self, pool: NodePool) -> bool:
        """True where the node carries the pool's labels and accelerator type and has its devices."""
        has_labels = all(self.labels.get(key) == value for key, value in pool.labels.items())
        has_type = pool.accelerator_type is None or pool.accelerator_type in self.accelerator_types
        devices = self.gpus if pool.device.kind is DeviceKind.GPU else self.cpus
        return has_labels and has_type and devices >= pool.devices_per_node

    def __str__(self) -> str:
        marks = [f"{key}={value}" for key, value in sorted(self.labels.items()) if not key.startswith("ray.io/")]
        marks += sorted(self.accelerator_types)
        return f"{self.host} ({self.cpus:g} CPUs, {self.gpus:g} GPUs{''.join(', ' + mark for mark in marks)})"


def live_nodes(pools: Sequence[NodePool], nodes: Sequence[NodeView]) -> dict[str, int]:
    """How many of `nodes` each pool has, at most as many as it declares; no node is counted for two pools.

    A node that several pools could have goes to the one that asks for most labels, then to the first by name.
    """
    counts = dict.fromkeys((pool.name for pool in pools), 0)
    picky = sorted(pools, key=lambda pool: (-len(pool.labels) - (pool.accelerator_type is not None), pool.name))
    for node in nodes:
        pool = next((p for p in picky if counts[p.name] < p.nodes and node.belongs_to(p)), None)
        if pool is not None:
            counts[pool.name] += 1
    return counts


def missing_nodes(config: ServingConfig, problem: Problem, live: Mapping[str, int]) -> str:
    """Which pools of `config` have fewer nodes than they declare, in words."""
    pools = [problem.node_pool(name) for name in _pool_names([config])]
    short = [f"pool {p.name!r} has {live.get(p.name, 0)} of {p.nodes}" for p in pools if live.get(p.name, 0) < p.nodes]
    return ", ".join(short) or "no node is missing"


def check_pools(pools: Sequence[NodePool], nodes: Sequence[NodeView]) -> None:
    """Raise `PlacementError` where a declared pool is not there, or nothing is left for the load generator."""
    for pool in pools:
        alike = [p for p in pools if _selector(p) == _selector(pool)]
        wanted = sum(p.nodes for p in alike)
        found = [node for node in nodes if node.belongs_to(pool)]
        if len(found) < wanted:
            raise PlacementError(_pool_missing(pool, wanted, found, nodes))
    needed = sum(p.devices * (HOST_CPUS_PER_GPU if p.device.kind is DeviceKind.GPU else 1.0) for p in pools)
    total = sum(node.cpus for node in nodes)
    if total < needed + CLIENT_CPUS + ROUTER_CPUS:
        raise PlacementError(
            f"the cluster has {total:g} CPUs, but the node pools take {needed:g} and the load generator and router "
            f"{CLIENT_CPUS + ROUTER_CPUS:g}; declare fewer devices per node, or give Ray more CPUs"
        )


def _selector(pool: NodePool) -> tuple[object, ...]:
    return (tuple(sorted(pool.labels.items())), pool.accelerator_type, pool.device.kind)


def _pool_missing(pool: NodePool, wanted: int, found: Sequence[NodeView], nodes: Sequence[NodeView]) -> str:
    marks = [f"{key}={value}" for key, value in sorted(pool.labels.items())]
    if pool.accelerator_type is not None:
        marks.append(f"accelerator type {pool.accelerator_type}")
    unit = "GPUs" if pool.device.kind is DeviceKind.GPU else "CPUs"
    return (
        f"node pool {pool.name!r} needs {wanted} nodes with {pool.devices_per_node} {unit}"
        f"{' and ' + ', '.join(marks) if marks else ''}, but the cluster has {len(found)} of them: "
        f"{'; '.join(map(str, nodes)) or 'no node at all'}. Correct the pool, or start Ray with such nodes "
        "(ray start --labels, --num-cpus, --num-gpus)"
    )
