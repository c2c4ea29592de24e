"""The measured surface of the embedded engine as a table, with the product's own model as its prior."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from benchmarks.search.modelled import Modelled
from benchmarks.search.tables import THROUGHPUT, TPOT, TTFT, Table
from perf_model.features import features_of
from search_spaces.hardware import Device
from search_spaces.serving import Candidate
from studies.codec import from_json
from tuner.study_file import parse_study
from tuner.wiring import make_predictor, make_problem

METRICS = (TTFT, TPOT, THROUGHPUT)


@dataclass(frozen=True, kw_only=True)
class Surface:
    """A surface with its prior; `facts` say where it comes from."""

    modelled: Modelled
    facts: tuple[str, ...]


def read_surface(path: Path) -> Surface:
    """The surface that `benchmarks/measure_surface.py` wrote; repeats of a candidate become their geometric mean."""
    stored = pq.read_table(path)
    origin = json.loads(stored.schema.metadata[b"provenance"])
    frame = stored.to_pandas()
    study = parse_study(origin["study"], name="the surface's study")
    problem = make_problem(study, {study_pool: from_json(Device, origin["device"]) for study_pool in study.node_pools})
    logs = frame.assign(**{metric: np.log(frame[metric]) for metric in METRICS})
    merged = logs.groupby("key", sort=True).agg({"candidate": "first", **dict.fromkeys(METRICS, "mean")})
    candidates = [from_json(Candidate, json.loads(text)) for text in merged["candidate"]]
    table = _table(candidates, merged, path.stem, osl=problem.workload.osl.mean, isl=problem.workload.isl.mean)
    raw = make_predictor(problem, study).raw(candidates)
    predicted = np.log([[prediction.metrics[metric] for metric in METRICS] for prediction in raw])
    node_types = {pool.name: pool.device.name for pool in problem.node_pools}
    modelled = Modelled(
        table=table,
        log_mean=predicted,
        features=features_of(candidates, np.ones(len(candidates)), node_types),
    )
    fact = (
        f"surface {path.name}: {origin['engine']}, {origin['date']}, {origin['cores']} cores; "
        f"{len(frame)} measurements of {len(table)} candidates; {origin['note'] or 'no note'}"
    )
    return Surface(modelled=modelled, facts=(fact, "prior of the surface: the product's model, with a core measured"))


def _table(candidates: Sequence[Candidate], merged: pd.DataFrame, name: str, *, isl: float, osl: float) -> Table:
    rows = pd.DataFrame([_columns(candidate) for candidate in candidates])
    names = ("mode", *(column for column in rows if column.endswith("kv_cache_dtype")))
    rows[list(names)] = rows[list(names)].fillna("")
    varied = [column for column in rows if len(rows[column].unique()) > 1]
    return Table(
        name=name.replace("_", " "),
        model=name,
        isl=round(isl),
        osl=round(osl),
        rows=rows,
        categories=tuple(column for column in varied if column in names),
        sizes=tuple(column for column in varied if column not in (*names, "concurrency")),
        metrics=METRICS,
        log_answers=merged[list(METRICS)].to_numpy(float),
        gpus=np.array([float(candidate.config.devices) for candidate in candidates]),
    )


def _columns(candidate: Candidate) -> dict[str, object]:
    row: dict[str, object] = {"mode": str(candidate.config.mode)}
    for pool in candidate.config.pools:
        row[f"{pool.role}.replicas"] = pool.replicas
        row |= {f"{pool.role}.{option}": value for option, value in pool.options if option != "flash_attention"}
    return row | {"concurrency": candidate.load.value}
