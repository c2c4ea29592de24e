"""The actor that is the load generator of a deployment.

A plain class; `cluster.ray_deployment` makes an actor of it. Raw timings travel as the bytes of their file.
"""

from __future__ import annotations

import http.client
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from cluster.cache_reset import CacheReset, reset_caches
from cluster.hand_over import not_handed_over, tokens_handed_over
from cluster.load.driver import LoadRun
from cluster.load.measure import LoadMeasurement, LoadOutcome, measure
from cluster.load.rate_search import RateRun, search_rate
from cluster.node_facts import NodeFacts
from cluster.processes import ProcessId, node_folder
from cluster.ray_actors import node_facts
from search_spaces.problem import Slo

STATS_LIMIT_BYTES = 4_000_000
STATS_LIMIT_S = 5.0
STATS_RECORDS = 1000


@dataclass(frozen=True, kw_only=True)
class LoadReply:
    """What the load generator says; `router_stats` is the router's own JSON, None where there is no router.

    `timings` is the file of raw timings (Parquet), empty where there is none: paths in `outcome` are its node's.
    `kv_tokens` are the prompt tokens whose KV cache was handed over, None where no engine counts them.
    """

    outcome: LoadOutcome
    router_stats: str | None = None
    timings: bytes = b""
    kv_tokens: float | None = None


@dataclass(frozen=True, kw_only=True)
class LoadJob:
    """A load to put on, on `cores`, and what its figures are per: `devices` and their price.

    `resets` are carried out before each run. `first_rate` is the rate at which a search for the highest one begins.
    """

    run: LoadRun
    slos: tuple[Slo, ...]
    devices: int
    price_per_hour: float
    cores: tuple[int, ...] = ()
    router_url: str | None = None
    resets: tuple[CacheReset, ...] = ()
    first_rate: float | None = None


class LoadActor:
    """The load generator of a deployment, on cores of its own."""

    def __init__(self, coordinator: ProcessId) -> None:
        self._folder = node_folder(coordinator)

    def facts(self, folder: Path) -> NodeFacts:
        """The node of this actor, and whether it sees the coordinator's `folder`."""
        return node_facts(folder)

    def measure(self, job: LoadJob) -> LoadReply:
        """Put the load on, pinned to the cores of `job`, after the engines have forgotten earlier prompts."""
        pin_all_threads(job.cores)
        run, router_url = job.run, job.router_url
        began_ns = time.time_ns()
        unready = reset_caches(job.resets, run.api_key)
        if unready is not None:
            return LoadReply(outcome=unready)
        before = None if router_url is None else router_stats(router_url, since_ns=began_ns, api_key=run.api_key)
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="load-", dir=self._folder) as folder:
            path = Path(folder) / run.timings_path.name
            outcome = _measured(job, replace(run, timings_path=path))
            timings = path.read_bytes() if path.exists() else b""
        stats = None if router_url is None else router_stats(router_url, since_ns=began_ns, api_key=run.api_key)
        moved = tokens_handed_over(before, stats)
        if moved == 0 and isinstance(outcome, LoadMeasurement):
            outcome = not_handed_over()
        return LoadReply(outcome=outcome, router_stats=stats, timings=timings, kv_tokens=moved)


def _measured(job: LoadJob, run: LoadRun) -> LoadOutcome:
    """The measurement of `run`, or the search for the highest rate that its workload asks for."""
    search = run.workload.rate_search
    if search is None:
        return measure(run, slos=job.slos, devices=job.devices, price_per_hour=job.price_per_hour)
    return search_rate(
        RateRun(
            run=run,
            search=search,
            slos=job.slos,
            devices=job.devices,
            price_per_hour=job.price_per_hour,
            first=job.first_rate,
            prepare=lambda: reset_caches(job.resets, run.api_key),
        )
    )


def pin_all_threads(cores: Sequence[int]) -> None:
    """Keep every thread of this process to `cores` (Linux; elsewhere a no-op)."""
    if not cores or not hasattr(os, "sched_setaffinity"):
        return
    for thread in Path("/proc/self/task").iterdir():
        try:
            os.sched_setaffinity(int(thread.name), cores)
        except ProcessLookupError:  # the thread has ended meanwhile
            continue


def router_stats(url: str, since_ns: int, api_key: str | None = None) -> str | None:
    """JSON of the router's `/router/stats` since a Unix time, None where it has none or more than some megabytes."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=STATS_LIMIT_S)
    try:
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        connection.request("GET", f"/router/stats?since_ns={since_ns}&last={STATS_RECORDS}", headers=headers)
        response = connection.getresponse()
        body = response.read(STATS_LIMIT_BYTES + 1)
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    if response.status != http.client.OK or len(body) > STATS_LIMIT_BYTES:
        return None
    return body.decode(errors="replace")
