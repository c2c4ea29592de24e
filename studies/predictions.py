"""What the screen turned down, as Parquet beside the study: `predictions/*.parquet`, each candidate once in a while.

Columns: `trial` (number of the trial that was chosen instead), `key`, `genotype` (JSON), `predicted_<metric>` for every
metric (null where the model gives none), `score` (expected hypervolume improvement per second, null where it was not
reached) and `reason`. Rows are buffered and written in files of `ROWS_PER_FILE`; a killed process loses its buffer,
never a trial.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from search_spaces.metrics import METRICS
from search_spaces.serving import OptionValue

ROWS_PER_FILE = 1024
RECENT = 8192
"""Candidates that are remembered as turned down: the neighbours of a front are looked at again and again."""
_SCHEMA = pa.schema(
    [
        ("trial", pa.int64()),
        ("key", pa.string()),
        ("genotype", pa.string()),
        *((f"predicted_{metric}", pa.float64()) for metric in METRICS),
        ("score", pa.float64()),
        ("reason", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A candidate that was turned down for trial `trial`, and why."""

    trial: int
    key: str
    genotype: Mapping[str, OptionValue]
    metrics: Mapping[str, float]
    score: float | None
    reason: str


class PredictionLog:
    """Appends rejected candidates to Parquet files in `directory`, which is made with the first of them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._rows: list[Rejected] = []
        self._recent: dict[tuple[str, str], None] = {}
        self._written: int = sum(pq.read_metadata(path).num_rows for path in sorted(directory.glob("*.parquet")))

    def is_known(self, key: str, reason: str) -> bool:
        """True where candidate `key` was turned down for `reason` of late: it need not be written again."""
        known = (key, reason) in self._recent
        self._recent.pop((key, reason), None)
        self._recent[key, reason] = None  # at the end
        if len(self._recent) > RECENT:
            del self._recent[next(iter(self._recent))]
        return known

    @property
    def count(self) -> int:
        """Rejected candidates so far, over the whole life of the study, those in the buffer included."""
        return self._written + len(self._rows)

    def add(self, row: Rejected) -> None:
        """Remember `row`; writes a file when the buffer is full."""
        self._rows.append(row)
        if len(self._rows) >= ROWS_PER_FILE:
            self.flush()

    def flush(self) -> None:
        """Write what is buffered, as one file that appears whole or not at all."""
        if not self._rows:
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        first = f"{self._rows[0].trial:07d}"
        index = len(list(self._directory.glob(f"{first}-*.parquet")))
        path = self._directory / f"{first}-{index}.parquet"
        unfinished = path.with_suffix(".tmp")
        pq.write_table(_table(self._rows), unfinished)
        unfinished.rename(path)
        self._written += len(self._rows)
        self._rows = []


def _table(rows: list[Rejected]) -> pa.Table:
    columns: dict[str, list[object]] = {
        "trial": [row.trial for row in rows],
        "key": [row.key for row in rows],
        "genotype": [json.dumps(dict(row.genotype), sort_keys=True) for row in rows],
        "score": [row.score for row in rows],
        "reason": [row.reason for row in rows],
    }
    columns |= {f"predicted_{metric}": [row.metrics.get(metric) for row in rows] for metric in METRICS}
    return pa.table(columns, schema=_SCHEMA)
