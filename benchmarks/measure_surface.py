"""Measure every configuration of the embedded engine in a small space, for `benchmarks/search_efficiency.py` to replay.

    python benchmarks/measure_surface.py [--passes 2] [--limit-s 2000] [--work FOLDER] [--out FILE] [--note TEXT]

Configurations of `benchmarks/data/embedded_surface.yaml` are deployed by the product's own runner and measured under
every load, in each pass all of them in another random order, so that passes tell noise and drift. A run whose client
was late is repeated. What was measured lies in `--work`, so that a run that was interrupted goes on where it was. The
Parquet file has a row for every measurement, the candidate as JSON, every metric, and the machine's load average at the
time; its metadata say when, with which engine and on how many cores. No names of hosts or folders are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.runner import Running, TrialRequest, TrialRunner
from search_spaces.hardware import Device
from search_spaces.outcome import Failure, Measurement, Outcome
from search_spaces.problem import Problem
from search_spaces.rules import infeasibility
from search_spaces.serving import Candidate, ServingConfig
from studies.codec import Json, to_json
from studies.screen import all_candidates
from tuner.places import find_place
from tuner.session import check_space
from tuner.study_file import dump_study, load_study_file
from tuner.study_schema import StudyFile
from tuner.wiring import connector, make_limits, make_problem, make_rule

DATA = Path(__file__).resolve().parent / "data"
STUDY, SURFACE = DATA / "embedded_surface.yaml", DATA / "embedded_surface.parquet"
ROWS, FACTS = "measurements.jsonl", "facts.json"
TRIES = 3
"""Runs of a measurement whose faults are not the configuration's (a late client, say) before it is given up."""
POLL_S = 0.02


@dataclass(frozen=True, kw_only=True)
class Task:
    """Measurements of one deployment in one pass."""

    candidates: tuple[Candidate, ...]
    number: int


def tasks_of(candidates: Sequence[Candidate], passes: int, seed: int) -> list[Task]:
    """One task for each pass and configuration, each pass in a random order of its own."""
    by_config: dict[ServingConfig, list[Candidate]] = {}
    for candidate in candidates:
        by_config.setdefault(candidate.config, []).append(candidate)
    tasks: list[Task] = []
    for number in range(passes):
        groups = list(by_config.values())
        random.Random(f"{seed} {number}").shuffle(groups)
        tasks += [Task(candidates=tuple(group), number=number) for group in groups]
    return tasks


def candidates_of(study: StudyFile) -> list[Candidate]:
    """Every distinct candidate that can run."""
    problem, space = check_space(study)
    return [c for c in dict.fromkeys(all_candidates(space)) if infeasibility(c, problem) is None]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where and how candidates are measured; `work` holds what was measured before."""

    runner: TrialRunner
    study: StudyFile
    problem: Problem
    work: Path

    def done(self) -> set[tuple[str, int]]:
        """Keys and passes that were measured."""
        return {(str(row["key"]), int(str(row["pass"]))) for row in read_rows(self.work)}

    def carry_out(self, task: Task) -> None:
        """Deploy once, measure under every load that is missing, write down each."""
        done = self.done()
        missing = [c for c in task.candidates if (c.key, task.number) not in done]
        if missing:
            self.runner.release()
        for candidate in missing:
            outcome = self._measured(candidate, task.number)
            with (self.work / ROWS).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row_of(candidate, outcome, task.number)) + "\n")

    def _measured(self, candidate: Candidate, number: int) -> Outcome:
        for attempt in range(TRIES):
            outcome = self._measure(candidate, f"surface-{candidate.key}-{number}-{attempt}", number)
            if not (isinstance(outcome, Failure) and outcome.retryable):
                break
        return outcome

    def _measure(self, candidate: Candidate, name: str, seed: int) -> Outcome:
        with tempfile.TemporaryDirectory() as folder:
            request = TrialRequest(
                trial=name,
                candidate=candidate,
                problem=self.problem,
                rule=make_rule(self.study),
                limits=make_limits(self.study),
                artifact_dir=Path(folder),
                seed=seed,
            )
            handle = self.runner.start(request)
            while isinstance(state := self.runner.poll(handle), Running):
                time.sleep(POLL_S)
            return state


def row_of(candidate: Candidate, outcome: Outcome, number: int) -> dict[str, Json]:
    """What is kept of a measurement: flat, of plain JSON values."""
    row: dict[str, Json] = {
        "key": candidate.key,
        "config": candidate.config.key,
        "candidate": json.dumps(to_json(candidate), sort_keys=True),
        "pass": number,
        "at_s": round(time.time(), 1),
        "load_average": os.getloadavg()[0],
    }
    row |= {f"{phase}_s": seconds for phase, seconds in outcome.timings_s.items()}
    if not isinstance(outcome, Measurement):
        return row | {"failure": outcome.reason.value}
    return row | {"client_lateness_ms": outcome.client_lateness_ms} | dict(outcome.metrics.flat())


def read_rows(work: Path) -> list[dict[str, Json]]:
    """What was measured so far."""
    path = work / ROWS
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def measure(study: StudyFile, work: Path, passes: int, limit_s: float) -> None:
    """Measure what is missing until all is measured or `limit_s` have passed."""
    began = time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    place = find_place(f"sqlite:///{work.resolve()}/unused.db")
    problem = make_problem(study)
    with connector(None, study)(problem, place) as cluster:
        device = cluster.measure(problem.node_pools[0])
        if not (work / FACTS).exists():
            (work / FACTS).write_text(json.dumps(facts(device)), encoding="utf-8")
        runner = cluster.runner(study.name)
        try:
            bench = Bench(runner=runner, study=study, problem=problem, work=work)
            for number, task in enumerate(tasks := tasks_of(candidates_of(study), passes, study.seed)):
                if time.monotonic() - began > limit_s:
                    print(f"the limit of {limit_s:.0f} s is used; call again to go on", file=sys.stderr)
                    return
                bench.carry_out(task)
                print(f"{number + 1} of {len(tasks)} deployments, {time.monotonic() - began:.0f} s", file=sys.stderr)
        finally:
            runner.close()


def facts(device: Device) -> dict[str, Json]:
    """What is true of the machine and the whole run; `device` is a core as measured at its start."""
    from importlib.metadata import version

    return {
        "date": datetime.now(UTC).date().isoformat(),
        "engine": f"xllamacpp {version('xllamacpp')}",
        "cores": os.cpu_count() or 0,
        "device": to_json(device),
    }


def write_surface(study: StudyFile, work: Path, out: Path, note: str) -> pd.DataFrame:
    """The Parquet file of all rows, with its provenance as metadata."""
    table = pa.Table.from_pandas(frame := pd.DataFrame(read_rows(work)), preserve_index=False)
    kept = json.loads((work / FACTS).read_text(encoding="utf-8"))
    origin = kept | {"study": dump_study(study), "note": note, "command": "python benchmarks/measure_surface.py"}
    table = table.replace_schema_metadata({b"provenance": json.dumps(origin).encode()})
    out.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, out, compression="zstd")
    return frame


def noise(frame: pd.DataFrame, metric: str) -> float:
    """Standard deviation of the logarithm of `metric` over the passes, the median over candidates."""
    logs = np.log(frame[metric]).groupby(frame["key"])
    return float(logs.std().median())


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--study", type=Path, default=STUDY)
    parser.add_argument("--out", type=Path, default=SURFACE)
    parser.add_argument("--work", type=Path, default=Path("tuner-data/surface"), help="what was measured so far")
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--limit-s", type=float, default=2000.0)
    parser.add_argument("--note", default="", help="what else is true of the run, for the provenance")
    options = parser.parse_args()
    study = load_study_file(options.study)
    measure(study, options.work, options.passes, options.limit_s)
    frame = write_surface(study, options.work, options.out, options.note)
    failed = frame["failure"].notna().sum() if "failure" in frame else 0
    print(
        f"{len(frame)} measurements of {frame['config'].nunique()} configurations, {failed} failures -> {options.out}"
    )
    for metric in ("ttft_mean_ms", "tpot_mean_ms", "output_tokens_per_s_per_gpu"):
        print(f"noise of {metric}: {noise(frame, metric):.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
