"""Measured trials to deploy: processes that are recorded as they are when they are started, without starting them."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from cluster.engines.base import PerDeployment, ReplicaPart, ReplicaSpec, RouterSpec
from cluster.launched import launched
from cluster.placement import needs_router
from search_spaces.metrics import Percentiles, ServingMetrics
from search_spaces.outcome import LaunchedProcess, Measurement
from search_spaces.serving import Candidate, Mode, Parallelism, Pool, Role, ServingConfig, make_options
from search_spaces.workload import Arrival, Load
from studies.records import Origin, TrialRecord, TrialStatus
from tuner.deploy.chosen import Chosen, choose
from tuner.report import StudyReport
from tuner.study_file import parse_study
from tuner.study_schema import StudyFile
from tuner.wiring import make_backends, make_problem

EMBEDDED = """
name: Small_Study
workload: {isl: 48, osl: 8, concurrency: [1, 2]}
objectives: [output_tokens_per_s, ttft_p50_ms]
node_pools: {local: {cpus_per_node: 4, price_per_hour: 0.1}}
engines: [llamacpp]
"""
ON_GPUS = """
name: big
model: {{name: Llama-3.1-70B}}
workload: {{isl: 1024, osl: 128, concurrency: [16]}}
objectives: [output_tokens_per_dollar, ttft_p50_ms]
slos: {{ttft_p99_ms: 1}}
node_pools: {{h100: {{device: h100_sxm, nodes: 2, gpus_per_node: 8, price_per_hour: 20, accelerator_type: H100}}}}
engines: [{engine}]
"""
CORES = tuple(sorted(os.sched_getaffinity(0))) * 2
KEY = "a-secret-key"
MODEL_SOURCE = "meta-llama/Llama-3.1-70B-Instruct"


def config(
    engine: str, mode: Mode, *, pool: str, replicas: int = 1, tp: int = 1, pp: int = 1, **options: object
) -> ServingConfig:
    """A configuration with `replicas` in each of its pools."""
    return ServingConfig(
        engine=engine,
        pools=tuple(
            Pool(
                role=role,
                node_pool=pool,
                replicas=replicas,
                parallelism=Parallelism(tp=tp, pp=pp),
                options=make_options(options),  # type: ignore[arg-type]  # values of options
            )
            for role in mode.roles
        ),
    )


def embedded(tmp_path: Path, mode: Mode = Mode.AGGREGATED, replicas: int = 1) -> Chosen:
    """A trial of the embedded engine on this machine."""
    return measured(parse_study(EMBEDDED), config("llamacpp", mode, pool="local", replicas=replicas), tmp_path)


def on_gpus(engine: str, tmp_path: Path, mode: Mode = Mode.AGGREGATED, replicas: int = 1, **sizes: int) -> Chosen:
    """A trial of `engine` on H100 nodes, as its backend would have launched it."""
    file = parse_study(ON_GPUS.format(engine=engine))
    return measured(file, config(engine, mode, pool="h100", replicas=replicas, **sizes), tmp_path)


def measured(
    file: StudyFile, deployed: ServingConfig, tmp_path: Path, *, nodes: tuple[str, ...] = ("node-a",), number: int = 7
) -> Chosen:
    """Trial `number` of the study of `file`, with `deployed` on `nodes` in turn."""
    problem = make_problem(file)
    candidate = Candidate(config=deployed, load=Load(arrival=Arrival.CLOSED, value=2))
    outcome = Measurement(
        metrics=figures(deployed.devices),
        client_lateness_ms=0.5,
        processes=processes(file, deployed, tmp_path / "deployments" / "one", nodes),
        environment={"engine_version": "vLLM 0.32.0+cpu", "gpu_model": "NVIDIA H100 80GB HBM3", "python": "3.11.4"},
        emulated=deployed.engine == "emulated",
    )
    report = StudyReport(
        name=file.name,
        status="finished",
        problem=problem,
        trials=(record(number, candidate, outcome),),
        storage="sqlite:///x.db",
    )
    return choose(report, file, str(number))


def figures(devices: int) -> ServingMetrics:
    """Some figures."""
    latency = Percentiles(mean=12.0, p50=11.0, p90=14.0, p95=15.0, p99=16.0)
    return ServingMetrics(
        ttft_ms=latency,
        tpot_ms=latency,
        itl_ms=latency,
        e2e_ms=latency,
        output_tokens_per_s=1234.5,
        input_tokens_per_s=4938.0,
        requests_per_s=77.0,
        goodput_rps=70.0,
        requests=64,
        errors=0,
        duration_s=0.8,
        devices=devices,
        price_per_hour=1.0,
    )


def record(number: int, candidate: Candidate, outcome: Measurement) -> TrialRecord:
    """A measured trial."""
    metrics = outcome.metrics.flat()
    return TrialRecord(
        number=number,
        status=TrialStatus.MEASURED,
        candidate=candidate,
        key=candidate.key,
        origin=Origin.SCREENED,
        prediction=None,
        outcome=outcome,
        values=(metrics["output_tokens_per_s"], metrics["ttft_p50_ms"]),
        ended_at=datetime(2026, 3, 4),  # noqa: DTZ001 - Optuna's times have no zone
    )


def processes(
    file: StudyFile, deployed: ServingConfig, folder: Path, nodes: tuple[str, ...]
) -> tuple[LaunchedProcess, ...]:
    """The record of each process of `deployed`, as the actors write it."""
    problem = make_problem(file)
    backend = make_backends(file, problem)[deployed.engine]
    if isinstance(backend, PerDeployment):
        backend = backend.for_deployment(deployed, problem)
    on_gpu = deployed.engine not in {"llamacpp", "emulated"}
    model = backend.prepare(replace(problem.model, source=MODEL_SOURCE if on_gpu else None), folder.parent / "models")
    hosts = {node: f"10.0.0.{i + 1}" if len(nodes) > 1 else "127.0.0.1" for i, node in enumerate(nodes)}
    found: list[LaunchedProcess] = []
    urls: dict[Role, list[str]] = {role: [] for role in Role}
    for pool in deployed.pools:
        for index in range(pool.replicas):
            split = nodes if pool.parallelism.pp > 1 and len(nodes) > 1 else (nodes[len(found) % len(nodes)],)
            for rank, node in enumerate(split):
                each = pool.devices_per_replica // len(split)
                part = (
                    ReplicaPart(
                        rank=rank,
                        hosts=tuple(hosts[name] for name in split),
                        devices=(each,) * len(split),
                        rendezvous_port=23456,
                    )
                    if len(split) > 1
                    else None
                )
                name = f"{pool.role}-{index}" + (f".{rank}" if part else "")
                spec = ReplicaSpec(
                    trial="big-3",
                    pool=pool,
                    index=index,
                    host=hosts[node],
                    port=41000 + len(found),
                    model=model,
                    workload=problem.workload,
                    device_ids=CORES[:each] if not on_gpu else tuple(range(2, 2 + each)),
                    work_dir=folder,
                    shared_dir=folder / "shared",
                    peer=next((other for other in deployed.pools if other.role is not pool.role), None),
                    part=part,
                    api_key=KEY,
                    node=f"cluster-{node}",
                )
                process = launched(name, backend.replica_command(spec), spec, work_dir=folder)
                found.append(replace(process, node=node))
                if rank == 0:
                    urls[pool.role].append(f"http://{spec.host}:{spec.port}")
    if needs_router(deployed):
        pools = {pool.role: pool for pool in deployed.pools}
        router = RouterSpec(
            trial="big-3",
            host=hosts[nodes[0]],
            port=42000,
            model=problem.model,
            prefill_urls=tuple(urls[Role.PREFILL]),
            decode_urls=tuple(urls[Role.DECODE]),
            mixed_urls=tuple(urls[Role.MIXED]),
            prefill_pool=pools.get(Role.PREFILL),
            decode_pool=pools.get(Role.DECODE),
            shared_dir=folder / "shared",
            api_key=KEY,
        )
        process = launched("router", backend.router_command(router), router, work_dir=folder)
        found.append(replace(process, node=nodes[0]))
    return tuple(found)
