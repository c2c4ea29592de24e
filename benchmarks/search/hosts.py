"""Constants of engines' hosts for the search benchmark: neutral ones, and ones fitted without an architecture's runs.

What an engine adds to its kernels is alike for every model that it serves, so that runs of other models tell it. The
shipped constants (`perf_model/hosts.py`) have seen the runs of the benchmark's tables; these have not: for a table they
are fitted to the aggregated runs of all *other architectures* (copies of one checkpoint count as one), by least squares
over log(measured / predicted) of TTFT and TPOT with a smooth bound on outliers, and are drawn to the neutral ones.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares

from perf_model.hosts import HOSTS, HostTraits
from perf_model.prior import model_word
from perf_model.runs import Run
from perf_model.silicon import Silicon, default_silicon
from perf_model.validate import predict_runs
from search_spaces.serving import Mode

CONSTANTS = {
    "decode_factor": (0.15, 0.5),
    "prefill_factor": (0.25, 0.5),
    "step_ms": (1.0, 0.0),
    "layer_ms": (0.03, 0.0),
    "prefill_layer_ms": (0.15, 0.0),
    "sequence_ms": (0.015, 0.0),
    "request_ms": (60.0, 0.0),
    "latent_layer_ms": (1.0, 0.0),
    "admission_steps": (2.0, 1.0),
    "busy_admission_steps": (4.0, 1.0),
    "parallel_admission_steps": (40.0, 0.0),
}
"""How far from neutral each constant is expected (one standard deviation), and its least value."""

SCALES = (0.3, 0.12)
"""Deviations of log TTFT and log TPOT up to which squares count; beyond them lines."""

MODEL_COUNTS = 3.0
"""The runs of one model err alike: together they count as this many independent ones."""

EVALUATIONS, STEP, LARGEST = 8, 0.05, 8.0
"""Points at which a fit is linearised; the step of its differences and the bound, in the deviations of CONSTANTS."""

LEAST_RUNS = 30


def neutral_hosts() -> dict[str, HostTraits]:
    """Host constants that no run was looked at for: kernels take their time, and a step costs 1 ms more.

    What is no fitted constant (how an engine reserves cache, whether ranks wait for each other) stays.
    """
    constants = dict.fromkeys(("layer_ms", "prefill_layer_ms", "sequence_ms", "request_ms", "latent_layer_ms"), 0.0)
    constants |= dict.fromkeys(("decode_factor", "prefill_factor", "step_ms"), 1.0)
    constants |= {"admission_steps": 1.0, "busy_admission_steps": 1.0, "parallel_admission_steps": 0.0}
    return {engine: replace(traits, **constants) for engine, traits in HOSTS.items()}


@dataclass(frozen=True)
class _Task:
    """Constants of one engine, to be fitted to `runs`."""

    engine: str
    runs: tuple[Run, ...]
    tables: Path | None
    cache: Path | None


def refitted_hosts(
    runs: Sequence[Run], architectures: Sequence[str], *, tables: Path | None, cache: Path | None, jobs: int = 1
) -> dict[str, dict[str, HostTraits]]:
    """For each of `architectures` (`perf_model.prior.model_word`): constants fitted without its runs, by engine.

    An engine with fewer than LEAST_RUNS runs of other architectures keeps its neutral constants. `tables` as of
    `default_silicon`; fits are kept in `cache`.
    """
    neutral = neutral_hosts()
    tasks = {
        (engine, architecture): _Task(engine, _others(runs, engine, architecture), tables, cache)
        for engine in neutral
        for architecture in architectures
    }
    distinct = list(dict.fromkeys(task for task in tasks.values() if len(task.runs) >= LEAST_RUNS))
    with ProcessPoolExecutor(jobs) as pool:
        fitted = dict(zip(distinct, pool.map(_fitted, distinct), strict=True))
    return {
        architecture: {e: fitted.get(tasks[e, architecture], neutral[e]) for e in neutral}
        for architecture in architectures
    }


def _others(runs: Sequence[Run], engine: str, architecture: str) -> tuple[Run, ...]:
    """Aggregated runs of `engine` whose model has another architecture."""
    return tuple(
        run
        for run in runs
        if run.engine == engine and run.mode is Mode.AGGREGATED and model_word(run.model) != architecture
    )


def _fitted(task: _Task) -> HostTraits:
    """The constants of `task`, from its cache where that has them."""
    fit = _Fit(task)
    if task.cache is None:
        return fit.best()
    path = task.cache / f"hosts_{task.engine}_{fit.fingerprint}.json"
    if path.exists():
        return replace(fit.neutral, **json.loads(path.read_text(encoding="utf-8")))
    best = fit.best()
    task.cache.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({name: getattr(best, name) for name in CONSTANTS}), encoding="utf-8")
    partial.replace(path)
    return best


class _Fit:
    """Least squares over one task; a point holds the distances from neutral in the deviations of CONSTANTS."""

    def __init__(self, task: _Task) -> None:
        self._engine = task.engine
        self._silicon: Silicon = default_silicon(task.tables)
        self._hosts = neutral_hosts()
        self.neutral = self._hosts[task.engine]
        self._centre = np.array([getattr(self.neutral, name) for name in CONSTANTS])
        self._spread, self._least = np.array(list(CONSTANTS.values())).T
        predicted, _ = predict_runs(task.runs, self._silicon.with_hosts(self._hosts))
        self._runs = [one.run for one in predicted]
        self._measured = np.log([(run.ttft_ms, run.tpot_ms) for run in self._runs])
        counts = Counter(run.model_name for run in self._runs)
        self._weights = np.array([(MODEL_COUNTS / counts[run.model_name]) ** 0.5 for run in self._runs])

    @property
    def fingerprint(self) -> str:
        """What the fit depends on: measurements, predictions under neutral constants, and this file."""
        digest = hashlib.sha256(Path(__file__).read_bytes())
        digest.update(np.round(np.stack([self._measured, self._predicted(self.neutral)]), 6).tobytes())
        return digest.hexdigest()[:20]

    def best(self) -> HostTraits:
        """The constants of least squares."""
        found = least_squares(
            self._residuals,
            np.zeros(len(CONSTANTS)),
            jac=self._slopes,
            bounds=((self._least - self._centre) / self._spread - 1e-6, np.full(len(CONSTANTS), LARGEST)),
            max_nfev=EVALUATIONS,
        )
        return self._traits(found.x)

    def _traits(self, point: np.ndarray) -> HostTraits:
        values = np.maximum(self._centre + point * self._spread, self._least)
        return replace(self.neutral, **dict(zip(CONSTANTS, values.tolist(), strict=True)))

    def _predicted(self, traits: HostTraits) -> np.ndarray:
        """Logarithms of predicted TTFT and TPOT in ms, (runs, 2)."""
        predicted, _ = predict_runs(self._runs, self._silicon.with_hosts({**self._hosts, self._engine: traits}))
        return np.log([(one.ttft_ms, one.tpot_ms) for one in predicted])

    def _residuals(self, point: np.ndarray) -> np.ndarray:
        """Weighted deviations, whose squares grow like lines far out (pseudo-Huber), and the distances from neutral."""
        deviations = (self._measured - self._predicted(self._traits(point))) / SCALES
        bounded = np.sign(deviations) * np.sqrt(2.0 * (np.sqrt(1.0 + deviations**2) - 1.0))
        return np.concatenate([(bounded * self._weights[:, None]).ravel(), point])

    def _slopes(self, point: np.ndarray) -> np.ndarray:
        """Forward differences of the residuals, (residuals, constants)."""
        here = self._residuals(point)
        steps = STEP * np.eye(len(point))
        return np.column_stack([(self._residuals(point + step) - here) / STEP for step in steps])
