"""How right the model is on measured runs, beside the reference where its predictions are given.

    python benchmarks/accuracy.py MEASUREMENTS.csv [--reference PREDICTIONS.csv] [--json]

Errors are absolute and relative, of mean TTFT and TPOT. The reference's predictions are a CSV file with id, ttft_ms and
tpot_ms; the two are also compared on the rows that both predict.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import numpy as np

from perf_model.runs import Run, Unpredictable, read_runs
from perf_model.silicon import default_silicon
from perf_model.validate import Predicted, predict_runs
from search_spaces.serving import Mode

Figures = dict[str, tuple[float, float]]


def reference_figures(path: Path) -> Figures:
    """TTFT and TPOT by row id."""
    with path.open(encoding="utf-8", newline="") as stream:
        return {row["id"]: (float(row["ttft_ms"]), float(row["tpot_ms"])) for row in csv.DictReader(stream)}


def errors(runs: list[Run], figures: Figures, rows: int) -> dict[str, float]:
    """Errors of `figures` on `runs`, and the share of `rows` that they cover."""
    pairs = [(figures[run.id], run) for run in runs if run.id in figures]
    found = np.array([(abs(f[0] / run.ttft_ms - 1.0), abs(f[1] / run.tpot_ms - 1.0)) for f, run in pairs])
    medians, means = np.nanmedian(found, axis=0), np.nanmean(found, axis=0)
    return {
        "rows": float(len(pairs)),
        "share": len(pairs) / rows,
        "ttft_median": float(medians[0]),
        "ttft_mean": float(means[0]),
        "tpot_median": float(medians[1]),
        "tpot_mean": float(means[1]),
    }


def by_id(predicted: list[Predicted]) -> Figures:
    """Our figures by row id."""
    return {p.run.id: (p.ttft_ms, p.tpot_ms) for p in predicted}


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("measurements", type=Path)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = read_runs(options.measurements)
    ours = by_id(predict_runs(rows, default_silicon())[0])
    theirs = reference_figures(options.reference) if options.reference else {}
    report: dict[str, dict[str, float]] = {}
    for mode in Mode:
        runs = [row for row in rows if isinstance(row, Run) and row.mode is mode]
        listed = len(runs) + sum(isinstance(row, Unpredictable) and row.mode == mode for row in rows)
        report[f"{mode}, model"] = errors(runs, ours, listed)
        if theirs:
            report[f"{mode}, reference"] = errors(runs, theirs, listed)
            both = [run for run in runs if run.id in ours and run.id in theirs]
            report[f"{mode}, model where both predict"] = errors(both, ours, listed)
            report[f"{mode}, reference where both predict"] = errors(both, theirs, listed)
    if options.json:
        print(json.dumps(report))
        return
    for name, row in report.items():
        print(
            f"{name:42s} {row['rows']:5.0f} rows ({row['share']:.1%}), TTFT {row['ttft_median']:.3f} / "
            f"{row['ttft_mean']:.3f}, TPOT {row['tpot_median']:.3f} / {row['tpot_mean']:.3f} (median / mean)"
        )


if __name__ == "__main__":
    main()
