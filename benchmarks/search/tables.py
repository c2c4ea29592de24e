"""Recorded surfaces as tables of candidates whose answers are known.

A table is the space of one replayed study. Its rows are distinct candidates; a candidate that was recorded more than
once answers with the geometric mean of its recordings. The objectives are output tokens/s per GPU and tokens/s per user
(both maximised) and mean TTFT (minimised). A recording of serving runs holds mean TTFT and TPOT of a closed loop, from
which throughput follows; a surface holds it measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from perf_model.runs import run_layout

TTFT, TPOT, THROUGHPUT = "ttft_mean_ms", "tpot_mean_ms", "output_tokens_per_s_per_gpu"
OBJECTIVES = (THROUGHPUT, "output_tokens_per_s_per_user", TTFT)
MAXIMISED = np.array([True, True, False])
ROLES = {"agg": ("",), "disagg": ("prefill_", "decode_")}
SIZES = ("tp_size", "pp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size", "num_workers")
"""What is recorded of each role; order as in `_sizes`."""
CATEGORIES = ("mode", "system", "engine", "precision", "engine_version", "gemm_quant_mode", "moe_quant_mode")
GROUP = ("model", "isl", "osl")


@dataclass(frozen=True, kw_only=True)
class Table:
    """One replayed space of n candidates.

    `rows` holds one candidate a row: the columns in `categories` are names, those in `sizes` numbers that describe the
    deployment (NaN where they do not apply), `concurrency` the load. `log_answers` (n, k) are natural logarithms of
    what a measurement of `metrics` answers, NaN for a candidate that fails. `gpus` (n,) are devices, `osl` the output
    length in tokens.
    """

    name: str
    model: str
    isl: int
    osl: int
    rows: pd.DataFrame
    categories: tuple[str, ...]
    sizes: tuple[str, ...]
    metrics: tuple[str, ...]
    log_answers: np.ndarray
    gpus: np.ndarray

    def __len__(self) -> int:
        """Number of candidates."""
        return len(self.rows)

    @property
    def concurrency(self) -> np.ndarray:
        """Requests in flight, shape (n,)."""
        return self.rows["concurrency"].to_numpy(float)

    @property
    def started(self) -> np.ndarray:
        """True (n,) for the candidates that can be measured."""
        return np.isfinite(self.log_answers).all(1)

    @property
    def values(self) -> np.ndarray:
        """The objectives as recorded, shape (n, 3), in the order and units of OBJECTIVES."""
        return self.objectives(self.log_answers, np.arange(len(self)))

    def objectives(self, logs: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """Objectives (..., c, 3) of logarithms of the metrics (..., c, k) of the candidates `chosen` (c,).

        Where throughput is no metric: tokens/s per GPU = concurrency * OSL / (TTFT + TPOT * (OSL - 1)) / GPUs, since a
        closed loop keeps `concurrency` requests in flight, each of which takes that long.
        """
        ttft, tpot = np.exp(logs[..., 0]), np.exp(logs[..., 1])
        if THROUGHPUT in self.metrics:
            per_gpu = np.exp(logs[..., self.metrics.index(THROUGHPUT)])
        else:
            request_s = (ttft + tpot * (self.osl - 1)) / 1e3
            per_gpu = self.concurrency[chosen] * self.osl / request_s / self.gpus[chosen]
        return np.stack([per_gpu, 1e3 / tpot, ttft], axis=-1)


def to_minimise(values: np.ndarray) -> np.ndarray:
    """Objective values with every maximised column negated."""
    return np.where(MAXIMISED, -values, values)


@dataclass(frozen=True, kw_only=True)
class Recording:
    """The tables of a recording and what was left out of it: a count for each reason."""

    tables: tuple[Table, ...]
    left_out: dict[str, int]


def read_measurements(path: Path) -> pd.DataFrame:
    """Rows of a file with the columns of the public file of runs, sizes and loads completed, and `gpus` added.

    Sizes are read by `perf_model.runs.run_layout`, which undoes the products that some rows hold in place of sizes.
    `concurrency` is filled from the batch of the decode workers where it is not recorded.
    """
    raw = pd.read_csv(path)
    texts = pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records")
    sizes = pd.DataFrame([_sizes(row) for row in texts], index=raw.index).astype(float)
    kept = raw.drop(columns=[name for name in sizes if name in raw])
    completed = pd.concat([kept, sizes], axis=1)
    completed[list(CATEGORIES)] = completed[list(CATEGORIES)].fillna("").astype(str)
    return completed.assign(concurrency=_concurrency(completed), gpus=_gpus(completed))


def _sizes(row: Mapping[str, str]) -> dict[str, float]:
    """The columns of SIZES for every role of the row's mode, NaN for the others and for workers not recorded."""
    sizes = {prefix + size: math.nan for prefixes in ROLES.values() for prefix in prefixes for size in SIZES}
    for prefix in ROLES[row["mode"]]:
        layout = run_layout(row, prefix)
        workers = float(row.get(f"{prefix}num_workers") or math.nan) if prefix else 1.0
        values = (layout.tp, layout.pp, layout.dp, layout.moe_tp, layout.ep, workers)
        sizes |= {prefix + size: float(value) for size, value in zip(SIZES, values, strict=True)}
    return sizes


def _concurrency(rows: pd.DataFrame) -> pd.Series:
    for name in ("decode_batch_size", "batch_size"):
        if name not in rows:
            rows = rows.assign(**{name: math.nan})
    mixed = rows["batch_size"] * rows["attention_dp_size"] * rows["pp_size"]
    decode = rows["decode_batch_size"] * rows["decode_num_workers"] * rows["decode_attention_dp_size"]
    return rows["concurrency"].fillna(decode).fillna(mixed)


def _gpus(rows: pd.DataFrame) -> pd.Series:
    """Devices of each row: workers x TP x PP x attention DP, summed over roles; NaN where workers are not recorded."""

    def of_role(prefix: str) -> pd.Series:
        parts = ("num_workers", "tp_size", "pp_size", "attention_dp_size")
        return rows[[prefix + part for part in parts]].prod(axis=1, skipna=False)

    return of_role("").where(rows["mode"] == "agg", of_role("prefill_") + of_role("decode_"))


def measured_tables(rows: pd.DataFrame, *, least_rows: int = 30, assume_one_worker: bool = False) -> Recording:
    """A table for every (model, ISL, OSL) with `least_rows` recorded rows or more.

    A disaggregated row without worker counts has no known number of GPUs, hence no throughput per GPU: it is left out
    and counted, unless `assume_one_worker` reads it as one worker in each role.
    """
    tables, left_out = [], {"group has too few rows": 0, "worker counts not recorded": 0, "repeats merged": 0}
    for key, group in rows.groupby(list(GROUP)):
        if len(group) < least_rows:
            left_out["group has too few rows"] += len(group)
            continue
        known = _with_workers(group, assume_one_worker)
        left_out["worker counts not recorded"] += len(group) - len(known)
        if len(known) < 2:
            continue
        table = _table(key, known)
        left_out["repeats merged"] += len(known) - len(table)
        tables.append(table)
    return Recording(tables=tuple(tables), left_out=left_out)


def _with_workers(group: pd.DataFrame, assume_one_worker: bool) -> pd.DataFrame:
    if assume_one_worker:
        split = (group["mode"] == "disagg").to_numpy()
        workers = ["prefill_num_workers", "decode_num_workers"]
        filled = group.copy()
        filled.loc[split, workers] = filled.loc[split, workers].fillna(1)
        group = filled.assign(gpus=_gpus(filled), concurrency=_concurrency(filled))
    return group[group["gpus"].notna() & group["concurrency"].notna()]


def _table(key: tuple[str, int, int], group: pd.DataFrame) -> Table:
    model, isl, osl = key
    sizes = tuple(prefix + size for prefixes in ROLES.values() for prefix in prefixes for size in SIZES)
    choice = [*CATEGORIES, *sizes, "concurrency"]
    logs = group.assign(log_ttft=np.log(group["ttft_ms"]), log_tpot=np.log(group["tpot_ms"]))
    grouped = logs.groupby(choice, dropna=False, sort=True)
    merged = grouped.agg(
        log_ttft=("log_ttft", "mean"), log_tpot=("log_tpot", "mean"), gpus=("gpus", "first"), id=("id", list)
    ).reset_index()
    return Table(
        name=f"{model} {isl}/{osl}",
        model=str(model),
        isl=int(isl),
        osl=int(osl),
        rows=merged[[*choice, "id"]],
        categories=_varied(merged, CATEGORIES),
        sizes=_varied(merged, sizes),
        metrics=(TTFT, TPOT),
        log_answers=merged[["log_ttft", "log_tpot"]].to_numpy(float),
        gpus=merged["gpus"].to_numpy(float),
    )


def _varied(rows: pd.DataFrame, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if len(rows[name].unique()) > 1)


def parameter_columns(table: Table) -> tuple[str, ...]:
    """The columns that a sampler chooses: those that vary and are no function of the ones before them."""
    kept: list[str] = []
    for name in _in_order(table):
        others = table.rows.groupby(kept, dropna=False)[name].nunique(dropna=False) if kept else None
        if others is None or (others > 1).any():
            kept.append(name)
    return tuple(kept)


def _in_order(table: Table) -> Iterator[str]:
    yield from (name for name in table.categories if name in CATEGORIES[:4])
    yield "concurrency"
    yield from table.sizes
    yield from (name for name in table.categories if name not in CATEGORIES[:4])
