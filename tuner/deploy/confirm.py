"""Measured again by a second load generator: runs of both clients in turn, and a whole front on this machine.

A member of the front is deployed by its shell script, as `tuner deploy` writes it, so that what is confirmed is what is
deployed.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from rich import box
from rich.table import Table

from cluster.load.agreement import Agreement, agreements
from cluster.load.aiperf import Aiperf, aiperf_measure
from cluster.load.driver import LoadRun
from cluster.load.measure import LoadMeasurement, LoadOutcome
from search_spaces.errors import InvalidValueError, TunerError, require
from search_spaces.metrics import METRICS
from studies.codec import Json
from tuner.deploy.bench import API_KEY_VARIABLE, Benchmark, load_run, run_benchmark
from tuner.deploy.chosen import Chosen
from tuner.deploy.command import Target, make_files, write_files
from tuner.deploy.nodes import measured_nodes
from tuner.deploy.readme import benchmark_of
from tuner.wording import candidate_text, number

SEED_STEP = 7919
"""Seeds of repeated runs lie so far apart: a prefix cache knows none of the prompts of the run before."""
STOP_LIMIT_S = 60.0


class NotConfirmedError(TunerError):
    """A client gave no figures, or the deployment did not start."""

    exit_code = 3


@dataclass(frozen=True, kw_only=True)
class Confirmation:
    """What two clients saw of one deployment; `trial` and `configuration` say which."""

    trial: int
    configuration: str
    url: str
    repeats: int
    metrics: tuple[Agreement, ...]
    measured_before: dict[str, float]

    def json(self) -> dict[str, Json]:
        """For programs."""
        return {
            "trial": self.trial,
            "configuration": self.configuration,
            "url": self.url,
            "repeats": self.repeats,
            "metrics": [
                {
                    "metric": found.metric,
                    "before": self.measured_before.get(found.metric),
                    "built_in": found.first,
                    "aiperf": found.second,
                    "ratio": found.ratio,
                    "interval": [found.low, found.high],
                    "within_noise": found.within_noise,
                    "verdict": found.verdict,
                }
                for found in self.metrics
            ],
        }


def confirm_at(benchmark: Benchmark, url: str, aiperf: Aiperf, *, repeats: int, configuration: str) -> Confirmation:
    """Both clients put the load of `benchmark` on `url` in turn, `repeats` times each (at least two).

    Raises `NotConfirmedError` where one gives no figures.
    """
    require(repeats >= 2, f"repeats={repeats}: noise takes at least 2 runs of each client")
    ours, theirs = [], []
    with TemporaryDirectory(prefix="tuner-confirm-") as name:
        for repeat in range(repeats):
            folder = Path(name) / str(repeat)
            first, second = (_run(benchmark, url, folder / f"{i}.parquet", 2 * repeat + i) for i in range(2))
            ours.append(_figures(run_benchmark(benchmark, first), "the built-in client"))
            outcome = aiperf_measure(
                second,
                aiperf,
                folder / "aiperf",
                slos=benchmark.slos,
                devices=benchmark.devices,
                price_per_hour=benchmark.price_per_hour,
            )
            theirs.append(_figures(outcome, "AIPerf"))
    return Confirmation(
        trial=benchmark.trial,
        configuration=configuration,
        url=url,
        repeats=repeats,
        metrics=agreements(ours, theirs),
        measured_before=dict(benchmark.measured),
    )


def _run(benchmark: Benchmark, url: str, timings: Path, number_of_run: int) -> LoadRun:
    seed = benchmark.seed + SEED_STEP * (number_of_run + 1)
    return load_run(benchmark, url, timings=timings, seed=seed, api_key=os.environ.get(API_KEY_VARIABLE))


def _figures(outcome: LoadOutcome, client: str) -> dict[str, float]:
    if not isinstance(outcome, LoadMeasurement):
        raise NotConfirmedError(f"{client} gave no figures ({outcome.reason}): {outcome.detail}")
    return outcome.metrics.flat()


def confirm_here(chosen: Chosen, aiperf: Aiperf, *, repeats: int, port: int) -> Confirmation:
    """Deploy `chosen` on this machine by its own script, and confirm it there; nothing of it runs afterwards.

    Raises `InvalidValueError` for a trial that was measured on other machines.
    """
    machines = [name for name, _ in measured_nodes(chosen)]
    if machines != [socket.gethostname()]:
        raise InvalidValueError(
            f"trial {chosen.trial.number} ran on {', '.join(machines)}, and this is {socket.gethostname()}; deploy it "
            "there (tuner deploy), and confirm it with: tuner bench benchmark.json --url URL --with aiperf"
        )
    with TemporaryDirectory(prefix="tuner-confirm-") as name:
        out = Path(name) / "deployment"
        output, files = make_files(chosen, Target.SHELL, out, port=port)
        write_files(files, out)
        with _running(out, chosen.file.limits.start_s):
            return confirm_at(
                benchmark_of(chosen),
                output.endpoint,
                aiperf,
                repeats=repeats,
                configuration=candidate_text(replace(chosen.candidate, load=chosen.load)),
            )


@contextmanager
def _running(out: Path, limit_s: float) -> Iterator[None]:
    """The deployment in `out`, from when it serves to the end of the block."""
    log = out / "start.log"
    with log.open("w") as sink:
        script = subprocess.Popen([out / "start.sh"], stdout=sink, stderr=subprocess.STDOUT)
    try:
        deadline_s = time.monotonic() + limit_s + STOP_LIMIT_S
        while "serving " not in log.read_text():
            if script.poll() is not None or time.monotonic() > deadline_s:
                raise NotConfirmedError(f"the deployment did not start: {log.read_text().strip()[-1500:]}")
            time.sleep(0.1)
        yield
    finally:
        script.send_signal(signal.SIGTERM)
        try:
            script.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            script.kill()


def table_of(confirmations: Sequence[Confirmation]) -> Table:
    """For people: a row for each metric of each deployment."""
    title = "Measured again by both clients: do they agree?"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for heading in ("trial", "metric", "before", "built-in", "AIPerf", "AIPerf / built-in (95%)", ""):
        table.add_column(heading, justify="left" if heading in {"metric", ""} else "right")
    for confirmation in confirmations:
        for found in confirmation.metrics:
            before = confirmation.measured_before.get(found.metric)
            table.add_row(
                str(confirmation.trial),
                f"{found.metric} ({METRICS[found.metric].unit})",
                "-" if before is None else number(before),
                number(found.first),
                number(found.second),
                f"{found.ratio:.3f} ({found.low:.3f} to {found.high:.3f})",
                found.verdict,
            )
    return table
