"""What is written down beside the figures of a trial: environment, logs, price."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster.engines.base import EngineBackend, HandsOver
from cluster.node_facts import NodeFacts
from search_spaces.outcome import LaunchedProcess
from search_spaces.problem import Problem
from search_spaces.serving import ServingConfig


def price_per_hour(config: ServingConfig, problem: Problem) -> float:
    """Dollars per hour of the devices that `config` reserves."""
    return sum(pool.devices * problem.node_pool(pool.node_pool).price_per_device_hour for pool in config.pools)


def environment(
    *,
    backend: EngineBackend,
    ray_version: str,
    nodes: Mapping[str, NodeFacts],
    addresses: Mapping[str, str],
    cores: Mapping[str, Sequence[int]],
    shared: Sequence[str],
    oversubscribed: bool,
) -> dict[str, str]:
    """The record of where and with what a trial ran; `nodes` and `cores` are by bundle name, `addresses` by node id.

    `cores` is `own` where each bundle had its cores to itself, else `shared: ` and who did not.
    """
    hosts = {facts.node_id: facts for facts in nodes.values()}
    record = {
        "engine": backend.name,
        "engine_version": backend.version(),
        "python": platform.python_version(),
        "ray": ray_version,
        "nodes": "; ".join(sorted(f"{facts.host} ({addresses.get(key, '?')})" for key, facts in hosts.items())),
        "cpu_model": "; ".join(sorted({facts.cpu_model for facts in hosts.values()})),
        "cores": f"shared: {', '.join(sorted(shared))}" if shared else "own",
        "oversubscribed": str(oversubscribed).lower(),
    }
    gpus = sorted({model for facts in hosts.values() for model in facts.gpu_models})
    if gpus:
        record["gpu_model"] = "; ".join(gpus)
    drivers = sorted({facts.gpu_driver for facts in hosts.values() if facts.gpu_driver})
    if drivers:
        record["gpu_driver"] = "; ".join(drivers)
    for name, facts in sorted(nodes.items()):
        record[f"node.{name}"] = facts.host
        record[f"cores.{name}"] = ",".join(map(str, cores.get(name, ())))
    return record


def engine_facts(backend: EngineBackend, config: ServingConfig, processes: Sequence[LaunchedProcess]) -> dict[str, str]:
    """What replicas say of their engine (its version, on their own nodes), and what carries KV caches between them."""
    found = {}
    versions = sorted({process.engine_version for process in processes if process.engine_version})
    if versions:
        found["engine_version"] = "; ".join(versions)
    transport = backend.transport(config) if isinstance(backend, HandsOver) else None
    return found if transport is None else {**found, "kv_transport": transport}


def keep_logs(logs: Mapping[str, bytes], folder: Path) -> dict[str, str]:
    """Write the logs, by name, into `folder`; paths by artefact name (`log_<name>`)."""
    kept = {}
    for name, text in logs.items():
        if text:
            folder.mkdir(parents=True, exist_ok=True)
            target = folder / f"{name}.log"
            target.write_bytes(text)
            kept[f"log_{name}"] = str(target)
    return kept
