"""Collecting on CPU nodes: the embedded engine's own steps, measured through its server on the node.

Kernels of another library would say little of llama.cpp, whose products of quantised or 16-bit weights are its own; its
steps say everything that its serving is made of.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from perf_model.step_tables import (
    DECODE_TABLE,
    DEVICE_FILE,
    PREFILL_TABLE,
    REQUEST_TABLE,
    RESTORE_TABLE,
    SAVE_TABLE,
    model_columns,
    steps_folder,
    write_device,
)
from perf_model.tables import cache_directory
from search_spaces.engines.llamacpp import LLAMACPP
from search_spaces.hardware import NodePool
from search_spaces.problem import Problem
from search_spaces.serving import OptionValue, Pool, Role, make_options
from search_spaces.workload import Length, Workload
from tuner.collect_table import CollectedTable, Row, key_of

if TYPE_CHECKING:
    from cluster.ray_session import RayCluster
    from cluster.step_probe import StepProbe, StepTiming
    from tuner.study_schema import StudyFile

PROBE_LIMIT_S = 1800.0
FACTS_LIMIT_S = 180.0
MOST_SEQUENCES = 32
REPEATS, QUICK_REPEATS = 5, 3
MOST_OUTPUT = 256
"""Tokens that a measurement of decoding may ask for (`cluster.step_probe.DECODE_TOKENS`)."""
_TABLES = {
    "prefill": PREFILL_TABLE,
    "decode": DECODE_TABLE,
    "request": REQUEST_TABLE,
    "save": SAVE_TABLE,
    "restore": RESTORE_TABLE,
}


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is measured: prompts alone, and pairs of decoding sequences and context, with each set of options."""

    prompts: tuple[int, ...]
    decodes: tuple[tuple[int, int], ...]
    threads: tuple[int, ...]
    cache_types: tuple[str, ...]
    micro_batches: tuple[int, ...]
    repeats: int


@dataclass(frozen=True, kw_only=True)
class Part:
    """One start of the engine: the points of it that are missing, with its options."""

    threads: int
    kv_cache_dtype: str
    ubatch_size: int
    prompts: tuple[int, ...]
    decodes: tuple[tuple[int, int], ...]

    @property
    def points(self) -> int:
        """Points to measure."""
        return len(self.prompts) + len(self.decodes)


def grid_of(study: StudyFile, pool: NodePool, *, quick: bool) -> Grid:
    """Steps that `study` may meet on `pool`; `quick` leaves all but the default options out."""
    from tuner.wiring import make_workload

    chosen = study.engines.get("llamacpp", {})

    def values(name: str) -> list[OptionValue]:
        parameter = LLAMACPP.parameter(name)
        own = list(chosen.get(name, parameter.choices))
        return [parameter.default if parameter.default in own else own[0]] if quick else own

    workload = make_workload(study)
    isl, osl, longest = workload.isl, workload.osl, workload.longest_context
    slots = [int(v) for v in chosen.get("max_num_seqs", LLAMACPP.parameter("max_num_seqs").choices)]
    most = min(max(slots), MOST_SEQUENCES, int(max(study.workload.loads)) if study.workload.concurrency else max(slots))
    middle = isl.mean + osl.mean // 2
    contexts = (middle, longest) if quick else (max(isl.mean // 2, 16), middle, longest)
    room = max(_model_context(study) - MOST_OUTPUT, 1)
    prompts = {16, isl.mean, *(n for n in (32, 64, 128, 256, 512, 1024, 2048, 4096) if n <= max(2 * isl.mean, 128))}
    return Grid(
        prompts=tuple(sorted({min(n, room) for n in prompts})),
        decodes=tuple(product(_doubling(most), sorted({min(n, room) for n in contexts}))),
        threads=tuple(int(n) for n in values("threads") if int(n) <= pool.devices_per_node),
        cache_types=tuple(str(word) for word in values("kv_cache_dtype")),
        micro_batches=tuple(int(n) for n in values("ubatch_size")),
        repeats=QUICK_REPEATS if quick else REPEATS,
    )


def _model_context(study: StudyFile) -> int:
    from tuner.wiring import make_model

    return make_model(study).max_context


def _doubling(most: int) -> tuple[int, ...]:
    """1, 2, 4 ... and `most`."""
    return tuple(sorted({most, *(2**n for n in range(12) if 2**n <= most)}))


@dataclass(frozen=True, kw_only=True)
class CoreCollection:
    """Where the steps of one pool's nodes go, and what they are of."""

    root: Path
    system: str
    cpu: str
    problem: Problem
    pool: NodePool
    grid: Grid

    @property
    def folder(self) -> Path:
        """Folder of the tables."""
        return steps_folder(self.root, self.system, "llamacpp", version("xllamacpp"))

    def table(self, kind: str) -> CollectedTable:
        """The table of a kind of point."""
        return CollectedTable(self.folder / f"{_TABLES[kind]}.parquet")

    def parts(self) -> list[Part]:
        """Starts of the engine that are still to be made; decode steps do not hang on the micro-batch."""
        known = {kind: self.table(kind).known() for kind in ("prefill", "decode")}
        grid = self.grid
        made: list[Part] = []
        for threads, cache, micro in product(grid.threads, grid.cache_types, grid.micro_batches):
            part = Part(threads=threads, kv_cache_dtype=cache, ubatch_size=micro, prompts=(), decodes=())
            decodes = grid.decodes if micro == max(grid.micro_batches) else ()
            prompts = tuple(n for n in grid.prompts if key_of(self.row(part, "prefill", 1, n)) not in known["prefill"])
            missing = tuple(d for d in decodes if key_of(self.row(part, "decode", *d)) not in known["decode"])
            made += _split(part, prompts, missing)
        return made

    def row(self, part: Part, kind: str, seqs: int, tokens: int) -> dict[str, str | float | int]:
        """A row without what was measured."""
        is_prompt = kind != "decode"
        return {
            **model_columns(self.problem.model),
            "threads": part.threads,
            "ubatch_size": part.ubatch_size,
            "kv_cache_dtype": part.kv_cache_dtype,
            "batch_size": seqs,
            "isl": tokens if is_prompt else 1,
            "step": 0 if is_prompt else tokens,
        }

    def keep(self, part: Part, timings: list[StepTiming]) -> None:
        """Write what was measured."""
        for kind in _TABLES:
            rows: list[Row] = [
                self.row(part, kind, t.seqs, t.tokens)
                | {"latency": t.latency_ms, "spread": t.spread, "repeats": t.count, "kernel_source": "llamacpp"}
                for t in timings
                if t.kind == kind
            ]
            if rows:
                self.table(kind).add(rows)


def _split(part: Part, prompts: tuple[int, ...], decodes: tuple[tuple[int, int], ...]) -> Iterator[Part]:
    """`part` in pieces that take a minute or so: what was measured is written after each."""
    from dataclasses import replace

    if prompts:
        yield replace(part, prompts=prompts)
    for seqs in sorted({seqs for seqs, _ in decodes}):
        yield replace(part, decodes=tuple(pair for pair in decodes if pair[0] == seqs))


def begin(cluster: RayCluster, problem: Problem, pool: NodePool, root: Path, grid: Grid) -> CoreCollection:
    """Look at a node of `pool`: what its processor is and what a core can do (kept for predictions)."""
    from cluster.node_facts import cpu_model
    from perf_model.microbench import device_from_figures, measure_node

    cpu = cluster.run_on_pool(pool, 1, FACTS_LIMIT_S, cpu_model)
    made = CoreCollection(root=root, system=system_of_cpu(cpu), cpu=cpu, problem=problem, pool=pool, grid=grid)
    if not (made.folder / DEVICE_FILE).is_file():
        figures = cluster.run_on_pool(pool, 1, FACTS_LIMIT_S, measure_node)
        write_device(made.folder / DEVICE_FILE, device_from_figures(figures, name=f"core of {cpu}"))
    return made


def system_of_cpu(cpu: str) -> str:
    """The tables' name of a processor."""
    return "cpu_" + re.sub(r"[^a-z0-9]+", "_", cpu.lower()).strip("_")


def measure_part(cluster: RayCluster, made: CoreCollection, part: Part) -> list[StepTiming]:
    """Start the engine on a node of the pool and measure the points of `part`."""
    from cluster.step_probe import measure_steps

    spare = 1 if part.threads < made.pool.devices_per_node else 0
    return cluster.run_on_pool(made.pool, part.threads + spare, PROBE_LIMIT_S, measure_steps, probe_of(made, part))


def probe_of(made: CoreCollection, part: Part) -> StepProbe:
    """The measurement of `part`."""
    from cluster.engines.llamacpp import LlamaCppBackend
    from cluster.step_probe import StepProbe

    slots = max((seqs for seqs, _ in part.decodes), default=1)
    longest = max((*part.prompts, *(context for _, context in part.decodes)))
    options = {p.name: p.default for p in LLAMACPP.parameters} | {
        "max_num_seqs": slots,
        "threads": part.threads,
        "kv_cache_dtype": part.kv_cache_dtype,
        "ubatch_size": part.ubatch_size,
    }
    return StepProbe(
        backend=LlamaCppBackend(),
        model=made.problem.model,
        pool=Pool(
            role=Role.MIXED,
            node_pool=made.pool.name,
            devices_per_rank=part.threads,
            options=make_options(LLAMACPP.repair(options)),
        ),
        workload=Workload(isl=Length(mean=longest), osl=Length(mean=MOST_OUTPUT)),
        model_dir=str(cache_directory() / "models"),
        prompts=part.prompts,
        decodes=part.decodes,
        hand_over_tokens=min(made.problem.workload.isl.mean, max(part.prompts)) if part.prompts else None,
        repeats=made.grid.repeats,
    )
