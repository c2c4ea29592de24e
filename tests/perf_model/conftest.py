"""A small directory of operation tables whose latencies follow simple laws, so that every answer is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

SYSTEM = {
    "gpu": {
        "mem_bw": 1e12,
        "mem_capacity": 80e9,
        "bfloat16_tc_flops": 1e14,
        "fp8_tc_flops": 2e14,
        "int8_tc_flops": 2e14,
        "sm_version": 90,
    },
    "node": {"num_gpus_per_node": 8, "inter_node_bw": 5e10, "intra_node_bw": 4e11, "p2p_latency": 1e-5},
    "misc": {"nccl_mem": {1: 0, 2: 1e8}, "other_mem": 1e9, "nccl_version": "2.0"},
}


def gemm_ms(m: float, n: float, k: float) -> float:
    """Half of the speed of light in bf16, and 2 us."""
    return 2e3 * max(2 * m * n * k / 1e14, 2 * (m * k + n * k + m * n) / 1e12) + 2e-3


def write(root: Path, path: str, rows: Sequence[Mapping[str, object]]) -> None:
    """A table of `rows` at `path` below `root`."""
    file = root / "data" / "test_sxm" / path
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), file)


def gemm_rows(form: str = "bfloat16", factor: float = 1.0) -> list[dict[str, object]]:
    sizes = (64, 128, 256, 512, 1024, 2048)
    return [
        {"gemm_dtype": form, "m": m, "n": n, "k": k, "latency": factor * gemm_ms(m, n, k)}
        for m, n, k in product((1, 16, 256, 4096), sizes, sizes)
    ]


def attention_rows(*, decode: bool) -> list[dict[str, object]]:
    base = {"window_size": 0, "attn_dtype": "bfloat16", "kv_cache_dtype": "bfloat16", "head_dim": 64}
    rows = []
    for heads, batch, length in product((4, 8), (1, 4, 16, 64), (64, 256, 1024, 4096)):
        if not decode and batch * length > 16384:
            continue  # ragged, as the public tables are
        time = 1e-6 * batch * length * heads + 5e-3 if decode else 1e-8 * batch * length**2 * heads + 5e-3
        lengths = {"isl": 1, "step": length - 1} if decode else {"isl": length, "step": 0}
        shape = {"num_heads": heads, "num_key_value_heads": heads // 2, "batch_size": batch, "latency": time}
        rows.append(base | shape | lengths)
    return rows


@pytest.fixture(scope="session")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory; engine vllm has version 1.0 (current) and 0.9, engine sglang a faster GEMM of one format."""
    root = tmp_path_factory.mktemp("systems")
    (root / "test_sxm.yaml").write_text(yaml.safe_dump(SYSTEM), encoding="utf-8")
    versions = {"defaults": {"vllm": {"current": "1.0"}, "sglang": {"current": "1.0"}}}
    (root / "query_versions.yaml").write_text(yaml.safe_dump(versions), encoding="utf-8")
    write(root, "gemm/vllm/1.0/gemm_perf.parquet", gemm_rows())
    write(root, "gemm/vllm/0.9/gemm_perf.parquet", gemm_rows(factor=3.0))
    write(root, "attention/vllm/1.0/context_attention_perf.parquet", attention_rows(decode=False))
    write(root, "attention/vllm/1.0/generation_attention_perf.parquet", attention_rows(decode=True))
    reduce = [
        {"allreduce_dtype": "bfloat16", "num_gpus": ranks, "message_size": size, "latency": 1e-2 + 1e-8 * size * ranks}
        for ranks, size in product((2, 4, 8), (128, 65536, 16777216))
    ]
    write(root, "comm/vllm/0.9/custom_allreduce_perf.parquet", reduce)
    return root
