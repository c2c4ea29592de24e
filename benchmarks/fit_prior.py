"""Fit the shipped prior to measured runs, and print what it is worth on runs that it has not seen.

    python benchmarks/fit_prior.py --measurements measured_serving.csv [--out FILE] [--json] [--exclude-model NAME]...

Errors are absolute and relative, of mean TTFT and TPOT, of every row that can be predicted. "none" is the model without
a prior, "fitted" the prior on its own rows; the others are corrected by priors fitted without them: without a random
fifth of the measurements, without their model, without their system, without their model on their system.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from perf_model.prior import METRICS, SHIPPED, Prior
from perf_model.prior_fit import FOLDS, Fitter, Sample, fit, raw_errors
from perf_model.runs import Run, Unpredictable, read_runs
from perf_model.silicon import Silicon, default_silicon
from perf_model.validate import Predicted, predict_runs
from search_spaces.serving import Mode


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Absolute relative errors of some rows, and the share that the 90% interval of the prior holds (None without)."""

    mode: str
    left_out: str
    rows: int
    ttft_median: float
    ttft_mean: float
    tpot_median: float
    tpot_mean: float
    ttft_coverage: float | None = None
    tpot_coverage: float | None = None


def main() -> None:
    """Parse the command line, fit, print and write."""
    arguments = _arguments()
    path = Path(arguments.measurements)
    silicon, rows = default_silicon(arguments.tables), read_runs(path)
    predicted, refused = predict_runs(rows, silicon)
    raw = raw_errors(predicted, predict_runs(rows, without_tables(silicon, rows))[0])
    origin = {
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "licence": "Apache-2.0 (public runs of InferenceX and NVIDIA, from the wheel of aiconfigurator-core 0.12.0)",
        "command": "python benchmarks/fit_prior.py --measurements " + path.name,
        "not predictable": str(len(refused)),
    }
    prior = fit(predicted, exclude_models=arguments.exclude_model, provenance=origin, raw=raw)
    found = evaluation(predicted, prior)
    if arguments.out:
        prior.save(Path(arguments.out))
    if arguments.json:
        print(json.dumps({"rows": [asdict(errors) for errors in found], "provenance": prior.provenance}, indent=1))
    else:
        print(table(found))
        print("\nstandard deviations of figures without a prior (of logarithms)")
        print(
            "\n".join(f"{case:<15}" + " ".join(f"{n} {sd:.3f}" for n, sd in sds.items()) for case, sds in raw.items())
        )


def without_tables(silicon: Silicon, rows: Sequence[Run | Unpredictable]) -> Silicon:
    """The same systems, of whose operations nothing is known but their speed of light."""
    bare = Silicon(silicon.root / "none")
    for name in {row.system for row in rows if isinstance(row, Run)}:
        bare = bare.with_system(silicon.system(name))
    return bare


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measurements", required=True, help="CSV file of measured runs")
    parser.add_argument("--tables", type=Path, help="directory of operation tables (the installed ones by default)")
    parser.add_argument("--out", help=f"where to write the prior (shipped: {SHIPPED.name})")
    parser.add_argument("--exclude-model", action="append", default=[], help="leave out the runs of this model")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args()


def evaluation(predicted: Sequence[Predicted], prior: Prior) -> list[Errors]:
    """Errors without a prior, with the fitted one, and with priors fitted without parts of the runs."""
    sample = Sample(tuple(predicted))
    fitters = [Fitter(sample, metric) for metric in METRICS]
    raw = [sample.log_ratio[metric] for metric in METRICS]
    corrected = np.log(np.array(prior.correct(predicted)) / [(p.ttft_ms, p.tpot_ms) for p in predicted]).T
    cases = {"none": raw, "fitted": [ratio - change for ratio, change in zip(raw, corrected, strict=True)]}
    for name, folds in FOLDS.items():
        cases[f"without {name}"] = [fitter.residuals(folds(sample)) for fitter in fitters]
    found = []
    for mode in Mode:
        rows = np.array([p.run.mode is mode for p in predicted])
        for name, residuals in cases.items():
            found.append(_errors(mode, name, [r[rows] for r in residuals], _sds(prior, name, mode)))
    return found


def _sds(prior: Prior, case: str, mode: Mode) -> list[float] | None:
    """Standard deviations that the prior states for rows left out as `case` says."""
    if not case.startswith("without"):
        return None
    known = "known" if case == "without random fifths" else "unknown"
    return [metric.log_sds[mode.value][known] for metric in (prior.ttft, prior.tpot)]


def _errors(mode: Mode, name: str, residuals: list[np.ndarray], sds: list[float] | None) -> Errors:
    ttft, tpot = (np.abs(np.expm1(-residual)) for residual in residuals)
    held = [None, None]
    if sds is not None:
        held = [float(np.mean(np.abs(r) < 1.645 * sd)) for r, sd in zip(residuals, sds, strict=True)]
    return Errors(
        mode=mode.value,
        left_out=name,
        rows=len(ttft),
        ttft_median=float(np.median(ttft)),
        ttft_mean=float(np.mean(ttft)),
        tpot_median=float(np.median(tpot)),
        tpot_mean=float(np.mean(tpot)),
        ttft_coverage=held[0],
        tpot_coverage=held[1],
    )


def table(found: Sequence[Errors]) -> str:
    """The errors as text."""
    metric = "{:>12} {:>6} {:>5}"
    names = [metric.format(f"{name} median", "mean", "90%") for name in ("TTFT", "TPOT")]
    return "\n".join([f"{'mode':<15}{'prior':<34}{'rows':>6}" + "".join(names), *map(_line, found)])


def _line(e: Errors) -> str:
    ttft = f"{e.ttft_median:>12.1%} {e.ttft_mean:>6.1%} {_share(e.ttft_coverage):>5}"
    tpot = f"{e.tpot_median:>12.1%} {e.tpot_mean:>6.1%} {_share(e.tpot_coverage):>5}"
    return f"{e.mode:<15}{e.left_out:<34}{e.rows:>6}{ttft}{tpot}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


if __name__ == "__main__":
    main()
