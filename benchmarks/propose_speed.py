"""How long it takes to choose a batch: 8 out of 4,096 candidates after 500 measured trials, everything included.

Included are the fit of the surrogate of every metric (hyperparameters too), its beliefs about every candidate, the
expected improvements and the joint choice. One thread does it all, unless OMP_NUM_THREADS says otherwise: threads of
BLAS that wait for a busy core cost more than they help. On a machine that does other work, read the processor time.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from perf_model.surrogate import Features, correct_all, fit
from studies.acquisition import Beliefs, Question, choose_batch, front_scale


def make_features(count: int, rng: np.random.Generator) -> Features:
    """Candidates of 9 categories, 6 sizes and 2 loads."""
    return Features(
        configs=rng.integers(0, max(2, count // 2), count),
        studies=np.zeros(count, dtype=np.int64),
        categories=rng.integers(0, 4, (count, 9)),
        sizes=np.log(2.0 ** rng.integers(0, 5, (count, 6))),
        loads=np.log(2.0 ** rng.integers(0, 10, (count, 2))),
        doubt=np.ones(count),
    )


def propose(
    seen: Features, ratios: np.ndarray, measured: np.ndarray, new: Features, predicted: np.ndarray
) -> list[int]:
    """One proposal of a batch of 8 for three objectives that are three metrics."""
    surrogates = [fit(seen, ratios[:, k]) for k in range(ratios.shape[1])]
    corrections = correct_all(surrogates, new)
    beliefs = Beliefs(
        mean=predicted + np.column_stack([c.mean for c in corrections]),
        stddev=np.column_stack([c.stddev for c in corrections]),
        start=np.ones(len(new)),
        seconds=np.ones(len(new)),
    )

    def covariances(row: int, rows: np.ndarray) -> np.ndarray:
        return np.column_stack([correction.shared(row)[rows] for correction in corrections])

    question = Question(
        measured=np.exp(measured),
        scale=front_scale(np.concatenate([np.exp(measured), np.exp(beliefs.mean)])),
        objectives=lambda samples, _rows: np.exp(samples),
    )
    return [choice.row for choice in choose_batch(beliefs, question, 8, covariances=covariances)]


def main() -> int:
    """Time proposals."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--candidates", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    seen, new = make_features(options.trials, rng), make_features(options.candidates, rng)
    # Three objectives that oppose each other, so that the front is long.
    predicted = np.stack([rng.normal(size=options.candidates) for _ in range(3)], axis=1) * 0.5
    measured, ratios = rng.normal(size=(options.trials, 3)) * 0.5, rng.normal(size=(options.trials, 3)) * 0.2
    seconds, busy = [], []
    for _ in range(options.repeats):
        began, working = time.perf_counter(), time.process_time()
        rows = propose(seen, ratios, measured, new, predicted)
        seconds.append(time.perf_counter() - began)
        busy.append(time.process_time() - working)
    print(f"batch {rows}")
    print(f"median {np.median(seconds):.3f} s, worst {max(seconds):.3f} s ({options.repeats} proposals)")
    print(f"processor time {np.median(busy):.3f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
