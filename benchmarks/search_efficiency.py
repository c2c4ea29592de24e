"""How many measurements a search needs: ours against Optuna's samplers, on recorded surfaces.

    python benchmarks/search_efficiency.py --measurements measured_serving.csv [--seeds 20] [--cache FOLDER] [--json]

Every sampler sees identical answers: those of serving runs on GPUs (`--measurements`) and those of a surface of the
embedded engine that `benchmarks/measure_surface.py` has measured (`--surface`). See docs/search.md for how tables are
made, how samplers are shown a table and how hypervolume is counted. Results are kept in `--cache`, so that a run that
was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pandas as pd
from rich.console import Console

from benchmarks.search.figures import Yardstick
from benchmarks.search.hosts import neutral_hosts, refitted_hosts
from benchmarks.search.jobs import (
    AT_ONCE,
    DETERMINISTIC,
    GP,
    HINDSIGHT,
    MODEL,
    NSGA2,
    RANDOM,
    TPE,
    Job,
    Result,
    complete_seeds,
    kept_result,
    perform_kept,
)
from benchmarks.search.modelled import Modelled, learn_priors, with_prior
from benchmarks.search.priors import Prior, file_prior, own_prior
from benchmarks.search.report import ORACLE, Findings
from benchmarks.search.surface import read_surface
from benchmarks.search.tables import measured_tables, read_measurements
from perf_model.hosts import HOSTS
from perf_model.prior import model_word
from perf_model.runs import Run, Unpredictable, read_runs
from perf_model.silicon import default_silicon
from perf_model.surrogate import HyperPrior

REFITTED = "fitted without the runs of the table's architecture"
SHIPPED = "as shipped, fitted to runs of this file too"
SURFACE = Path(__file__).resolve().parent / "data" / "embedded_surface.parquet"


@dataclass(frozen=True, kw_only=True)
class Subjects:
    """The tables with what is believed of them beforehand, and lines that say how they were made."""

    modelled: tuple[Modelled, ...]
    priors: dict[str, tuple[HyperPrior, ...]]
    facts: tuple[str, ...]


def recorded(options: argparse.Namespace) -> Subjects:
    """Tables of serving runs; the surrogate's hyperparameters are learnt from tables of other architectures only."""
    rows = read_measurements(options.measurements)
    recording = measured_tables(rows, assume_one_worker=options.assume_one_worker)
    names = sorted({table.model for table in recording.tables})
    runs = read_runs(options.measurements)
    words = architectures(runs)
    beliefs = _beliefs(rows, runs, {words.get(name, name) for name in names}, options)
    priors: dict[str, tuple[HyperPrior, ...]] = {}
    modelled: dict[str, Modelled] = {}
    for word, prior in beliefs.items():
        every = [with_prior(table, *prior.of(table.rows["id"])) for table in recording.tables]
        mine = [one for one in every if words.get(one.table.model, one.table.model) == word]
        learnt = learn_priors([one for one in every if words.get(one.table.model, one.table.model) != word])
        modelled |= {one.table.name: one for one in mine}
        priors |= {one.table.model: learnt for one in mine}
    left_out = [f"{options.measurements.name}: {count} rows: {reason}" for reason, count in recording.left_out.items()]
    label = next(iter(beliefs.values())).label if beliefs else "none: no table"
    facts = (f"prior of the tables of {options.measurements.name}: {label}", *left_out)
    ordered = tuple(modelled[table.name] for table in recording.tables)
    return Subjects(modelled=ordered, priors=priors, facts=facts)


def architectures(runs: Sequence[Run | Unpredictable]) -> dict[str, str]:
    """Architecture and sizes by the name of a model: copies of one checkpoint have the same."""
    return {run.model_name: model_word(run.model) for run in runs if isinstance(run, Run)}


def _beliefs(
    rows: pd.DataFrame, runs: Sequence[Run | Unpredictable], words: set[str], options: argparse.Namespace
) -> dict[str, Prior]:
    """What is believed of the rows for the tables of each architecture in `words`."""
    if options.predictions:
        return dict.fromkeys(sorted(words), file_prior(rows, options.predictions))
    silicon = default_silicon(options.tables)
    if options.hosts != "refitted":
        hosts, constants = (HOSTS, SHIPPED) if options.hosts == "shipped" else (neutral_hosts(), "neutral")
        return dict.fromkeys(sorted(words), own_prior(rows, runs, silicon.with_hosts(hosts), constants))
    known = [run for run in runs if isinstance(run, Run)]
    fitted = refitted_hosts(known, sorted(words), tables=options.tables, cache=options.cache, jobs=options.jobs)
    return {word: own_prior(rows, runs, silicon.with_hosts(hosts), REFITTED) for word, hosts in fitted.items()}


def measured(path: Path) -> Subjects:
    """The measured surface of the embedded engine."""
    surface = read_surface(path)
    table = surface.modelled.table
    priors = tuple(HyperPrior() for _ in table.metrics)
    return Subjects(modelled=(surface.modelled,), priors={table.model: priors}, facts=surface.facts)


def subjects(options: argparse.Namespace) -> Subjects:
    """All tables."""
    parts = [recorded(options)] if options.measurements else []
    if options.surface.exists():
        parts.append(measured(options.surface))
    facts = [fact for part in parts for fact in part.facts]
    if options.error_share != 1.0:
        facts.append(
            f"DIAGNOSIS: predictions were moved so that their errors are {options.error_share:.0%} of the true"
        )
    return Subjects(
        modelled=tuple(moved(m, options.error_share) for part in parts for m in part.modelled),
        priors={model: priors for part in parts for model, priors in part.priors.items()},
        facts=tuple(facts),
    )


def moved(modelled: Modelled, share: float) -> Modelled:
    """`modelled` with errors (of logarithms) of `share` of the true ones; as it is where that is 1."""
    if share == 1.0:
        return modelled
    return replace(modelled, log_mean=modelled.log_mean + (1.0 - share) * modelled.log_ratio)


def make_jobs(found: Subjects, searcher: str, seeds: int, *, logarithmic: bool, limit: int | None) -> list[Job]:
    """Jobs of one searcher, all tables with the first seed first, and of these the small ones."""
    return [
        Job(
            modelled=modelled,
            priors=found.priors[modelled.table.model],
            searcher=searcher,
            seed=seed,
            logarithmic=logarithmic,
            limit=limit,
        )
        for seed in range(1 if searcher in DETERMINISTIC else seeds)
        for modelled in sorted(found.modelled, key=lambda one: len(one.table))
    ]


def all_jobs(found: Subjects, options: argparse.Namespace) -> list[Job]:
    """Jobs of the searchers that were asked for, the quick ones first."""
    slow = {TPE: (options.tpe_seeds or options.seeds, options.limit), GP: (options.gp_seeds, options.limit)}
    jobs: list[Job] = []
    for name in (*AT_ONCE, MODEL, HINDSIGHT, RANDOM, NSGA2, TPE, GP):
        if options.only and name not in options.only:
            continue
        seeds, limit = slow.get(name, (options.seeds, None))
        jobs += make_jobs(found, name, seeds, logarithmic=options.log_hypervolume, limit=limit)
    return jobs


def carry_out(jobs: Sequence[Job], options: argparse.Namespace) -> tuple[list[Result], list[str]]:
    """Results of `jobs`, and what must be said of them. Without torch, GP counts as far as it is in the cache."""
    has_torch = find_spec("torch") is not None
    notes = []
    if any(job.limit for job in jobs):
        notes.append(f"runs of TPE and GP end after {options.limit} measurements, which then count as enough")
    if not has_torch and any(job.searcher == GP for job in jobs):
        notes.append("Optuna's GP sampler needs torch, which is not installed (pip install torch): only kept results")
    known = {job.kept_in(Path()): kept_result(job, options.cache) for job in jobs}
    waiting = [
        job
        for job in jobs
        if known[job.kept_in(Path())] is None and not options.only_kept and (has_torch or job.searcher != GP)
    ]
    with ProcessPoolExecutor(options.jobs) as pool:
        results = list(pool.map(partial(perform_kept, cache=options.cache), waiting))
    results += [result for result in known.values() if result is not None]
    kept, incomplete = complete_seeds(results, list(dict.fromkeys(job.modelled.table.name for job in jobs)))
    if incomplete:
        notes.append(f"not run on every table yet, hence left out of medians over tables: {', '.join(incomplete)}")
    return kept, notes


def findings(found: Subjects, options: argparse.Namespace) -> Findings:
    """Run everything."""
    results, notes = carry_out(all_jobs(found, options), options)
    for modelled in found.modelled:
        run = Yardstick(modelled.table, logarithmic=options.log_hypervolume).oracle()
        results.append(Result(table=modelled.table.name, searcher=ORACLE, seed=0, run=run, seconds=0.0))
    scale = "logarithmic" if options.log_hypervolume else "linear"
    counted = f"hypervolume: {scale} objectives scaled by the table's front; reference point 10% beyond its nadir"
    return Findings(
        facts=(*found.facts, counted, *notes),
        sizes={modelled.table.name: len(modelled.table) for modelled in found.modelled},
        results=tuple(results),
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--measurements", type=Path, help="serving runs with the columns of measured_serving.csv")
    parser.add_argument("--surface", type=Path, default=SURFACE, help="measured surface of the embedded engine")
    parser.add_argument(
        "--predictions", type=Path, help="raw predictions in place of our model's: id, ttft_ms, tpot_ms"
    )
    parser.add_argument("--tables", type=Path, help="operation tables of our model; the installed ones by default")
    parser.add_argument(
        "--hosts",
        choices=("refitted", "neutral", "shipped"),
        default="refitted",
        help="constants of engines' hosts: refitted without the table's architecture, neutral, or those shipped, which "
        "saw these runs",
    )
    parser.add_argument(
        "--error-share", type=float, default=1.0, help="diagnosis: what if predictions were only this share as wrong"
    )
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--tpe-seeds", type=int, help="as --seeds where it is left out")
    parser.add_argument("--gp-seeds", type=int, default=2, help="Optuna's GP takes minutes a run; 0 leaves it out")
    parser.add_argument("--limit", type=int, default=50, help="measurements after which a run of TPE or GP ends")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--only", nargs="+", metavar="SEARCHER", help="these searchers only")
    parser.add_argument("--only-kept", action="store_true", help="report what the cache holds, run nothing")
    parser.add_argument("--cache", type=Path, help="folder that keeps the results of single runs")
    parser.add_argument("--log-hypervolume", action="store_true", help="count hypervolume on logarithmic objectives")
    parser.add_argument("--assume-one-worker", action="store_true", help="keep rows whose worker counts are unknown")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--out", type=Path, help="write the figures to OUT.json and the printed tables to OUT.md")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark."""
    options = parse(arguments)
    found = subjects(options)
    if not found.modelled:
        print(f"nothing to replay: give --measurements; there is no surface at {options.surface}", file=sys.stderr)
        return 2
    report = findings(found, options)
    if options.json:
        print(json.dumps(report.to_json(), indent=1))
    else:
        report.show(Console(width=160))
    if options.out:
        write(report, options.out)
    return 0


def write(report: Findings, out: Path) -> None:
    """The figures as JSON, and as people read them."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
    with out.with_suffix(".md").open("w", encoding="utf-8") as stream:
        stream.write(
            "# Search efficiency\n\nPrinted by `python benchmarks/search_efficiency.py`; see docs/search.md.\n\n```\n"
        )
        report.show(Console(width=160, file=stream, no_color=True))
        stream.write("```\n")


if __name__ == "__main__":
    sys.exit(main())
