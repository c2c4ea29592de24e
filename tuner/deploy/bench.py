"""A measurement that can be repeated on any server: what was sent, how hard, and what came out of it.

`benchmark.json` lies beside every deployment; `tuner bench benchmark.json --url URL` puts the same requests on it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from search_spaces.errors import InvalidValueError
from search_spaces.measuring import MeasurementRule
from search_spaces.problem import Slo
from search_spaces.workload import Load, Workload
from studies.codec import from_json, to_json
from studies.errors import StudyFormatError

if TYPE_CHECKING:
    from cluster.load.driver import LoadRun
    from cluster.load.measure import LoadOutcome

SCHEMA = 1
API_KEY_VARIABLE = "TUNER_API_KEY"


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A load, how it is measured, and the figures that it gave (`measured`, by name; none before the first time).

    `seed` decides prompts, lengths and arrival times. `devices` and `price_per_hour` are those of the deployment.
    """

    study: str
    trial: int
    model_name: str
    vocab_size: int
    workload: Workload
    load: Load
    rule: MeasurementRule
    slos: tuple[Slo, ...] = ()
    devices: int
    price_per_hour: float
    seed: int
    limit_s: float
    emulated: bool = False
    measured: Mapping[str, float] = field(default_factory=dict)
    schema: int = SCHEMA


def dump_benchmark(benchmark: Benchmark) -> str:
    """JSON text of `benchmark`."""
    return json.dumps(to_json(benchmark), indent=2) + "\n"


def load_benchmark(path: Path) -> Benchmark:
    """The benchmark in a file; raises `InvalidValueError` for one that is none."""
    try:
        return from_json(Benchmark, json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise InvalidValueError(f"{path} cannot be read ({error.strerror}); give a benchmark.json") from error
    except (ValueError, StudyFormatError) as error:
        raise InvalidValueError(f"{path} is no benchmark of this version: {error}; deploy the trial anew") from error


def load_run(benchmark: Benchmark, url: str, *, timings: Path, seed: int | None, api_key: str | None) -> LoadRun:
    """The load of `benchmark` on the server at `url`."""
    from cluster.load.driver import LoadRun

    return LoadRun(
        url=url,
        model_name=benchmark.model_name,
        workload=benchmark.workload,
        load=benchmark.load,
        vocab_size=benchmark.vocab_size,
        seed=benchmark.seed if seed is None else seed,
        rule=benchmark.rule,
        limit_s=benchmark.limit_s,
        timings_path=timings,
        api_key=api_key,
    )


def run_benchmark(benchmark: Benchmark, run: LoadRun) -> LoadOutcome:
    """Put the load on, and sum it up as the trial was."""
    from cluster.load.measure import measure

    return measure(run, slos=benchmark.slos, devices=benchmark.devices, price_per_hour=benchmark.price_per_hour)
