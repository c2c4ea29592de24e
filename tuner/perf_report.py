"""How a validation against measured runs is shown: as tables, and as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from rich.console import Console

    from perf_model.validate import ErrorSummary, ValidationReport

_TITLES = {
    "mode": "All rows, by mode",
    "engine": "Aggregated rows, by engine",
    "system": "Aggregated rows, by system",
    "model": "Aggregated rows, by model",
}


def show_validation(found: ValidationReport, calibration: str, console: Console) -> None:
    """Print coverage, errors and the reasons of what was not predicted."""
    predicted = len(found.predictions)
    console.print(f"{predicted:,} of {found.rows:,} runs predicted, calibration: {calibration}")
    if calibration == "shipped":
        console.print(
            "  The shipped prior was fitted to public runs. Where these are among them, errors are too small:"
        )
        console.print("  those of runs that it has not seen are told by benchmarks/fit_prior.py.")
    for mode, share in found.coverage.items():
        console.print(f"  {mode}: {share:.1%} covered")
    for kind, summaries in found.summaries.items():
        console.print(_errors(_TITLES.get(kind, kind), summaries))
    if found.reasons:
        console.print("\nNot predicted:")
    for reason, count in sorted(found.reasons.items(), key=lambda item: -item[1]):
        console.print(f"  {count:4d} x {reason}", soft_wrap=True)


def _errors(title: str, summaries: list[ErrorSummary]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 1), title=f"\n{title}: absolute relative errors", title_justify="left")
    table.add_column("", no_wrap=True)
    for column in ("rows", "TTFT median", "mean", "p90", "TPOT median", "mean", "p90"):
        table.add_column(column, justify="right")
    for row in summaries:
        values = (row.ttft_median, row.ttft_mean, row.ttft_p90, row.tpot_median, row.tpot_mean, row.tpot_p90)
        table.add_row(row.group, str(row.rows), *("-" if math.isnan(v) else f"{v:.1%}" for v in values))
    return table


def validation_json(found: ValidationReport, calibration: str) -> dict[str, object]:
    """The report as plain JSON; a group without measured values has null errors."""
    return {
        "rows": found.rows,
        "predicted": len(found.predictions),
        "calibration": calibration,
        "coverage": found.coverage,
        "reasons": found.reasons,
        "errors": {kind: [_summary(row) for row in rows] for kind, rows in found.summaries.items()},
    }


def _summary(row: ErrorSummary) -> dict[str, object]:
    return {
        key: None if isinstance(value, float) and math.isnan(value) else value for key, value in asdict(row).items()
    }
