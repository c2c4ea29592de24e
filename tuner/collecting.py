"""`tuner perf collect`: measures tables on the nodes of a Ray cluster, goes on where it was stopped, shows progress."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from search_spaces.errors import InvalidValueError, TunerError
from search_spaces.hardware import DeviceKind, NodePool
from search_spaces.problem import Problem
from tuner.table_import import write_provenance
from tuner.table_places import remember_pool

if TYPE_CHECKING:
    from cluster.ray_session import RayCluster
    from tuner.study_schema import StudyFile

FAMILIES = ("steps", "gemm", "attention", "memory", "collectives")
ON_CPUS, ON_GPUS = ("steps",), ("gemm", "attention", "memory", "collectives")
LOCAL_STUDY = """
name: this-machine
model: {preset: tiny}
workload: {isl: 128, osl: 32, concurrency: [1, 4, 8]}
objectives: [output_tokens_per_s, ttft_p50_ms]
node_pools: {local: {cpus_per_node: 2}}
engines: {llamacpp: {threads: [1], kv_cache_dtype: [f16]}}
"""
"""What is collected for where no study file is given: the small model on this machine."""

Tell = Callable[[str], None]
Advance = Callable[[str, int, int], None]
"""Called with a table's name, the points that are done, and how many there are."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What to collect, and where to."""

    study: StudyFile
    root: Path
    families: tuple[str, ...] = ()
    pool: str | None = None
    quick: bool = False


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What a collection did to one pool's tables: points measured now, and found from before."""

    pool: str
    system: str
    measured: int
    found: int


def collect(wanted: Wanted, address: str | None, tell: Tell, advance: Advance) -> list[Collected]:
    """Measure on the nodes of the study's pools; raises `TunerError` for pools and families that do not go together."""
    from cluster.ray_session import connect
    from tuner.wiring import make_problem

    problem = make_problem(wanted.study)
    pools = _chosen(problem, wanted.pool)
    families = {pool.name: _families(pool, wanted) for pool in pools}
    done: list[Collected] = []
    with connect(address, pools) as cluster:
        for pool in pools:
            tell(f"pool {pool.name}: {', '.join(families[pool.name])}")
            act = _on_cores if pool.device.kind is DeviceKind.CPU else _on_gpus
            done.append(act(cluster, problem, pool, wanted, families[pool.name], tell, advance))
    for row in done:
        _note(wanted, row)
    return done


def _chosen(problem: Problem, name: str | None) -> Sequence[NodePool]:
    return problem.node_pools if name is None else (problem.node_pool(name),)


def _families(pool: NodePool, wanted: Wanted) -> tuple[str, ...]:
    """The families to collect on a pool; raises `InvalidValueError` for unknown ones or none that fits."""
    unknown = [name for name in wanted.families if name not in FAMILIES]
    if unknown:
        raise InvalidValueError(f"families {', '.join(unknown)} are unknown; choose from {', '.join(FAMILIES)}")
    offered = ON_CPUS if pool.device.kind is DeviceKind.CPU else ON_GPUS
    chosen = tuple(name for name in offered if not wanted.families or name in wanted.families)
    if not chosen:
        raise InvalidValueError(
            f"pool {pool.name!r} of {pool.device.name} has none of the families {', '.join(wanted.families)}; "
            f"choose from {', '.join(offered)}, or another pool with --pool"
        )
    return chosen


def _on_cores(
    cluster: RayCluster,
    problem: Problem,
    pool: NodePool,
    wanted: Wanted,
    _families: tuple[str, ...],
    tell: Tell,
    advance: Advance,
) -> Collected:
    from tuner.collect_cores import begin, grid_of, measure_part

    _require_llamacpp(wanted.study)
    grid = grid_of(wanted.study, pool, quick=wanted.quick)
    made = begin(cluster, problem, pool, wanted.root, grid)
    remember_pool(wanted.root, pool, made.system)
    parts = made.parts()
    todo = sum(part.points for part in parts)
    found = sum(len(made.table(kind).rows()) for kind in ("prefill", "decode"))
    tell(f"pool {pool.name}: {made.cpu}, {todo} points to measure, {found} are there")
    done = 0
    for part in parts:
        made.keep(part, measure_part(cluster, made, part))
        done += part.points
        advance(f"steps on {pool.name}", done, todo)
    return Collected(pool=pool.name, system=made.system, measured=done, found=found)


def _require_llamacpp(study: StudyFile) -> None:
    from importlib.util import find_spec

    if "llamacpp" not in study.engines:
        raise TunerError(f"on CPU nodes the steps of llamacpp are collected, and {study.name} does not choose it")
    if find_spec("xllamacpp") is None:
        raise TunerError("collecting its steps needs the engine; install it with: pip install 'tuner[llamacpp]'")


def _on_gpus(
    cluster: RayCluster,
    problem: Problem,
    pool: NodePool,
    wanted: Wanted,
    families: tuple[str, ...],
    tell: Tell,
    advance: Advance,
) -> Collected:
    from tuner.collect_gpus import GpuCollection

    made = GpuCollection.begin(cluster, problem, pool, wanted.study, wanted.root, quick=wanted.quick)
    tell(f"pool {pool.name}: {made.gpu} with {made.kernels}, tables of {', '.join(made.engines)}")
    for missing in made.left_out:
        tell(f"pool {pool.name}: no kernel for {missing} here; it stays with the public tables")
    counts: dict[str, tuple[int, int]] = {}
    for family in families:
        for table, done, total, before in made.measure(family):
            advance(f"{table} on {pool.name}", done, total)
            counts[table] = (done - before, before)
    measured, found = (sum(pair[i] for pair in counts.values()) for i in (0, 1))
    return Collected(pool=pool.name, system=made.system, measured=measured, found=found)


def _note(wanted: Wanted, row: Collected) -> None:
    facts = {"study": wanted.study.name, "pool": row.pool, "system": row.system, "points": row.measured}
    write_provenance(wanted.root, "collect", facts | {"quick": wanted.quick})
