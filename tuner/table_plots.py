"""Plots of how well kernels use their GPU, from operation tables: one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from perf_model.numeric import FloatArray
from perf_model.precision import FORMATS
from perf_model.systems import GpuSystem, read_system
from perf_model.tables import Table, load
from tuner.table_survey import TableCoverage

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

POINTS = 4000
"""Most points of a plot; a larger table is thinned evenly."""
PLOTTED = ("gemm_perf", "context_attention_perf", "generation_attention_perf")


def write_plots(roots: Sequence[Path], found: Sequence[TableCoverage], file: Path) -> Path:
    """Write the plots of the tables in `found` to `file`."""
    from plotly.offline import get_plotlyjs

    parts = [figure.to_html(full_html=False, include_plotlyjs=False) for figure in _figures(found)]
    rows = "".join(
        f"<tr><td>{r.system}</td><td>{r.engine}</td><td>{r.version}</td><td>{r.table}</td><td>{r.rows:,}</td></tr>"
        for r in found
    )
    body = "".join(parts) or "<p>No table of matrix products or attention is among them: nothing to plot.</p>"
    text = (
        "<!doctype html><html><head><meta charset='utf-8'><title>Operation tables</title>"
        "<style>body{font-family:sans-serif;margin:2em}td{padding:0 1em}</style>"
        f"<script>{get_plotlyjs()}</script></head><body><h1>Operation tables</h1><p>{', '.join(map(str, roots))}</p>"
        f"{body}<h2>Rows</h2><table>{rows}</table></body></html>"
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def _figures(found: Sequence[TableCoverage]) -> Iterator[Figure]:
    for row in found:
        if row.table not in PLOTTED or not (row.root / f"{row.system}.yaml").is_file():
            continue
        yield _figure(row, load(row.file), read_system(row.root, row.system))


def _figure(row: TableCoverage, table: Table, system: GpuSystem) -> Figure:
    from plotly.graph_objects import Figure, Scattergl

    figure = Figure()
    column = "gemm_dtype" if row.table == "gemm_perf" else "kv_cache_dtype"
    for word in sorted(table.values(column)):
        chosen = table.where(**{column: word})
        chosen = chosen.take(np.unique(np.linspace(0, len(chosen) - 1, POINTS).astype(np.int64)))
        size, light = (
            _gemm_light(chosen, system, word) if column == "gemm_dtype" else _attention_light(chosen, system, word)
        )
        share = 100.0 * light / chosen.number("latency")
        figure.add_trace(Scattergl(x=size, y=share, mode="markers", name=word, marker={"size": 3}))
    axis = "rows m" if row.table == "gemm_perf" else "tokens (sequences x length)"
    figure.update_layout(
        title=f"{row.table}: {row.system}, {row.engine} {row.version}",
        xaxis={"title": axis, "type": "log"},
        yaxis={"title": "share of the speed of light, %", "rangemode": "tozero"},
        height=420,
    )
    return figure


def _gemm_light(table: Table, system: GpuSystem, word: str) -> tuple[FloatArray, FloatArray]:
    """Rows, and milliseconds at the speed of light."""
    m, n, k = (table.number(name) for name in ("m", "n", "k"))
    form = FORMATS.get(word, FORMATS["bfloat16"])
    traffic = n * k * form.weight_bytes + m * k * form.activation_bytes + m * n * 2.0
    return m, 1e3 * np.maximum(2.0 * m * n * k / system.peak(form.compute), traffic / system.memory_bandwidth)


def _attention_light(table: Table, system: GpuSystem, word: str) -> tuple[FloatArray, FloatArray]:
    """Tokens, and milliseconds at the speed of light; windows end what is read."""
    batch, isl, step = (table.number(name) for name in ("batch_size", "isl", "step"))
    heads, kv_heads, dim = (table.number(name) for name in ("num_heads", "num_key_value_heads", "head_dim"))
    length = isl + step
    seen = length
    if "window_size" in table.columns:
        window = table.number("window_size")
        seen = np.where(window > 0, np.minimum(length, window), length)
    causal = np.where((isl > 1) & (step == 0), 0.5, 1.0)
    flop = 4.0 * batch * isl * seen * heads * dim * causal
    width = 1.0 if word.startswith("fp8") else 2.0
    kv_heads = np.where(kv_heads > 0, kv_heads, heads)
    traffic = batch * dim * (2.0 * kv_heads * seen * width + 4.0 * heads * isl)
    return batch * length, 1e3 * np.maximum(flop / system.peak("bf16"), traffic / system.memory_bandwidth)
