"""Are steps collected on a CPU node enough to predict the embedded engine there? Collects, predicts, measures.

    python benchmarks/collect_accuracy.py [STUDY.yaml] [--configs 4] [--requests 48] [--quick] [--tables DIR] [--json]

For the engine's defaults and a sample of the study's space, each under every load of the study: the mean and median
TTFT and TPOT that the model predicts from the collected steps (nothing is calibrated on a measurement of serving), what
is measured on real processes under real load, and the absolute relative errors. The roofline's errors stand beside.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean, median

from cluster.runner import Running, TrialRequest, TrialRunner
from search_spaces.outcome import Measurement, Outcome, Prediction
from search_spaces.problem import Problem
from search_spaces.rules import infeasibility
from search_spaces.serving import Candidate
from tuner.collecting import Wanted, collect
from tuner.places import find_place
from tuner.study_file import load_study_file
from tuner.study_schema import StudyFile
from tuner.table_places import TABLES_VARIABLE, measured_nodes
from tuner.wiring import connector, make_limits, make_problem, make_rule, make_space, serving_model

WANTED = 0.25
METRICS = ("ttft_mean_ms", "ttft_p50_ms", "tpot_mean_ms", "tpot_p50_ms")


def candidates(study: StudyFile, problem: Problem, configs: int) -> list[Candidate]:
    """The engine's defaults and a sample of the space, under every load; loads of one configuration stand together."""
    space = make_space(study, problem)
    rng = random.Random(study.seed)
    chosen = [space.default(mode) for mode in space.modes]
    for _ in range(200):
        if len(chosen) >= configs:
            break
        other = space.sample(rng)
        if other.config not in [c.config for c in chosen] and infeasibility(other, problem) is None:
            chosen.append(other)
    return [each for c in chosen[:configs] for each in (c, *space.same_config(c))]


def measure(runner: TrialRunner, study: StudyFile, problem: Problem, candidate: Candidate, folder: Path) -> Outcome:
    """Measure one candidate as a study would."""
    folder.mkdir(parents=True, exist_ok=True)
    request = TrialRequest(
        trial=folder.name,
        candidate=candidate,
        problem=problem,
        rule=make_rule(study),
        limits=make_limits(study),
        artifact_dir=folder,
        seed=int(folder.name.rpartition("-")[2]),
    )
    handle = runner.start(request)
    while isinstance(state := runner.poll(handle), Running):
        time.sleep(0.05)
    return state


def row(candidate: Candidate, measured: Measurement, found: dict[str, Prediction]) -> dict[str, object]:
    """Measured figures beside predicted ones."""
    flat = measured.metrics.flat()
    result: dict[str, object] = {
        "mode": str(candidate.config.mode),
        "options": [dict(pool.options) | {"replicas": pool.replicas} for pool in candidate.config.pools],
        "load": str(candidate.load),
    }
    for metric in METRICS:
        result[metric] = flat[metric]
        for name, prediction in found.items():
            result[f"{name}_{metric}"] = prediction.metrics[metric]
            result[f"{name}_{metric}_error"] = abs(prediction.metrics[metric] / flat[metric] - 1.0)
    return result


def summary(rows: list[dict[str, object]], names: list[str]) -> dict[str, dict[str, float]]:
    """Median, mean and largest error, and the share of errors within 25%, by model, mode and metric."""
    result = {}
    modes = sorted({str(r["mode"]) for r in rows})
    for name, mode, metric in product(names, modes, METRICS):
        errors = [float(str(r[f"{name}_{metric}_error"])) for r in rows if r["mode"] == mode]
        result[f"{name} {mode} {metric}"] = {
            "median": median(errors),
            "mean": mean(errors),
            "max": max(errors),
            "within": mean(error <= WANTED for error in errors),
        }
    return result


def run(study: StudyFile, configs: int, work: Path) -> list[dict[str, object]]:
    """Predict and measure; the tables are those of TUNER_TABLES."""
    bare = make_problem(study)
    nodes = measured_nodes(bare)
    problem = make_problem(study, {name: node.device for name, node in nodes.items()})
    models = {"collected": serving_model(problem, study)}
    os.environ[TABLES_VARIABLE], kept = str(work / "none"), os.environ[TABLES_VARIABLE]
    models["roofline"] = serving_model(problem, study)
    os.environ[TABLES_VARIABLE] = kept
    place = replace(find_place(None), directory=work)
    rows = []
    with connector(None, study)(problem, place) as cluster:
        runner = cluster.runner(study.name)
        try:
            for number, candidate in enumerate(candidates(study, problem, configs)):
                outcome = measure(runner, study, problem, candidate, work / f"trial-{number}")
                if not isinstance(outcome, Measurement):
                    print(f"{candidate.config.mode} {candidate.load}: {outcome}", file=sys.stderr)
                    continue
                found = {name: model.predict([candidate])[0] for name, model in models.items()}
                rows.append(row(candidate, outcome, found))
                print_row(rows[-1])
        finally:
            runner.close()
    return rows


def print_row(result: dict[str, object]) -> None:
    """One line on standard error."""
    parts = [f"{m[:-3]} {result[m]:.1f} (predicted {result[f'collected_{m}']:.1f})" for m in METRICS[::2]]
    print(f"{result['mode']} {result['load']} {result['options']}: {', '.join(parts)}", file=sys.stderr)


def main() -> None:
    """Collect, predict, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path, nargs="?", default=Path(__file__).parents[1] / "examples/quickstart.yaml")
    parser.add_argument("--configs", type=int, default=4)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tables", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    given = [f"measurement.requests={options.requests}", "name=collect-accuracy"]
    study = load_study_file(options.study, given)
    with tempfile.TemporaryDirectory() as folder, nullcontext(options.tables) as named:
        root = (named or Path(folder) / "tables").resolve()
        os.environ[TABLES_VARIABLE] = str(root)
        wanted = Wanted(study=study, root=root, quick=options.quick)
        start = time.monotonic()
        collect(wanted, None, lambda line: print(line, file=sys.stderr), lambda *_: None)
        took = time.monotonic() - start
        rows = run(study, options.configs, Path(folder))
    found = summary(rows, ["collected", "roofline"])
    if options.json:
        print(json.dumps({"collected_s": took, "summary": found, "rows": rows}))
        return
    print(f"{len(rows)} measurements; collecting took {took:.0f} s")
    for name, values in found.items():
        figures = ", ".join(f"{word} {values[word]:.1%}" for word in ("median", "mean", "max"))
        print(f"{name:38s} {figures}, {values['within']:.0%} within {WANTED:.0%}")


if __name__ == "__main__":
    main()
