"""How fast the model predicts: a million aggregated configurations, and the reference beside it where it is installed.

    python benchmarks/predict_speed.py [--rows 1000000] [--threads 2] [--json]

Prints predictions per second of wall time and of processor time, peak memory, and the time of one prediction in a
new process. The reference is the agg estimator of `aiconfigurator-core`; what it needs is built before its clock
starts.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from perf_model.columns import Columns, columns, predict_columns
from perf_model.layout import ReplicaLayout
from perf_model.precision import Precision
from perf_model.silicon import ReplicaKey, Silicon, default_silicon
from search_spaces.known_models import known_model

SYSTEM, ENGINE = "h200_sxm", "trtllm"
CASES = {
    "Qwen3-32B": (Precision(gemm="fp8", projections="fp8", cache="fp8"), [(1, 1, 1), (2, 1, 1), (4, 1, 1), (8, 1, 1)]),
    "DeepSeek-V3": (
        Precision(gemm="fp8_block", projections="fp8_block", moe="fp8_block", cache="fp8"),
        [(8, 1, 1), (8, 1, 8), (4, 2, 8), (2, 4, 8), (1, 8, 8), (1, 16, 16)],
    ),
}


def random_rows(layouts: list[tuple[int, int, int]], count: int, seed: int = 0) -> Columns:
    """`count` configurations: layout, load, lengths, token budget and sequences drawn at random."""
    random = np.random.default_rng(seed)
    tp, dp, ep = np.array(layouts)[random.integers(len(layouts), size=count)].T
    return columns(
        tp=tp,
        dp=dp,
        ep=ep,
        users=random.integers(1, 1025, count),
        isl=random.choice([256, 1024, 2048, 4096, 8192], count),
        osl=random.choice([128, 256, 512, 1024, 2048], count),
        token_budget=random.choice([2048, 4096, 8192, 16384], count),
        max_sequences=random.choice([64, 128, 256, 512, 1024], count),
    )


def measure(silicon: Silicon, name: str, rows: int, threads: int) -> dict[str, float]:
    """Predictions per second of `rows` rows of model `name`, tables loaded and replicas built inside the clock."""
    precision, layouts = CASES[name]
    key = ReplicaKey(model=known_model(name), system=SYSTEM, engine=ENGINE, layout=ReplicaLayout(), precision=precision)
    drawn = random_rows(layouts, rows)
    wall, processor = time.perf_counter(), time.process_time()
    answers = predict_columns(silicon, key, drawn, threads=threads)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    return {
        "rows": float(rows),
        "fitting": float(answers.fits.sum()),
        "per_second": rows / wall,
        "per_processor_second": rows / processor,
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def single_in_fresh_process() -> float:
    """Seconds from starting a process to one printed prediction, tables in the cache."""
    code = (
        "from benchmarks.predict_speed import measure, default_silicon;"
        "print(measure(default_silicon(), 'Qwen3-32B', 1, 1)['per_second'])"
    )
    root = Path(__file__).parent.parent
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def reference_rate(name: str, seconds: float = 5.0) -> float | None:
    """Aggregated estimates per second of the reference on the same system and engine, None where it is absent."""
    try:
        from aiconfigurator_core.sdk.backends.factory import get_backend
        from aiconfigurator_core.sdk.config import RuntimeConfig
        from aiconfigurator_core.sdk.config_builders import build_model_config
        from aiconfigurator_core.sdk.models import get_model
        from aiconfigurator_core.sdk.perf_database import get_database
    except ImportError:
        return None
    moe = name != "Qwen3-32B"
    tp, ep = (8, 8) if moe else (2, 1)
    quantisation = {"gemm_quant_mode": "fp8_block" if moe else "fp8", "kvcache_quant_mode": "bfloat16"}
    if moe:
        quantisation |= {"moe_quant_mode": "fp8_block"}
    settings = build_model_config(tp, 1, 1, 1, ep, fmha_quant_mode="bfloat16", **quantisation)
    path = {"Qwen3-32B": "Qwen/Qwen3-32B", "DeepSeek-V3": "deepseek-ai/DeepSeek-V3"}[name]
    model = get_model(path, settings, ENGINE)
    database = get_database(SYSTEM, ENGINE, "current")
    backend = get_backend(ENGINE)
    random = np.random.default_rng(1)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        isl, osl = int(random.integers(256, 8192)), int(random.integers(128, 2048))
        run = RuntimeConfig(batch_size=int(random.integers(1, 256)), isl=isl, osl=osl)
        backend.run_agg(model, database, run, ctx_tokens=int(random.choice([2048, 4096, 8192])))
        count += 1
    return count / (time.perf_counter() - start)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    silicon = default_silicon()
    figures: dict[str, object] = {"fresh_process_s": single_in_fresh_process()}
    for name in CASES:
        ours = measure(silicon, name, options.rows, options.threads)
        reference = reference_rate(name)
        figures[name] = ours | ({} if reference is None else {"reference_per_second": reference})
    if options.json:
        print(json.dumps(figures))
        return
    print(f"one prediction in a fresh process: {figures['fresh_process_s']:.2f} s")
    for name in CASES:
        row = figures[name]
        assert isinstance(row, dict)  # noqa: S101 - narrows the type of a literal above
        reference = row.get("reference_per_second")
        beside = f"; reference {reference:,.0f}/s, ratio {row['per_second'] / reference:,.0f}" if reference else ""
        print(
            f"{name}: {row['per_second']:,.0f}/s ({row['per_processor_second']:,.0f} per processor second), "
            f"peak {row['peak_memory_gib']:.2f} GiB{beside}"
        )


if __name__ == "__main__":
    main()
