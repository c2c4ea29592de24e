"""What the model thought of candidates that were not measured: the predictions of a study, thinned out for a chart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

SHOWN = 1500
"""Most points of a cloud: enough to see its shape, few enough for a phone."""


@dataclass(frozen=True, kw_only=True)
class Cloud:
    """Predicted candidates: `columns` has an array of equal length for each metric, `total` counts them unthinned."""

    columns: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    total: int = 0

    def pairs(self, x: str, y: str) -> tuple[list[float], list[float]]:
        """The points that have a prediction of both metrics, rounded to four significant digits."""
        if x not in self.columns or y not in self.columns:
            return [], []
        known = np.isfinite(self.columns[x]) & np.isfinite(self.columns[y])
        return _short(self.columns[x][known]), _short(self.columns[y][known])


NO_CLOUD = Cloud()


def read_cloud(directory: Path, metrics: Sequence[str], shown: int = SHOWN) -> Cloud:
    """The predictions below `directory` (see `studies.predictions`), each candidate once, as its last prediction was.

    At most `shown` of them, evenly spaced over the study; no points where the folder is not there.
    """
    tables = [pq.read_table(path) for path in sorted(directory.glob("*.parquet"))]
    if not tables:
        return NO_CLOUD
    table = pa.concat_tables(tables)
    last = {key: row for row, key in enumerate(table.column("key").to_pylist())}
    rows = np.array(sorted(last.values()))
    kept = rows[np.unique(np.linspace(0, len(rows) - 1, num=min(shown, len(rows))).astype(int))]
    names = [metric for metric in metrics if f"predicted_{metric}" in table.column_names]
    return Cloud(columns={name: _column(table, name)[kept] for name in names}, total=len(rows))


def _column(table: pa.Table, metric: str) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.array(table.column(f"predicted_{metric}").to_pylist(), dtype=np.float64)
    return found


def _short(values: NDArray[np.float64]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]
