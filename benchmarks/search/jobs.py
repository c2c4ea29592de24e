"""Searches on tables as jobs whose results are kept: a file for each table, searcher, seed and state of the code."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import optuna

from benchmarks.search.figures import Run, Yardstick, replay
from benchmarks.search.hindsight import hindsight_order
from benchmarks.search.modelled import CorrectedSearch, Forecast, Modelled, model_order
from benchmarks.search.samplers import random_order, sampler_order
from perf_model.surrogate import HyperPrior

OURS, MODEL, RANDOM, NSGA2, TPE, GP = "ours", "model alone", "random", "nsga2", "tpe", "gp"
HINDSIGHT = "told all others"
AT_ONCE = {OURS: 1, "ours, 4 at once": 4, "ours, 8 at once": 8}
"""How many candidates ours chooses jointly."""
DETERMINISTIC = (MODEL, HINDSIGHT)
WITH_MODEL = (*AT_ONCE, MODEL, HINDSIGHT)

_ROOT = Path(__file__).resolve().parent.parent.parent
_CODE = ("benchmarks/search/figures.py", "benchmarks/search/samplers.py", "benchmarks/search/tables.py")
_OUR_CODE = (
    "benchmarks/search/modelled.py",
    "benchmarks/search/hindsight.py",
    "studies/acquisition.py",
    "perf_model/surrogate.py",
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One search on one table with one seed; it ends after `limit` measurements where one is given."""

    modelled: Modelled
    priors: tuple[HyperPrior, ...]
    searcher: str
    seed: int
    logarithmic: bool = False
    limit: int | None = None

    @property
    def fingerprint(self) -> str:
        """What the result depends on: the table, the code, and for searches with a model its predictions.

        Not the limit: a result under a larger one tells that under a smaller one (see `limited`).
        """
        has_model = self.searcher in WITH_MODEL
        digest = hashlib.sha256()
        for name in (*_CODE, *(_OUR_CODE if has_model else ())):
            digest.update((_ROOT / name).read_bytes())
        table = self.modelled.table
        digest.update(np.ascontiguousarray(table.log_answers).tobytes())
        digest.update(table.rows.to_csv(index=False).encode())
        settings = [self.searcher, self.seed, self.logarithmic, None, optuna.__version__]
        if has_model:
            digest.update(np.ascontiguousarray(self.modelled.log_mean).tobytes())
            settings += [[asdict(prior.centre), prior.spread] for prior in self.priors]
        digest.update(json.dumps(settings).encode())
        return digest.hexdigest()[:20]

    def kept_in(self, cache: Path) -> Path:
        """Where the result lies."""
        words = f"{self.modelled.table.name} {self.searcher} {self.seed}".replace("/", "-").replace(" ", "_")
        return cache / f"{words}_{self.fingerprint}.json"


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
    if job.searcher in AT_ONCE:
        at_once = AT_ONCE[job.searcher]
        search = CorrectedSearch(modelled=job.modelled, priors=job.priors, seed=job.seed, at_once=at_once)
        order, forecasts = search.order(), search.forecasts
    elif job.searcher == MODEL:
        order = model_order(job.modelled)
    elif job.searcher == HINDSIGHT:
        order = hindsight_order(job.modelled, job.priors, job.seed)
    elif job.searcher == RANDOM:
        order = random_order(table, job.seed)
    else:
        order = sampler_order(table, job.searcher, job.seed)
    run = replay(yardstick, order, forecasts, limit=job.limit)
    return Result(table=table.name, searcher=job.searcher, seed=job.seed, run=run, seconds=time.perf_counter() - began)


def perform_kept(job: Job, cache: Path | None) -> Result:
    """The result that `cache` holds, else that of `perform`, which is put there."""
    if cache is None:
        return perform(job)
    kept = kept_result(job, cache)
    if kept is not None:
        return kept
    result = perform(job)
    cache.mkdir(parents=True, exist_ok=True)
    path = job.kept_in(cache)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(_encoded(result)), encoding="utf-8")
    partial.replace(path)
    return result


def kept_result(job: Job, cache: Path | None) -> Result | None:
    """The result that `cache` holds; None where it has none, or one that ended too early for the job's limit."""
    if cache is None or not job.kept_in(cache).exists():
        return None
    result = read_result(job.kept_in(cache))
    ended_early = not all(result.run.reached)
    if ended_early and (job.limit is None or max(result.run.needed) < job.limit):
        return None
    return result if job.limit is None else limited(result, job.limit)


def limited(result: Result, limit: int) -> Result:
    """`result` as if its run had ended after `limit` measurements."""
    run = result.run
    reached = tuple(done and needed <= limit for done, needed in zip(run.reached, run.needed, strict=True))
    return replace(result, run=replace(run, needed=tuple(min(needed, limit) for needed in run.needed), reached=reached))


def _encoded(result: Result) -> dict[str, object]:
    forecasts = [{"error": f.error.tolist(), "covered": f.covered.tolist()} for f in result.run.forecasts]
    run = {"needed": result.run.needed, "early_regret": result.run.early_regret, "reached": result.run.reached}
    return {
        "table": result.table,
        "searcher": result.searcher,
        "seed": result.seed,
        "seconds": result.seconds,
        "run": run | {"forecasts": forecasts},
    }


def read_result(path: Path) -> Result:
    """A result that was kept."""
    kept = json.loads(path.read_text(encoding="utf-8"))
    run = kept.pop("run")
    forecasts = tuple(
        Forecast(error=np.array(f["error"]), covered=np.array(f["covered"], bool)) for f in run["forecasts"]
    )
    reached = tuple(run["reached"])
    found = Run(needed=tuple(run["needed"]), reached=reached, early_regret=run["early_regret"], forecasts=forecasts)
    return Result(run=found, **kept)


def complete_seeds(results: Sequence[Result], tables: Sequence[str]) -> tuple[list[Result], list[str]]:
    """Those of `results` whose searcher has run with that seed on every one of `tables`, so that all count alike.

    A searcher that has no such seed keeps what it has; these are named beside.
    """
    done = {(r.searcher, r.seed, r.table) for r in results}
    whole = {(r.searcher, r.seed) for r in results if all((r.searcher, r.seed, table) in done for table in tables)}
    finished = {searcher for searcher, _ in whole}
    kept = [r for r in results if (r.searcher, r.seed) in whole or r.searcher not in finished]
    return kept, sorted({r.searcher for r in results} - finished)
