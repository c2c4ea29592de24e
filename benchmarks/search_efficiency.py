"""How many measurements a search needs: ours against Optuna's samplers, on recorded surfaces.

    python benchmarks/search_efficiency.py --measurements measured_serving.csv

Every sampler sees identical answers. See docs/search.md for how tables are made, how samplers are shown a table and how
hypervolume is counted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import optuna
from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.search.figures import EARLY, TARGETS, Run, Yardstick, replay
from benchmarks.search.modelled import CorrectedSearch, Modelled, learn_priors, model_order, with_prior
from benchmarks.search.priors import Prior, file_prior, own_prior
from benchmarks.search.samplers import random_order, sampler_order
from benchmarks.search.tables import Recording, measured_tables, read_measurements
from perf_model.surrogate import HyperPrior

OURS, MODEL, RANDOM, NSGA2 = "ours", "model alone", "random", "nsga2"
OTHERS = ("tpe", "gp")
DETERMINISTIC = (MODEL,)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One search on one table with one seed."""

    modelled: Modelled
    priors: tuple[HyperPrior, ...]
    searcher: str
    seed: int
    logarithmic: bool


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of a job."""

    table: str
    searcher: str
    seed: int
    run: Run
    seconds: float


def perform(job: Job) -> Result:
    """Replay one search."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    table = job.modelled.table
    yardstick = Yardstick(table, logarithmic=job.logarithmic)
    began = time.perf_counter()
    forecasts = None
    if job.searcher == OURS:
        search = CorrectedSearch(modelled=job.modelled, priors=job.priors, seed=job.seed)
        order, forecasts = search.order(), search.forecasts
    elif job.searcher == MODEL:
        order = model_order(job.modelled)
    elif job.searcher == RANDOM:
        order = random_order(table, job.seed)
    else:
        order = sampler_order(table, job.searcher, job.seed)
    run = replay(yardstick, order, forecasts)
    return Result(table=table.name, searcher=job.searcher, seed=job.seed, run=run, seconds=time.perf_counter() - began)


def make_jobs(recording: Recording, prior: Prior, searchers: dict[str, int], logarithmic: bool) -> list[Job]:
    """The jobs of every table; the hyperparameters of ours are learnt from the tables of other models only."""
    modelled = [with_prior(table, *prior.of(table.rows["id"])) for table in recording.tables]
    priors = {
        model: learn_priors([m for m in modelled if m.table.model != model])
        for model in {m.table.model for m in modelled}
    }
    return [
        Job(modelled=m, priors=priors[m.table.model], searcher=name, seed=seed, logarithmic=logarithmic)
        for name, seeds in searchers.items()
        for m in modelled
        for seed in range(1 if name in DETERMINISTIC else seeds)
    ]


def summary(results: list[Result], oracle: dict[str, Run]) -> dict[str, object]:
    """Medians over tables and seeds, by searcher, and what the issue asks of them."""
    by_searcher: dict[str, list[Run]] = defaultdict(list)
    seconds: dict[str, float] = defaultdict(float)
    for result in results:
        by_searcher[result.searcher].append(result.run)
        seconds[result.searcher] += result.seconds
    by_searcher["oracle"] = list(oracle.values())
    searchers = {name: _medians(runs) | {"seconds": round(seconds[name], 1)} for name, runs in by_searcher.items()}
    return {"searchers": searchers, "criteria": _criteria(searchers, by_searcher.get(OURS, []))}


def _medians(runs: list[Run]) -> dict[str, float]:
    needed = np.array([run.needed for run in runs], float)
    medians = {f"to_{target:.0%}": float(np.median(needed[:, i])) for i, target in enumerate(TARGETS)}
    return medians | {f"regret_after_{EARLY}": float(np.median([run.early_regret for run in runs]))}


def _criteria(searchers: dict[str, dict[str, float]], ours: list[Run]) -> list[dict[str, object]]:
    if not ours:
        return []
    mine, rivals = searchers[OURS], {name: searchers[name] for name in (RANDOM, *OTHERS) if name in searchers}
    found: list[dict[str, object]] = []

    def add(what: str, value: float, limit: float, *, least: float = 0.0) -> None:
        found.append({"criterion": what, "value": value, "limit": limit, "met": bool(least <= value <= limit)})

    if NSGA2 in searchers:
        add("to 95%: ours / NSGA-II alone", mine["to_95%"] / searchers[NSGA2]["to_95%"], 1 / 5)
    if rivals:
        add("to 95%: ours / best other sampler", mine["to_95%"] / min(r["to_95%"] for r in rivals.values()), 1 / 2)
        add("to 99%: ours / best other sampler", mine["to_99%"] / min(r["to_99%"] for r in rivals.values()), 1 / 3)
    add(f"regret after {EARLY} measurements", mine[f"regret_after_{EARLY}"], 0.05)
    late = [run.forecasts[EARLY:] for run in ours if len(run.forecasts) > EARLY]
    if late:
        errors = np.median([np.median([f.error for f in run], axis=0) for run in late], axis=0)
        add(f"TPOT one-step-ahead error after {EARLY}", float(errors[1]), 0.08)
        add(f"TTFT one-step-ahead error after {EARLY}", float(errors[0]), 0.20)
        add("coverage of 90% intervals", float(np.mean([f.covered for run in late for f in run])), 0.95, least=0.85)
    return found


def paired(results: list[Result]) -> dict[str, float]:
    """Median over tables of (median of ours / median of NSGA-II alone) to the first target: another way to count."""
    needed: dict[tuple[str, str], list[int]] = defaultdict(list)
    for result in results:
        needed[result.table, result.searcher].append(result.run.needed[0])
    tables = {table for table, searcher in needed if searcher == OURS}
    return {
        name: float(np.median([np.median(needed[t, OURS]) / np.median(needed[t, name]) for t in tables]))
        for name in {searcher for _, searcher in needed} - {OURS}
        if all((t, name) in needed for t in tables)
    }


def show(report: dict[str, object], results: list[Result], oracle: dict[str, Run]) -> None:
    """Print the tables for people."""
    console = Console(width=150)
    console.print(f"Prior: {report['prior']}")
    console.print(f"Hypervolume: {report['hypervolume']}")
    for reason, count in report["left_out"].items():  # type: ignore[attr-defined]
        console.print(f"Rows left out or merged: {count} ({reason})")
    names = list(report["searchers"])  # type: ignore[call-overload]
    columns = RichTable("table", "rows", *names, title="Measurements to 95% / 99% of the table's hypervolume (medians)")
    runs: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for result in results:
        runs[result.table, result.searcher].append(result.run)
    for table, size in report["tables"].items():  # type: ignore[attr-defined]
        cells = [_cell([oracle[table]] if name == "oracle" else runs[table, name]) for name in names]
        columns.add_row(table, str(size), *cells)
    columns.add_row("median", "", *[_median_cell(report["searchers"][name]) for name in names])  # type: ignore[index]
    console.print(columns)
    verdicts = RichTable("criterion", "value", "limit", "met")
    for item in report["criteria"]:  # type: ignore[attr-defined]
        verdicts.add_row(item["criterion"], f"{item['value']:.3f}", f"{item['limit']:.3f}", str(item["met"]))
    console.print(verdicts)
    console.print("Paired (median over tables of ours / other, to 95%):", report["paired"])


def _cell(runs: list[Run]) -> str:
    medians = _medians(runs) if runs else None
    return f"{medians['to_95%']:.0f} / {medians['to_99%']:.0f}" if medians else "-"


def _median_cell(medians: dict[str, float]) -> str:
    return f"{medians['to_95%']:g} / {medians['to_99%']:g}, {medians[f'regret_after_{EARLY}']:.1%}"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--measurements", type=Path, help="serving runs with the columns of measured_serving.csv")
    parser.add_argument(
        "--predictions", type=Path, help="raw predictions in place of our model's: id, ttft_ms, tpot_ms"
    )
    parser.add_argument("--tables", type=Path, help="operation tables of our model; the installed ones by default")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--gp-seeds", type=int, default=3, help="Optuna's GP takes minutes a run; 0 leaves it out")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--log-hypervolume", action="store_true", help="count hypervolume on logarithmic objectives")
    parser.add_argument("--assume-one-worker", action="store_true", help="keep rows whose worker counts are unknown")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark."""
    options = parse(arguments)
    if options.measurements is None:
        print("give --measurements", file=sys.stderr)
        return 2
    rows = read_measurements(options.measurements)
    recording = measured_tables(rows, assume_one_worker=options.assume_one_worker)
    if options.predictions:
        prior = file_prior(rows, options.predictions)
    else:
        prior = own_prior(rows, options.measurements, options.tables)
    searchers = {OURS: options.seeds, MODEL: 1, RANDOM: options.seeds, NSGA2: options.seeds, "tpe": options.seeds}
    if options.gp_seeds and find_spec("torch") is None:
        print("Optuna's GP sampler needs torch, which is not installed: left out (pip install torch)", file=sys.stderr)
    elif options.gp_seeds:
        searchers["gp"] = options.gp_seeds
    jobs = make_jobs(recording, prior, searchers, options.log_hypervolume)
    with ProcessPoolExecutor(options.jobs) as pool:
        results = list(pool.map(perform, jobs))
    oracle = {t.name: Yardstick(t, logarithmic=options.log_hypervolume).oracle() for t in recording.tables}
    scale = "logarithmic" if options.log_hypervolume else "linear"
    report: dict[str, object] = {
        "prior": prior.label,
        "hypervolume": f"{scale} objectives scaled by the table's front; reference point 10% beyond its nadir",
        "left_out": recording.left_out,
        "tables": {table.name: len(table) for table in recording.tables},
        **summary(results, oracle),
        "paired": paired(results),
    }
    if options.json:
        print(json.dumps(report, indent=1))
    else:
        show(report, results, oracle)
    return 0


if __name__ == "__main__":
    sys.exit(main())
