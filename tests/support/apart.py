"""Replicas of engines that live apart, for tests that build their commands without starting them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.engines.base import LaunchCommand, ReplicaPart, ReplicaSpec, RouterSpec
from cluster.engines.catalogue import BACKENDS_APART
from cluster.engines.installation import Installation
from search_spaces.hardware import DeviceKind
from search_spaces.model import Attention, DenseFeedForward, LayerGroup, ModelSpec
from search_spaces.serving import Parallelism, Pool, Role, make_options
from search_spaces.workload import Length, Workload

DRAFT = "example/draft-model"
INSTALLATIONS = {
    "gpus": Installation(device=DeviceKind.GPU, draft_model=DRAFT),
    "cores": Installation(device=DeviceKind.CPU, command=("/opt/vllm-cpu/bin/vllm",)),
}
WORKLOAD = Workload(isl=Length(mean=2000), osl=Length(mean=200))
MODEL = ModelSpec(
    name="served",
    hidden_size=4096,
    vocab_size=128_256,
    layers=(
        LayerGroup(
            count=32,
            attention=Attention(heads=32, kv_heads=8, head_dim=128),
            feed_forward=DenseFeedForward(intermediate_size=14_336),
        ),
    ),
    max_context=8192,
    source="example/served-model",
)
SHARED, OWN = Path("/shared"), Path("/work")


def backend(engine: str, installations: Mapping[str, Installation] = INSTALLATIONS) -> Any:
    return BACKENDS_APART[engine](installations)


def pool(role: Role = Role.MIXED, *, on: str = "gpus", sizes: Mapping[str, int] | None = None, **options: Any) -> Pool:
    return Pool(
        role=role,
        node_pool=on,
        parallelism=Parallelism(**(sizes or {})),
        devices_per_rank=options.get("threads", 1),
        options=make_options(options),
    )


def replica(own: Pool, *, port: int = 8000, host: str = "10.0.0.1", **changes: Any) -> ReplicaSpec:
    values: dict[str, Any] = {
        "trial": "t",
        "pool": own,
        "index": 0,
        "host": host,
        "port": port,
        "model": MODEL,
        "workload": WORKLOAD,
        "device_ids": tuple(range(own.devices_per_replica)),
        "work_dir": OWN,
        "shared_dir": SHARED,
    }
    return ReplicaSpec(**values | changes)


def router(**changes: Any) -> RouterSpec:
    values: dict[str, Any] = {"trial": "t", "host": "10.0.0.9", "port": 9000, "model": MODEL, "shared_dir": SHARED}
    return RouterSpec(**values | changes)


@dataclass(frozen=True)
class Case:
    """A deployment whose commands are compared with a reviewed file: replicas of an engine, or parts of one."""

    replicas: Mapping[str, ReplicaSpec]
    reviewed_against: tuple[str, ...] = field(default=())


def commands(engine: str, case: Case) -> dict[str, LaunchCommand]:
    return {name: backend(engine).replica_command(spec) for name, spec in case.replicas.items()}


def whole(own: Pool, **changes: Any) -> dict[str, ReplicaSpec]:
    return {f"{own.role}-0": replica(own, **changes)}


def pair(sizes_prefill: Mapping[str, int], sizes_decode: Mapping[str, int], **options: Any) -> dict[str, ReplicaSpec]:
    """A prefill replica on one node and a decode replica on another."""
    on = options.pop("on", "gpus")
    workload = options.pop("workload", WORKLOAD)
    prefill = pool(Role.PREFILL, sizes=sizes_prefill, on=on, **options)
    decode = pool(Role.DECODE, sizes=sizes_decode, on=on, **options)
    return {
        "prefill-0": replica(prefill, peer=decode, workload=workload),
        "decode-0": replica(decode, peer=prefill, host="10.0.0.2", workload=workload),
    }


def over_two_nodes(own: Pool) -> dict[str, ReplicaSpec]:
    """A replica on two nodes with half of its devices on each."""
    half = own.devices_per_replica // 2
    hosts = ("10.0.0.1", "10.0.0.2")
    parts = (ReplicaPart(rank=rank, hosts=hosts, devices=(half, half), rendezvous_port=29_500) for rank in (0, 1))
    return {
        f"{own.role}-0.{part.rank}": replica(own, host=hosts[part.rank], device_ids=tuple(range(half)), part=part)
        for part in parts
    }
