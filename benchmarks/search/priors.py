"""What the search believes of a table before it measures: predictions that have not seen the table's model.

`Prior.log_mean` holds natural logarithms of predicted TTFT and TPOT in ms for every recorded row. Three steps, none of
which looks at a measurement of the predicted model:

1. the raw model: our operation model without its corrections and with constants of engines' hosts that were fitted to
   runs of other architectures (`benchmarks.search.hosts`), or a file of predictions (id, ttft_ms, tpot_ms);
2. rows that the raw model does not predict: a ridge regression of its predictions on the row's sizes, load and names,
   fitted to the model's other rows (or, for a model without any, to every model's), and marked as `filled`;
3. for a file of predictions, the correction: a ridge regression of log(measured / prediction) on the same columns and
   the predictions, fitted to the *measured rows of the other models*. Our own model is worse off with it (the median
   error of TPOT rises from 11% to 17%), and goes without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from perf_model.runs import Run, Unpredictable
from perf_model.silicon import Silicon
from perf_model.validate import predict_runs

LATENCIES = ("ttft_ms", "tpot_ms")
NAMES = ("system", "engine", "precision", "mode")
FILL_PENALTY, CORRECTION_PENALTY = 1.0, 30.0
LEAST_PREDICTED = 10


@dataclass(frozen=True, kw_only=True)
class Prior:
    """Predictions by row id: `log_mean` (n, 2) and `filled` (n,), with the `label` that reports print."""

    ids: pd.Index
    log_mean: np.ndarray
    filled: np.ndarray
    label: str

    def of(self, id_groups: pd.Series) -> tuple[np.ndarray, np.ndarray]:
        """Predictions (m, 2) and filled flags (m,) of candidates, each given by the ids of its recordings."""
        at = [self.ids.get_indexer(ids) for ids in id_groups]
        means = np.array([self.log_mean[index].mean(0) for index in at])
        return means, np.array([self.filled[index].all() for index in at])


def file_prior(rows: pd.DataFrame, predictions: Path) -> Prior:
    """The prior from a file of predictions (id, ttft_ms, tpot_ms); `rows` as of `tables.read_measurements`."""
    raw = pd.read_csv(predictions).set_index("id")[list(LATENCIES)]
    return _prior(rows, raw, f"the predictions in {predictions.name}", correct=True)


def own_prior(rows: pd.DataFrame, runs: Sequence[Run | Unpredictable], silicon: Silicon, constants: str) -> Prior:
    """The prior from our own operation model; `constants` says which the constants of engines' hosts of `silicon` are.

    Raises `InvalidValueError` where there are no operation tables.
    """
    predicted, _ = predict_runs(runs, silicon)
    raw = pd.DataFrame(
        {"id": [p.run.id for p in predicted]} | {n: [getattr(p, n) for p in predicted] for n in LATENCIES}
    )
    source = f"our operation model without corrections fitted to serving runs, constants of engines' hosts {constants}"
    return _prior(rows, raw.set_index("id"), source, correct=False)


def _prior(rows: pd.DataFrame, raw_file: pd.DataFrame, source: str, *, correct: bool) -> Prior:
    raw = np.log(raw_file.reindex(rows["id"]).to_numpy(float))
    known = np.isfinite(raw).all(1)
    design = _design(rows)
    complete = _fill(raw, known, design, rows["model"].to_numpy())
    label = f"{source} ({known.mean():.0%} of rows, the others filled by regression on its predictions)"
    if correct:
        complete = complete + _correction(rows, complete, np.column_stack([design, complete, ~known]))
        label += ", corrected by a ridge regression on the measured rows of the other models"
    label += "" if "shipped" in source else "; nothing measured of the table's own model is used"
    return Prior(ids=pd.Index(rows["id"]), log_mean=complete, filled=~known, label=label)


def _correction(rows: pd.DataFrame, predicted: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """log(measured / predicted) (n, 2) of every row, as the rows of the other models have it."""
    residual = np.log(rows[list(LATENCIES)].to_numpy(float)) - predicted
    found = np.empty_like(predicted)
    for model in rows["model"].unique():
        inside = (rows["model"] == model).to_numpy()
        for k in range(len(LATENCIES)):
            found[inside, k] = _ridge(columns[~inside], residual[~inside, k], CORRECTION_PENALTY, columns[inside])
    return found


def _fill(raw: np.ndarray, known: np.ndarray, design: np.ndarray, models: np.ndarray) -> np.ndarray:
    complete = raw.copy()
    for model in np.unique(models):
        inside = models == model
        source = known & inside if (known & inside).sum() >= LEAST_PREDICTED else known
        missing = inside & ~known
        for k in range(raw.shape[1]):
            complete[missing, k] = _ridge(design[source], raw[source, k], FILL_PENALTY, design[missing])
    return complete


def _design(rows: pd.DataFrame) -> np.ndarray:
    """Logarithms of sizes and loads, two hinges on the load per GPU, and a column for every name."""
    split = (rows["mode"] == "disagg").to_numpy()
    tp = np.where(split, rows["decode_tp_size"], rows["tp_size"]).astype(float)
    dp = np.where(split, rows["decode_attention_dp_size"], rows["attention_dp_size"]).astype(float)
    # Where the number of workers is not recorded, one decode worker stands for the deployment.
    gpus = np.where(rows["gpus"].isna(), tp * dp, rows["gpus"]).astype(float)
    load = rows["concurrency"].fillna(rows["concurrency"].median()).to_numpy(float)
    per_gpu = np.log(load / gpus)
    numbers = [
        np.log(load),
        np.log(load) ** 2,
        per_gpu,
        per_gpu**2,
        np.maximum(per_gpu - np.log(16), 0),
        np.maximum(per_gpu - np.log(64), 0),
        per_gpu + np.log(rows["isl"].to_numpy(float)),
        np.log(rows["isl"].to_numpy(float)),
        np.log(rows["osl"].to_numpy(float)),
        np.log(tp),
        np.log(dp),
        np.log(gpus),
    ]
    flags = [(rows[name] == value).to_numpy(float) for name in NAMES for value in sorted(rows[name].unique())]
    return np.column_stack([*numbers, *flags])


def _ridge(features: np.ndarray, target: np.ndarray, penalty: float, queries: np.ndarray) -> np.ndarray:
    """Ridge regression on standardised columns."""
    centre, spread = features.mean(0), features.std(0) + 1e-9
    scaled = (features - centre) / spread
    weights = np.linalg.solve(
        scaled.T @ scaled + penalty * np.eye(scaled.shape[1]), scaled.T @ (target - target.mean())
    )
    return ((queries - centre) / spread) @ weights + target.mean()
