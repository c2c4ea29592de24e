"""Measures operation tables on the machine that it runs on, in the layout that `tables.py` reads.

Kernels come from a `Bench`: numpy on CPUs, torch on GPUs (and CPUs). Shapes that the table already holds are skipped,
so a collection that was interrupted goes on; a row whose repeats scatter is measured again, and the last try counts.
Nothing here knows Ray: run `collect` on a node and copy the folder.
"""

from __future__ import annotations

import importlib
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Protocol

import numpy as np
import yaml

from search_spaces.errors import InvalidValueError

SCATTER = 0.15  # a row is measured again where its quartiles differ by more than this share of the median
TRIES = 3
WARM_UPS = 2
BATCH = 64  # rows measured between two writes of the file


@dataclass(frozen=True, kw_only=True)
class GemmShape:
    """(m, k) x (k, n) in `gemm_dtype`."""

    gemm_dtype: str
    m: int
    n: int
    k: int


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Causal attention of `batch_size` sequences: prefill of `isl` tokens, or one token after `step` (`isl` = 1)."""

    batch_size: int
    isl: int
    step: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    window_size: int = 0
    attn_dtype: str = "bfloat16"
    kv_cache_dtype: str = "bfloat16"


Shape = GemmShape | AttentionShape


class Bench(Protocol):
    """Makes kernels to be timed."""

    name: str
    kernel_source: str

    def gemm(self, shape: GemmShape) -> Callable[[], object]:
        """A call that multiplies; raises `InvalidValueError` for a format that the bench lacks."""
        ...

    def attention(self, shape: AttentionShape) -> Callable[[], object]:
        """A call that attends."""
        ...

    def wait(self) -> None:
        """Return when all calls have been computed."""
        ...


class NumpyBench:
    """Kernels of numpy's BLAS in fp32, with the threads that the process gives it."""

    name = platform.processor() or "cpu"
    kernel_source = "numpy"

    def gemm(self, shape: GemmShape) -> Callable[[], object]:
        """A product in fp32, whatever 16-bit format is asked for: CPUs have no other here."""
        _require_sixteen_bits(shape.gemm_dtype)
        random = np.random.default_rng(0)
        left = random.random((shape.m, shape.k), dtype=np.float32)
        right = random.random((shape.k, shape.n), dtype=np.float32)
        return lambda: left @ right

    def attention(self, shape: AttentionShape) -> Callable[[], object]:
        """Scores, softmax and weighted sum, one group of heads at a time."""
        random = np.random.default_rng(0)
        length, group = shape.isl + shape.step, shape.num_heads // shape.num_key_value_heads
        heads = (shape.batch_size, shape.num_key_value_heads)
        queries = random.random((*heads, group * shape.isl, shape.head_dim), dtype=np.float32)
        keys = random.random((*heads, length, shape.head_dim), dtype=np.float32)

        def attend() -> object:
            scores = queries @ keys.swapaxes(-1, -2)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            return (weights / weights.sum(axis=-1, keepdims=True)) @ keys

        return attend

    def wait(self) -> None:
        """Numpy has computed when a call returns."""


def _require_sixteen_bits(form: str) -> None:
    if form not in {"bfloat16", "float16", "float32"}:
        raise InvalidValueError(f"format {form!r} is not measured by this bench; choose bfloat16, float16 or float32")


class TorchBench:
    """Kernels of torch on `device` ("cuda" or "cpu"); raises `InvalidValueError` where torch is not installed."""

    kernel_source = "torch"

    def __init__(self, device: str = "cuda") -> None:
        try:
            torch = importlib.import_module("torch")
        except ImportError as error:
            raise InvalidValueError("torch is not installed; install it, or collect with numpy on CPUs") from error
        self._torch = torch
        self._device = device
        self.name = torch.cuda.get_device_name(0) if device == "cuda" else platform.processor() or "cpu"

    def gemm(self, shape: GemmShape) -> Callable[[], object]:
        """A linear layer without bias, in fp8 by the scaled product of the hardware."""
        torch = self._torch
        left = torch.randn(shape.m, shape.k, device=self._device, dtype=torch.bfloat16)
        right = torch.randn(shape.n, shape.k, device=self._device, dtype=torch.bfloat16)
        if shape.gemm_dtype == "fp8":
            one = torch.ones((), device=self._device)
            left8, right8 = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn).t()
            return lambda: torch._scaled_mm(left8, right8, one, one, out_dtype=torch.bfloat16)  # noqa: SLF001 - torch
            # has no public name for it
        _require_sixteen_bits(shape.gemm_dtype)
        return lambda: torch.nn.functional.linear(left, right)

    def attention(self, shape: AttentionShape) -> Callable[[], object]:
        """Torch's scaled dot-product attention with grouped queries."""
        torch = self._torch
        length = shape.isl + shape.step
        settings = {"device": self._device, "dtype": torch.bfloat16}
        queries = torch.randn(shape.batch_size, shape.num_heads, shape.isl, shape.head_dim, **settings)
        keys = torch.randn(shape.batch_size, shape.num_key_value_heads, length, shape.head_dim, **settings)
        causal = shape.isl == length
        attend = torch.nn.functional.scaled_dot_product_attention
        return lambda: attend(queries, keys, keys, is_causal=causal, enable_gqa=True)

    def wait(self) -> None:
        """Wait for the device."""
        if self._device == "cuda":
            self._torch.cuda.synchronize()


def gemm_shapes(sizes: Sequence[int], rows: Sequence[int], form: str = "bfloat16") -> list[GemmShape]:
    """All products of `sizes` with `rows` rows."""
    return [GemmShape(gemm_dtype=form, m=m, n=n, k=k) for n, k, m in product(sizes, sizes, rows)]


def attention_shapes(
    heads: Sequence[tuple[int, int, int]], batches: Sequence[int], lengths: Sequence[int], *, decode: bool
) -> list[AttentionShape]:
    """Shapes for (heads, key-value heads, head size) of `heads`, with at most 2^18 tokens at once."""
    return [
        AttentionShape(
            batch_size=batch,
            isl=1 if decode else length,
            step=length - 1 if decode else 0,
            num_heads=h,
            num_key_value_heads=kv,
            head_dim=size,
        )
        for (h, kv, size), batch, length in product(heads, batches, lengths)
        if batch * length <= 1 << 18
    ]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Rows of a table that are done, of how many, and how many of these were there before."""

    table: str
    done: int
    total: int
    found: int


@dataclass(frozen=True, kw_only=True)
class Collection:
    """Where tables go: `<root>/data/<system>/<family>/<engine>/<version>/<table>.parquet`."""

    root: Path
    system: str
    engine: str
    version: str

    def file(self, family: str, table: str) -> Path:
        """The file of a table."""
        return self.root / "data" / self.system / family / self.engine / self.version / f"{table}.parquet"


_TABLES = {
    "gemm": ("gemm", "gemm_perf"),
    "prefill": ("attention", "context_attention_perf"),
    "decode": ("attention", "generation_attention_perf"),
}


def collect(
    bench: Bench, target: Collection, kind: str, shapes: Iterable[Shape], *, seconds: float = 0.02
) -> Iterator[Progress]:
    """Measure `shapes` of a `kind` (gemm, prefill, decode) and write them, telling progress after every write.

    `seconds` is spent on a row at least. Raises `InvalidValueError` for an unknown kind.
    """
    if kind not in _TABLES:
        raise InvalidValueError(f"kind {kind!r} of table is unknown; choose {', '.join(_TABLES)}")
    file = target.file(*_TABLES[kind])
    wanted = list(shapes)
    rows = _read_rows(file)
    known = {_identity(row, wanted[0]) for row in rows} if wanted else set()
    missing = [shape for shape in wanted if tuple(asdict(shape).values()) not in known]
    found = len(wanted) - len(missing)
    for start in range(0, len(missing), BATCH):
        for shape in missing[start : start + BATCH]:
            rows.append(
                asdict(shape) | {"kernel_source": bench.kernel_source, "latency": measure(bench, shape, seconds)}
            )
        _write_rows(file, rows)
        done = found + min(start + BATCH, len(missing))
        yield Progress(table=kind, done=done, total=len(wanted), found=found)


def _identity(row: Mapping[str, object], like: Shape) -> tuple[object, ...]:
    return tuple(row[name] for name in asdict(like))


def measure(bench: Bench, shape: Shape, seconds: float) -> float:
    """Median milliseconds of the kernel of `shape`; measured again, at most `TRIES` times, while repeats scatter."""
    return timed(bench, bench.gemm(shape) if isinstance(shape, GemmShape) else bench.attention(shape), seconds)


def timed(bench: Bench, call: Callable[[], object], seconds: float) -> float:
    """Median milliseconds of `call`; measured again, at most `TRIES` times, while repeats scatter."""
    for _ in range(WARM_UPS):
        call()
    bench.wait()
    for _ in range(TRIES):
        times = _repeats(bench, call, seconds)
        low, median, high = np.quantile(times, [0.25, 0.5, 0.75])
        if high - low <= SCATTER * median:
            break
    return float(median)


def _repeats(bench: Bench, call: Callable[[], object], seconds: float) -> list[float]:
    times: list[float] = []
    spent = 0.0
    while len(times) < 5 or (spent < seconds and len(times) < 1000):
        start = time.perf_counter()
        call()
        bench.wait()
        took = time.perf_counter() - start
        times.append(1e3 * took)
        spent += took
    return times


def _read_rows(file: Path) -> list[dict[str, object]]:
    if not file.is_file():
        return []
    from pyarrow import parquet

    return [dict(row) for row in parquet.read_table(file).to_pylist()]


def _write_rows(file: Path, rows: list[dict[str, object]]) -> None:
    """Write by a rename, so that an interrupted collection leaves the rows of the last write."""
    import pyarrow as pa
    from pyarrow import parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    parquet.write_table(pa.Table.from_pylist(rows), partial)
    partial.replace(file)


def write_system(target: Collection, figures: Mapping[str, float], *, devices_per_node: int) -> Path:
    """The system's file beside the tables, from figures of the micro-benchmark (see `microbench.measure_figures`)."""
    content = {
        "gpu": {
            "mem_bw": figures["memory_bandwidth"],
            "mem_bw_empirical_scaling_factor": 0.8,
            "mem_empirical_constant_latency": 1e-6,
            "mem_capacity": figures["memory_bytes"],
            "bfloat16_tc_flops": figures["fp32_flops"],
        },
        "node": {
            "num_gpus_per_node": devices_per_node,
            "intra_node_bw": figures["file_bandwidth"],
            "inter_node_bw": figures["loopback_bandwidth"],
        },
        "misc": {"other_mem": 0.0},
    }
    file = target.root / f"{target.system}.yaml"
    target.root.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return file
