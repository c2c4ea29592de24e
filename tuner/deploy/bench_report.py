"""A benchmark run and shown: what the server gave now, beside what was measured before."""

from __future__ import annotations

import json
import os
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from cluster.load.measure import LoadMeasurement
from search_spaces.errors import TunerError
from search_spaces.metrics import METRICS
from tuner.deploy.bench import API_KEY_VARIABLE, Benchmark, load_run, run_benchmark
from tuner.wording import number

SHOWN = (
    "ttft_p50_ms",
    "ttft_p99_ms",
    "tpot_p50_ms",
    "tpot_p99_ms",
    "itl_p99_ms",
    "e2e_p50_ms",
    "output_tokens_per_s",
    "requests_per_s",
    "goodput_rps",
)


class BenchmarkFailedError(TunerError):
    """The run gave no figures."""

    exit_code = 3


def measured_at(benchmark: Benchmark, url: str, timings: Path, *, seed: int | None) -> LoadMeasurement:
    """What `benchmark` gives at `url`; raises `BenchmarkFailedError` with the reason where that is nothing."""
    run = load_run(benchmark, url, timings=timings, seed=seed, api_key=os.environ.get(API_KEY_VARIABLE))
    outcome = run_benchmark(benchmark, run)
    if not isinstance(outcome, LoadMeasurement):
        raise BenchmarkFailedError(f"no measurement ({outcome.reason}): {outcome.detail}")
    return outcome


def show_bench(benchmark: Benchmark, url: str, timings: Path, *, seed: int | None, as_json: bool) -> None:
    """Run `benchmark` against `url` and print its figures; raises `BenchmarkFailedError` with the reason for none."""
    outcome = measured_at(benchmark, url, timings, seed=seed)
    now = outcome.metrics.flat()
    if as_json:
        tree = {
            "study": benchmark.study,
            "trial": benchmark.trial,
            "url": url,
            "lateness_ms": outcome.lateness_ms,
            "requests": outcome.metrics.requests,
            "errors": outcome.metrics.errors,
            "metrics": now,
            "measured_before": dict(benchmark.measured),
        }
        print(json.dumps(tree, indent=2))
        return
    Console(markup=False, highlight=False).print(_table(benchmark, now))
    print(
        f"{outcome.metrics.requests} requests, {outcome.metrics.errors} failed; "
        f"the client was {outcome.lateness_ms:.1f} ms late (p99)"
    )


def _table(benchmark: Benchmark, now: dict[str, float]) -> Table:
    table = Table(title=f"Trial {benchmark.trial} of {benchmark.study}, measured again", box=box.SIMPLE_HEAD)
    table.add_column("metric")
    for heading in ("now", "before", "now / before"):
        table.add_column(heading, justify="right")
    table.add_column("unit")
    for name in SHOWN:
        before = benchmark.measured.get(name)
        ratio = "-" if not before else f"{now[name] / before:.2f}"
        table.add_row(name, number(now[name]), "-" if before is None else number(before), ratio, METRICS[name].unit)
    return table
