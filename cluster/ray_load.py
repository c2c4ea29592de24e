"""The actor that is the load generator of a deployment.

A plain class; `cluster.ray_deployment` makes an actor of it. It returns small values: raw timings are a file.
"""

from __future__ import annotations

import http.client
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from cluster.load.driver import LoadRun
from cluster.load.measure import LoadOutcome, measure
from cluster.node_facts import NodeFacts
from cluster.ray_actors import node_facts
from search_spaces.problem import Slo

STATS_LIMIT_BYTES = 4_000_000
STATS_LIMIT_S = 5.0
STATS_RECORDS = 1000


@dataclass(frozen=True, kw_only=True)
class LoadReply:
    """What the load generator says; `router_stats` is the router's own JSON, None where there is no router."""

    outcome: LoadOutcome
    router_stats: str | None = None


class LoadActor:
    """The load generator of a deployment, on cores of its own."""

    def facts(self) -> NodeFacts:
        """The node of this actor."""
        return node_facts()

    def measure(
        self,
        run: LoadRun,
        *,
        slos: Sequence[Slo],
        devices: int,
        price_per_hour: float,
        cores: Sequence[int],
        router_url: str | None,
    ) -> LoadReply:
        """Put the load on, pinned to `cores`."""
        pin_all_threads(cores)
        began_ns = time.time_ns()
        outcome = measure(run, slos=slos, devices=devices, price_per_hour=price_per_hour)
        stats = None if router_url is None else router_stats(router_url, since_ns=began_ns)
        return LoadReply(outcome=outcome, router_stats=stats)


def pin_all_threads(cores: Sequence[int]) -> None:
    """Keep every thread of this process to `cores` (Linux; elsewhere a no-op)."""
    if not cores or not hasattr(os, "sched_setaffinity"):
        return
    for thread in Path("/proc/self/task").iterdir():
        try:
            os.sched_setaffinity(int(thread.name), cores)
        except ProcessLookupError:  # the thread has ended meanwhile
            continue


def router_stats(url: str, since_ns: int) -> str | None:
    """JSON of the router's `/router/stats` since a Unix time, None where it has none or more than some megabytes."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=STATS_LIMIT_S)
    try:
        connection.request("GET", f"/router/stats?since_ns={since_ns}&last={STATS_RECORDS}")
        response = connection.getresponse()
        body = response.read(STATS_LIMIT_BYTES + 1)
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    if response.status != http.client.OK or len(body) > STATS_LIMIT_BYTES:
        return None
    return body.decode(errors="replace")
