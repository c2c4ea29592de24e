"""Fits the constants of `perf_model.hosts` to measured runs, and prints them with their errors.

    python benchmarks/fit_hosts.py MEASUREMENTS.csv [--engine vllm] [--rounds 300] [--seed 0]

A random walk from the present constants: a few of them move at a time, and a move is kept when the score falls (medians
and means of the absolute relative errors of TTFT and TPOT over the aggregated runs, means with errors cut at 1).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from perf_model.hosts import HOSTS, HostTraits
from perf_model.runs import Run, read_runs
from perf_model.silicon import Silicon, default_silicon
from perf_model.validate import predict_runs
from search_spaces.serving import Mode

# Sizes of a move, and the least value.
MOVES = {
    "decode_factor": (0.08, 0.6),
    "prefill_factor": (0.15, 0.6),
    "step_ms": (0.8, 0.0),
    "layer_ms": (0.02, 0.0),
    "prefill_layer_ms": (0.3, 0.0),
    "sequence_ms": (0.01, 0.0),
    "request_ms": (20.0, 0.0),
    "admission_steps": (3.0, 1.0),
    "busy_admission_steps": (5.0, 1.0),
    "parallel_admission_steps": (30.0, 0.0),
}


def errors(silicon: Silicon, runs: Sequence[Run], engine: str, traits: HostTraits) -> np.ndarray:
    """Absolute relative errors of TTFT and TPOT, one row for each predicted run."""
    predicted, _ = predict_runs(runs, silicon.with_hosts({**HOSTS, engine: traits}))
    return np.array([(abs(p.ttft_ms / p.run.ttft_ms - 1), abs(p.tpot_ms / p.run.tpot_ms - 1)) for p in predicted])


def score(found: np.ndarray) -> float:
    """What the walk lowers."""
    ttft, tpot = found.T
    means = np.minimum(found, 1.0).mean(axis=0)
    return float(np.median(ttft) + 1.5 * np.median(tpot) + 0.5 * means[0] + 0.75 * means[1])


def walk(silicon: Silicon, runs: Sequence[Run], engine: str, rounds: int, seed: int) -> HostTraits:
    """The best constants found."""
    random = np.random.default_rng(seed)
    best = HOSTS[engine]
    lowest = score(errors(silicon, runs, engine, best))
    for _ in range(rounds):
        names = random.choice(list(MOVES), size=int(random.integers(1, 4)), replace=False)
        moved = {
            str(name): max(getattr(best, name) + MOVES[name][0] * random.normal(), MOVES[name][1]) for name in names
        }
        tried = replace(best, **moved)
        found = score(errors(silicon, runs, engine, tried))
        if found < lowest:
            best, lowest = tried, found
            print(f"{engine} {lowest:.4f} {moved}", flush=True)
    return best


def main() -> None:
    """Fit each engine and print its constants."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("measurements", type=Path)
    parser.add_argument("--engine", choices=list(HOSTS))
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    silicon = default_silicon()
    rows = [run for run in read_runs(options.measurements) if isinstance(run, Run) and run.mode is Mode.AGGREGATED]
    for engine in [options.engine] if options.engine else list(HOSTS):
        runs = [run for run in rows if run.engine == engine]
        traits = walk(silicon, runs, engine, options.rounds, options.seed)
        found = errors(silicon, runs, engine, traits)
        medians, means = np.median(found, axis=0), found.mean(axis=0)
        print(engine, traits)
        print(f"  {len(found)} runs: TTFT {medians[0]:.3f} / {means[0]:.3f}, TPOT {medians[1]:.3f} / {means[1]:.3f}")


if __name__ == "__main__":
    main()
