"""Collecting on GPU nodes: the shapes that a study's model needs at its parallel sizes, timed with torch on the node.

Torch's kernels stand in for an engine's own: its matrix products come from the same library for 16-bit weights, its
attention does not. What torch has no kernel for (experts, latent attention, windows, narrow formats) is told, and stays
with the public tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from perf_model.collect import AttentionShape, GemmShape
from perf_model.gpu_groups import BEHAVES_AS, system_name, system_of
from perf_model.layout import PlanContext, ReplicaLayout, plan
from perf_model.operations import Concurrent, Gemm, Operation, SelfAttention
from perf_model.precision import Precision, checkpoint_precision
from perf_model.silicon import Silicon
from perf_model.systems import GpuSystem
from perf_model.tables import default_root
from search_spaces.errors import InvalidValueError, TunerError
from search_spaces.hardware import NodePool
from search_spaces.problem import Problem
from tuner.collect_collectives import OPERATIONS, CollectiveName, measure_collective
from tuner.collect_kernels import COPY_BYTES, KernelFacts, fit_copies, kernel_facts, measure_copies, measure_shapes
from tuner.collect_table import CollectedTable, Row, key_of

if TYPE_CHECKING:
    from cluster.ray_session import RayCluster
    from tuner.study_schema import StudyFile

LIMIT_S = 900.0
AT_ONCE = 64
"""Shapes of one call to the node: what was measured is written after each."""
ROWS, QUICK_ROWS = tuple(2**n for n in range(15)), (1, 16, 256, 4096)
BATCHES, QUICK_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256), (1, 8, 64)
LENGTHS, QUICK_LENGTHS = (16, 64, 256, 1024, 2048, 4096, 8192, 16384, 32768), (256, 2048, 8192)
MOST_TOKENS = 2**18
MESSAGES, QUICK_MESSAGES = tuple(2**n for n in range(10, 28)), (2**12, 2**18, 2**24)
NCCL, NCCL_TABLE = "nccl", "nccl_perf"
SECONDS = 0.02
FORMATS = ("bfloat16", "fp8")
Step = tuple[str, int, int, int]
"""A table's name, its points that are there, how many it needs, and how many were there before."""


@dataclass(frozen=True, kw_only=True)
class GpuCollection:
    """What is collected on the nodes of one pool, and where to. `left_out` says what has no kernel here."""

    cluster: RayCluster
    pool: NodePool
    root: Path
    engines: tuple[str, ...]
    facts: KernelFacts
    system: str
    quick: bool
    gemms: tuple[tuple[int, int, str], ...]
    heads: tuple[tuple[int, int, int], ...]
    left_out: tuple[str, ...]
    bench: str = "torch"
    known: GpuSystem | None = field(default=None, compare=False)

    @classmethod
    def begin(
        cls,
        cluster: RayCluster,
        problem: Problem,
        pool: NodePool,
        study: StudyFile,
        root: Path,
        *,
        quick: bool,
        bench: str = "torch",
    ) -> GpuCollection:
        """Look at a node of `pool`; raises `TunerError` where it has not what it takes."""
        facts = cluster.run_on_pool(pool, 1, LIMIT_S, kernel_facts, bench)
        if facts.problem:
            raise TunerError(f"tables of pool {pool.name!r} cannot be collected: {facts.problem}")
        sizes = _parallel_sizes(study)
        precisions = _precisions(problem, study)
        operations = [
            op for tp, form in product(sizes, precisions) for op in _operations(problem, study, tp, pool, form)
        ]
        gemms, heads, left_out = needed_shapes(operations)
        silicon = Silicon(default_root() or root)
        return cls(
            cluster=cluster,
            pool=pool,
            root=root,
            engines=tuple(sorted({BEHAVES_AS.get(engine, engine) for engine in study.engines})),
            facts=facts,
            system=system_name(pool),
            quick=quick,
            gemms=gemms,
            heads=heads,
            left_out=left_out,
            bench=bench,
            known=system_of(pool, silicon),
        )

    @property
    def gpu(self) -> str:
        """The GPU as its driver names it."""
        return self.facts.device

    @property
    def kernels(self) -> str:
        """What times the operations."""
        return f"{self.facts.library} {self.facts.version}"

    def measure(self, family: str) -> Iterator[Step]:
        """Measure what is missing of a family, telling how far each of its tables is; writes after each part."""
        self._write_system_once()
        if family == "gemm":
            rows = QUICK_ROWS if self.quick else ROWS
            shapes = [GemmShape(gemm_dtype=form, m=m, n=n, k=k) for (n, k, form), m in product(self.gemms, rows)]
            yield from self._shapes("gemm", "gemm_perf", shapes)
        elif family == "attention":
            yield from self._shapes("attention", "context_attention_perf", self._attention(decode=False))
            yield from self._shapes("attention", "generation_attention_perf", self._attention(decode=True))
        elif family == "memory":
            yield from self._memory()
        elif family == "collectives":
            yield from self._collectives()
        else:
            raise InvalidValueError(f"family {family!r} is not collected on GPUs")

    def _attention(self, *, decode: bool) -> list[AttentionShape]:
        batches, lengths = (QUICK_BATCHES, QUICK_LENGTHS) if self.quick else (BATCHES, LENGTHS)
        return [
            AttentionShape(
                batch_size=batch,
                isl=1 if decode else length,
                step=length - 1 if decode else 0,
                num_heads=heads,
                num_key_value_heads=kv_heads,
                head_dim=size,
            )
            for (heads, kv_heads, size), batch, length in product(self.heads, batches, lengths)
            if batch * length <= MOST_TOKENS
        ]

    def table(self, family: str, name: str, engine: str) -> CollectedTable:
        """A table of one engine."""
        folder = self.root / "data" / self.system / family / engine / f"{self.facts.library}-{self.facts.version}"
        return CollectedTable(folder / f"{name}.parquet")

    def _shapes(self, family: str, name: str, shapes: Iterable[GemmShape | AttentionShape]) -> Iterator[Step]:
        wanted = list(shapes)
        known = self.table(family, name, self.engines[0]).known()
        missing = [shape for shape in wanted if key_of(asdict(shape)) not in known]
        found = len(wanted) - len(missing)
        yield name, found, len(wanted), found
        for start in range(0, len(missing), AT_ONCE):
            part = missing[start : start + AT_ONCE]
            times = self.cluster.run_on_pool(self.pool, 1, LIMIT_S, measure_shapes, self.bench, part, SECONDS)
            self._add(family, name, [asdict(s) | {"latency": t} for s, t in zip(part, times, strict=True)])
            yield name, found + start + len(part), len(wanted), found

    def _add(self, family: str, name: str, rows: list[Row]) -> None:
        for engine in self.engines:
            self.table(family, name, engine).add([dict(row) | {"kernel_source": self.facts.library} for row in rows])

    def _memory(self) -> Iterator[Step]:
        """Copies, and the constants of small kernels that fit them, into the system's file."""
        name, sizes = "memory_perf", COPY_BYTES
        known = self.table("memory", name, self.engines[0]).known()
        missing = [size for size in sizes if key_of({"bytes": size}) not in known]
        found = len(sizes) - len(missing)
        yield name, found, len(sizes), found
        if missing:
            times = self.cluster.run_on_pool(self.pool, 1, LIMIT_S, measure_copies, self.bench, missing, SECONDS)
            self._add("memory", name, [{"bytes": b, "latency": t} for b, t in zip(missing, times, strict=True)])
        rows = self.table("memory", name, self.engines[0]).rows()
        share, launch_s = fit_copies(
            [float(row["bytes"]) for row in rows],
            [float(row["latency"]) for row in rows],
            self._system.memory_bandwidth,
        )
        self._write_system({"mem_bw_empirical_scaling_factor": share, "mem_empirical_constant_latency": launch_s})
        yield name, len(sizes), len(sizes), found

    def _collectives(self) -> Iterator[Step]:
        """Collectives of NCCL, the all-reduces also as those of the engines, and the delay between two GPUs."""
        messages = QUICK_MESSAGES if self.quick else MESSAGES
        ranks = [n for n in (2, 4, 8) if n <= self.pool.devices_per_node]
        known = self.table("comm", NCCL_TABLE, NCCL).known()
        wanted = list(product(OPERATIONS, ranks, messages))
        missing = {
            (name, count): [m for m in messages if key_of(_collective_row(name, count, m)) not in known]
            for name, count in product(OPERATIONS, ranks)
        }
        done = found = len(wanted) - sum(len(sizes) for sizes in missing.values())
        yield NCCL_TABLE, done, len(wanted), found
        for (name, count), sizes in missing.items():
            if sizes:
                self._collective(name, count, sizes)
                done += len(sizes)
                yield NCCL_TABLE, done, len(wanted), found
        if ranks and found < len(wanted):
            self._write_hop()

    def _collective(self, name: CollectiveName, count: int, sizes: list[int]) -> None:
        """Measure one collective over `count` GPUs and write it."""
        backend = "nccl" if self.bench == "torch" else "gloo"
        times = self.cluster.run_on_pool(self.pool, count, LIMIT_S, measure_collective, name, count, sizes, backend)
        pairs = list(zip(sizes, times, strict=True))
        rows = [_collective_row(name, count, m) | _timed(self.facts.library, t) for m, t in pairs]
        self.table("comm", NCCL_TABLE, NCCL).add(rows)
        if name == "all_reduce":
            own: list[Row] = [
                {"allreduce_dtype": "bfloat16", "num_gpus": count, "message_size": m, "latency": t} for m, t in pairs
            ]
            self._add("comm", "custom_allreduce_perf", own)

    def _write_hop(self) -> None:
        """The delay of a message between two GPUs, into the system's file: that of a short one."""
        backend = "nccl" if self.bench == "torch" else "gloo"
        sizes = [MESSAGES[0]]
        (time_ms,) = self.cluster.run_on_pool(self.pool, 2, LIMIT_S, measure_collective, "p2p", 2, sizes, backend)
        self._write_system({"p2p_latency": time_ms / 1e3}, section="node")

    @property
    def _system(self) -> GpuSystem:
        if self.known is None:
            raise TunerError(f"nothing is known of system {self.system}")
        return self.known

    def _write_system_once(self) -> None:
        if not (self.root / f"{self.system}.yaml").is_file():
            self._write_system({})

    def _write_system(self, figures: Mapping[str, float], section: str = "gpu") -> None:
        """The system's file: the public one where there is one, else the data sheet, with `figures` in a section."""
        public, file = default_root(), self.root / f"{self.system}.yaml"
        sources = [file, *([public / file.name] if public else [])]
        held = next((yaml.safe_load(s.read_text(encoding="utf-8")) for s in sources if s.is_file()), None)
        content = held or _data_sheet(self._system)
        content[section] |= {name: float(value) for name, value in figures.items()}
        self.root.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(content), encoding="utf-8")


def _collective_row(name: str, count: int, elements: int) -> dict[str, str | float | int]:
    """A row without its time; 16-bit formats are `half` in these tables."""
    return {"op_name": name, "nccl_dtype": "half", "num_gpus": count, "message_size": elements}


def _timed(library: str, time_ms: float) -> dict[str, str | float | int]:
    return {"latency": time_ms, "kernel_source": library}


def needed_shapes(
    operations: Iterable[Operation],
) -> tuple[tuple[tuple[int, int, str], ...], tuple[tuple[int, int, int], ...], tuple[str, ...]]:
    """(n, k, format) of matrix products, (heads, key-value heads, head size) of attention, and what torch lacks."""
    gemms: set[tuple[int, int, str]] = set()
    heads: set[tuple[int, int, int]] = set()
    left_out: set[str] = set()
    for op in _flat(operations):
        if isinstance(op, Gemm) and op.format in FORMATS:
            gemms.add((op.n, op.k, op.format))
        elif isinstance(op, Gemm):
            left_out.add(f"matrix products in {op.format}")
        elif isinstance(op, SelfAttention) and op.window is None:
            heads.add((op.heads, op.kv_heads, op.head_dim))
        elif type(op).__name__ in {"Experts", "LatentKernel", "LatentModule", "SparseModule", "LinearKernel"}:
            left_out.add(op.name)
        elif isinstance(op, SelfAttention):
            left_out.add("windowed attention")
    return tuple(sorted(gemms)), tuple(sorted(heads)), tuple(sorted(left_out))


def _flat(operations: Iterable[Operation]) -> Iterator[Operation]:
    for op in operations:
        if isinstance(op, Concurrent):
            yield from (*op.first, *op.second)
        else:
            yield op


def _precisions(problem: Problem, study: StudyFile) -> list[Precision]:
    """The checkpoint's formats, and fp8 where the study may quantise 16-bit weights while loading."""
    own = checkpoint_precision(problem.model)
    offered = any("fp8" in options.get("quantization", ()) for options in study.engines.values())
    return [own, replace(own, gemm="fp8", projections="fp8")] if offered and own.gemm == "bfloat16" else [own]


def _operations(problem: Problem, study: StudyFile, tp: int, pool: NodePool, precision: Precision) -> list[Operation]:
    """Operations of both steps at one tensor-parallel size; none where it does not divide the model."""
    engine = next(iter(study.engines))
    context = PlanContext(
        model=problem.model,
        layout=ReplicaLayout(tp=tp),
        precision=precision,
        engine=BEHAVES_AS.get(engine, engine),
        gpus_per_node=pool.devices_per_node,
    )
    if any(group.attention.heads % tp for group in problem.model.layers):
        return []
    steps = plan(context)
    return [*steps.prefill, *steps.decode]


def _parallel_sizes(study: StudyFile) -> list[int]:
    """Tensor-parallel sizes of the space and of its roles."""
    space = study.space
    return sorted({*space.tp, *(tp for role in (space.mixed, space.prefill, space.decode) for tp in role.tp or ())})


def _data_sheet(system: GpuSystem) -> dict[str, dict[str, float]]:
    names = {"bf16": "bfloat16", "fp8": "fp8", "int8": "int8", "fp4": "fp4", "fp32": "float32"}
    return {
        "gpu": {
            "mem_bw": system.memory_bandwidth,
            "mem_capacity": system.memory_bytes,
            **{f"{names[word]}_tc_flops": value for word, value in system.flops.items() if word in names},
        },
        "node": {
            "num_gpus_per_node": system.gpus_per_node,
            "intra_node_bw": system.link_bandwidth,
            "inter_node_bw": system.network_bandwidth,
            "p2p_latency": system.hop_s,
        },
        "misc": {"other_mem": system.reserve_bytes},
    }
