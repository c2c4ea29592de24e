"""A small problem on this machine's cores, and requests for it."""

from __future__ import annotations

from pathlib import Path

from cluster.runner import TrialRequest
from search_spaces.hardware import Device, DeviceKind, NodePool
from search_spaces.measuring import MeasurementRule, TimeLimits
from search_spaces.model import Attention, DenseFeedForward, LayerGroup, ModelSpec
from search_spaces.problem import Objective, Problem
from search_spaces.serving import Candidate, Pool, Role, ServingConfig, make_options
from search_spaces.workload import Arrival, Length, Load, Workload

CORE = Device(
    name="core",
    kind=DeviceKind.CPU,
    memory_bytes=2e9,
    memory_bandwidth=5e9,
    flops={"fp32": 5e10},
    link_bandwidth=5e9,
    network_bandwidth=1e9,
)
POOL = NodePool(
    name="here", device=CORE, nodes=1, devices_per_node=2, price_per_hour=0.5, labels={"tuner-pool": "here"}
)
MODEL = ModelSpec(
    name="tiny",
    hidden_size=64,
    vocab_size=1024,
    layers=(
        LayerGroup(
            count=2,
            attention=Attention(heads=4, kv_heads=2, head_dim=16),
            feed_forward=DenseFeedForward(intermediate_size=128),
        ),
    ),
    max_context=4096,
)
PROBLEM = Problem(
    model=MODEL,
    workload=Workload(isl=Length(mean=64, spread=0.2), osl=Length(mean=16)),
    node_pools=(POOL,),
    objectives=(Objective(metric="ttft_p95_ms"), Objective(metric="output_tokens_per_dollar")),
)
RULE = MeasurementRule(requests=16, lateness_limit_ms=5000.0)
"""Shared test machines starve the client now and then; that gate has tests of its own."""
LIMITS = TimeLimits(placement_s=60, start_s=60, measure_s=60, stop_s=10)


def aggregated(replicas: int = 1, engine: str = "llamacpp", **options: str | float | bool) -> ServingConfig:
    pool = Pool(role=Role.MIXED, node_pool=POOL.name, replicas=replicas, options=make_options(options))
    return ServingConfig(engine=engine, pools=(pool,))


def disaggregated() -> ServingConfig:
    pools = tuple(Pool(role=role, node_pool=POOL.name) for role in (Role.PREFILL, Role.DECODE))
    return ServingConfig(engine="llamacpp", pools=pools)


def request(  # noqa: PLR0913  keyword defaults of a value with many fields
    trial: str,
    config: ServingConfig,
    folder: Path,
    *,
    concurrency: int = 2,
    problem: Problem = PROBLEM,
    rule: MeasurementRule = RULE,
    limits: TimeLimits = LIMITS,
    seed: int = 0,
) -> TrialRequest:
    return TrialRequest(
        trial=trial,
        candidate=Candidate(config=config, load=Load(arrival=Arrival.CLOSED, value=concurrency)),
        problem=problem,
        rule=rule,
        limits=limits,
        artifact_dir=folder / trial,
        seed=seed,
    )
