"""What is written down beside the figures of a trial: environment, logs, price."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster.engines.base import EngineBackend
from cluster.node_facts import NodeFacts
from search_spaces.problem import Problem
from search_spaces.serving import ServingConfig

LOG_LIMIT_BYTES = 1_000_000


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
    for name, facts in sorted(nodes.items()):
        record[f"node.{name}"] = facts.host
        record[f"cores.{name}"] = ",".join(map(str, cores.get(name, ())))
    return record


def keep_logs(logs: Sequence[Path], folder: Path) -> dict[str, str]:
    """Copy the end of each log that is there into `folder`; paths by artefact name (`log_<file name>`)."""
    kept = {}
    for log in logs:
        if log.exists():
            folder.mkdir(parents=True, exist_ok=True)
            target = folder / log.name
            _copy_end(log, target)
            kept[f"log_{log.stem}"] = str(target)
    return kept


def _copy_end(source: Path, target: Path) -> None:
    size = source.stat().st_size
    if size <= LOG_LIMIT_BYTES:
        shutil.copyfile(source, target)
        return
    with source.open("rb") as file:
        file.seek(size - LOG_LIMIT_BYTES)
        end = file.read()
    target.write_bytes(f"[the first {size - LOG_LIMIT_BYTES} bytes are left out]\n".encode() + end)
