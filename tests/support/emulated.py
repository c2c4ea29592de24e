"""Emulated replicas for tests: profiles of round numbers, processes, and what is sent to them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.engines.base import ReplicaSpec
from cluster.engines.emulated import EmulatedBackend
from search_spaces.emulation import EngineProfile, Fault, GpuMemory, HandOver, Noise, StepTimes
from search_spaces.model import Attention, DenseFeedForward, LayerGroup, ModelSpec
from search_spaces.serving import Pool, Role, make_options
from search_spaces.workload import Length, Workload
from tests.support.processes import Child, child, free_port, wait_until_healthy

GIB = 2.0**30
EXACT = Noise(step=0.0, launch=0.0)
WORKLOAD = Workload(isl=Length(mean=1024), osl=Length(mean=256))
BIG_MODEL = ModelSpec(
    name="big",
    hidden_size=8192,
    vocab_size=128256,
    layers=(
        LayerGroup(
            count=80,
            attention=Attention(heads=64, kv_heads=8, head_dim=128),
            feed_forward=DenseFeedForward(intermediate_size=28672),
        ),
    ),
    max_context=131072,
)


def flat_times(*, decode_ms: float = 10.0, token_ms: float = 0.05) -> StepTimes:
    """A decode step takes `decode_ms` whatever its size; each prompt token `token_ms` besides."""
    tokens, seqs, contexts = (1.0, 4096.0), (0.0, 256.0), (1.0, 8192.0)
    row = (decode_ms, decode_ms)
    mixed = tuple(((decode_ms + t * token_ms,) * 2, (decode_ms + t * token_ms,) * 2) for t in tokens)
    return StepTimes(tokens=tokens, seqs=seqs, contexts=contexts, decode_ms=(row, row), mixed_ms=mixed)


def profile(*, kv_tokens: int = 100_000, **changes: Any) -> EngineProfile:
    """A replica on one GPU whose KV cache holds `kv_tokens` tokens at 0.9 of the memory."""
    memory = GpuMemory(
        total_bytes=80 * GIB,
        weight_bytes=40 * GIB,
        fixed_bytes=2 * GIB,
        kv_bytes_per_token=30 * GIB / (kv_tokens + 0.5),
    )
    values: dict[str, Any] = {
        "gpu": "h100_sxm",
        "gpus": 1,
        "times": flat_times(),
        "memory": memory,
        "hand_over": HandOver(bytes_per_token=1e6, bandwidth=5e10),
    }
    return EngineProfile(**values | changes)


def backend(fault: Fault | None = None, noise: Noise = EXACT, **changes: Any) -> EmulatedBackend:
    """An engine with the profile of `profile(**changes)` in every role."""
    return EmulatedBackend(profiles=dict.fromkeys(Role, profile(**changes)), noise=noise, fault=fault)


def pool(role: Role = Role.MIXED, **options: Any) -> Pool:
    return Pool(role=role, node_pool="fake", options=make_options(options))


def replica_spec(directory: Path, own: Pool, peer: Pool | None = None, **changes: Any) -> ReplicaSpec:
    values: dict[str, Any] = {
        "trial": "test",
        "pool": own,
        "peer": peer,
        "index": 0,
        "host": "127.0.0.1",
        "port": free_port(),
        "model": BIG_MODEL,
        "workload": WORKLOAD,
        "device_ids": (),
        "work_dir": directory,
        "shared_dir": directory,
    }
    return ReplicaSpec(**values | changes)


@contextmanager
def replica(
    directory: Path, engine: EmulatedBackend, own: Pool, *, healthy: bool = True, **changes: Any
) -> Iterator[tuple[str, Child]]:
    """Base URL and process of a replica, healthy unless that is not waited for."""
    peer_role = {Role.PREFILL: Role.DECODE, Role.DECODE: Role.PREFILL}.get(own.role)
    peer = None if peer_role is None else replace(own, role=peer_role)
    spec = replica_spec(directory, own, peer, **changes)
    url = f"http://127.0.0.1:{spec.port}"
    command = engine.replica_command(spec)
    command.write_files()
    with child(command.argv, directory / f"{own.role}-{spec.port}.log") as process:
        if healthy:
            wait_until_healthy(url, process)
        yield url, process
