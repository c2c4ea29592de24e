"""A driver with an emulated cluster of three GPU types: measures what it is asked to and prints what became of it.

    python -m tests.support.emulated_driver FOLDER

A process of its own, as a driver joins one Ray at a time and the test session has its own.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

from cluster.engines.emulated import EmulatedBackend
from cluster.ray_emulated import emulated_cluster
from cluster.ray_runner import RayTrialRunner
from cluster.ray_session import RayCluster
from cluster.runner import Running, TrialRequest
from search_spaces.emulation import Fault, FaultKind
from search_spaces.hardware import NodePool
from search_spaces.known_gpus import known_gpu
from search_spaces.measuring import MeasurementRule, TimeLimits
from search_spaces.outcome import Failure, Outcome
from search_spaces.problem import Objective, Problem
from search_spaces.serving import Candidate, Parallelism, Pool, Role, ServingConfig
from search_spaces.workload import Arrival, Length, Load, Workload
from tests.support.emulated import BIG_MODEL, backend

STUDY = "emulated-cluster"
POOLS = tuple(
    NodePool(
        name=name,
        device=known_gpu(f"{name}_sxm"),
        nodes=1,
        devices_per_node=4,
        price_per_hour=price,
        labels={"gpu": name},
        accelerator_type=name.upper(),
    )
    for name, price in (("h200", 16.0), ("h100", 12.0), ("a100", 6.0))
)
PROBLEM = Problem(
    model=BIG_MODEL,
    workload=Workload(isl=Length(mean=128), osl=Length(mean=16)),
    node_pools=POOLS,
    objectives=(Objective(metric="ttft_p50_ms"), Objective(metric="tpot_p50_ms")),
)
LIMITS = TimeLimits(placement_s=60, start_s=60, measure_s=60, stop_s=10)
RULE = MeasurementRule(requests=24, lateness_limit_ms=5000.0)


def apart(prefill: str, decode: str) -> ServingConfig:
    """Prefill with two GPUs of one type, decode with four of another."""
    return ServingConfig(
        engine="emulated",
        pools=(
            Pool(role=Role.PREFILL, node_pool=prefill, parallelism=Parallelism(tp=2)),
            Pool(role=Role.DECODE, node_pool=decode, parallelism=Parallelism(tp=4)),
        ),
    )


def together(node_pool: str) -> ServingConfig:
    """Two replicas of two GPUs."""
    pool = Pool(role=Role.MIXED, node_pool=node_pool, replicas=2, parallelism=Parallelism(tp=2))
    return ServingConfig(engine="emulated", pools=(pool,))


def measure(
    cluster: RayCluster, folder: Path, name: str, config: ServingConfig, engine: EmulatedBackend, limits: TimeLimits
) -> dict[str, object]:
    """Measure `config` and say what became of it and where its parts ran."""
    load = Load(arrival=Arrival.CLOSED, value=4)
    request = TrialRequest(
        trial=name,
        candidate=Candidate(config=config, load=load),
        problem=PROBLEM,
        rule=RULE,
        limits=limits,
        artifact_dir=folder / name,
        seed=1,
    )
    places: dict[str, str] = {}
    labels = {node.node_id: node.labels.get("gpu", "") for node in cluster.nodes()}
    with RayTrialRunner(
        study=STUDY, backends={"emulated": engine}, cluster=cluster, work_dir=folder / "deployments"
    ) as runner:
        handle = runner.start(request)
        while isinstance(outcome := runner.poll(handle), Running):
            for deployment in runner._deployments:
                places |= {part: labels[facts.node_id] for part, facts in deployment._seats.facts.items()}
            time.sleep(0.02)
    return {"places": places, **said(outcome)}


def said(outcome: Outcome) -> dict[str, object]:
    """What the tests look at."""
    if isinstance(outcome, Failure):
        tail = outcome.log_tail
        return {"failure": str(outcome.reason), "detail": outcome.detail, "log": tail, "retryable": outcome.retryable}
    return {
        "emulated": outcome.emulated,
        "metrics": outcome.metrics.flat(),
        "engine": outcome.environment["engine_version"],
        "artifacts": sorted(outcome.artifacts),
    }


def main(folder: Path) -> None:
    """Run every scenario and print the answers as JSON."""
    out_of_memory = backend(Fault(kind=FaultKind.OUT_OF_MEMORY_UNDER_LOAD, after_requests=6))
    hangs = backend(Fault(kind=FaultKind.HANG_AT_BOOT))
    with emulated_cluster(POOLS) as cluster:
        answers = {
            "apart": measure(cluster, folder, "apart", apart("h200", "a100"), backend(), LIMITS),
            "together": measure(cluster, folder, "together", together("h100"), backend(), LIMITS),
            "out_of_memory": measure(cluster, folder, "oom", together("a100"), out_of_memory, LIMITS),
            "hangs": measure(cluster, folder, "hangs", together("a100"), hangs, replace(LIMITS, start_s=15.0)),
            "warnings": cluster.warnings,
        }
    print(json.dumps(answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
