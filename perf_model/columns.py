"""Predictions for very many configurations: columns in, columns out.

Rows that share a parallel layout are computed together, in blocks that fit the caches, on a few threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from perf_model.layout import ReplicaLayout
from perf_model.numeric import BoolArray, FloatArray, IntArray, floats
from perf_model.serving import RankLoad, ServingEstimate, aggregated
from perf_model.silicon import GpuReplica, ReplicaKey, Silicon

BLOCK = 1 << 14  # rows computed at once: their arrays stay in the second-level cache


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Aggregated configurations of one model on one system, as arrays of one length.

    `users` requests are in flight on a replica (closed loop; zero where open) or `rate_per_s` arrive (open loop).
    `cached` of the `isl` prompt tokens come from the prefix cache. `max_sequences` run together on an attention rank,
    and a step computes at most `token_budget` tokens. `burst_share` of a run's requests were sent when all users
    started at once. `accepted` tokens come of a decode step (1 without speculative decoding), which then checks
    `drafted` more tokens for each sequence. Requests are admitted every `admission_steps` steps, 0 for the engine's
    own. The client adds `client_ms` to the time to first token.
    """

    tp: IntArray
    pp: IntArray
    dp: IntArray
    ep: IntArray
    users: FloatArray
    rate_per_s: FloatArray
    isl: FloatArray
    osl: FloatArray
    cached: FloatArray
    max_sequences: FloatArray
    token_budget: FloatArray
    burst_share: FloatArray
    stream_tokens: FloatArray
    accepted: FloatArray
    drafted: FloatArray
    admission_steps: FloatArray
    client_ms: FloatArray

    def __len__(self) -> int:
        return len(self.tp)

    def take(self, rows: IntArray) -> Columns:
        """The given rows."""
        return Columns(**{name: getattr(self, name)[rows] for name in self.__dataclass_fields__})


_DEFAULTS: Mapping[str, float] = {
    "pp": 1,
    "dp": 1,
    "ep": 1,
    "users": 0.0,
    "rate_per_s": 0.0,
    "cached": 0.0,
    "max_sequences": 1024.0,
    "token_budget": 8192.0,
    "burst_share": 0.0,
    "stream_tokens": 1.0,
    "accepted": 1.0,
    "drafted": 0.0,
    "admission_steps": 0.0,
    "client_ms": 0.0,
}


def columns(**given: ArrayLike) -> Columns:
    """Columns from arrays or numbers, broadcast to one length; raises `TypeError` for unknown or missing names."""
    names = list(Columns.__dataclass_fields__)
    arrays = np.broadcast_arrays(*(floats(given.get(name, _DEFAULTS.get(name, np.nan))) for name in names))
    unknown = set(given) - set(names)
    if unknown:
        raise TypeError(f"unknown columns {sorted(unknown)}; known are {names}")
    missing = [name for name in names if name not in given and name not in _DEFAULTS]
    if missing:
        raise TypeError(f"columns {missing} are missing")
    layout = {"tp", "pp", "dp", "ep"}
    return Columns(
        **{
            name: np.atleast_1d(array.astype(np.int64) if name in layout else array)
            for name, array in zip(names, arrays, strict=True)
        }
    )


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Predicted columns. Latencies are means unless named otherwise, in milliseconds; rates are those of a replica.

    `sequences` is the number that memory allows on an attention rank; rows where not even one fits are False in `fits`
    and hold NaN elsewhere.
    """

    fits: BoolArray
    sequences: FloatArray
    ttft_ms: FloatArray
    ttft_p90_ms: FloatArray
    ttft_p99_ms: FloatArray
    tpot_ms: FloatArray
    requests_per_s: FloatArray
    output_tokens_per_s_per_gpu: FloatArray
    prefill_share: FloatArray
    queue_ms: FloatArray


def predict_columns(silicon: Silicon, key: ReplicaKey, rows: Columns, *, threads: int = 2) -> Answers:
    """Predict all rows; `key` gives everything but the layout, which comes from the rows."""
    answers = {name: np.full(len(rows), np.nan) for name in Answers.__dataclass_fields__}
    answers["fits"] = np.zeros(len(rows), dtype=bool)
    jobs = [
        (silicon.replica(replace(key, layout=layout)), part)
        for layout, members in layouts(rows)
        for part in np.array_split(members, -(-len(members) // BLOCK))
    ]

    def work(job: tuple[GpuReplica, IntArray]) -> None:
        found = predict_replica(job[0], rows.take(job[1]))
        for name in Answers.__dataclass_fields__:
            answers[name][job[1]] = getattr(found, name)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, jobs))
    return Answers(**answers)


def layouts(rows: Columns) -> list[tuple[ReplicaLayout, IntArray]]:
    """The distinct layouts and the rows of each."""
    stacked = np.stack([rows.tp, rows.pp, rows.dp, rows.ep])
    code = ((stacked[0] * 4096 + stacked[1]) * 4096 + stacked[2]) * 4096 + stacked[3]
    _, first, inverse = np.unique(code, return_index=True, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    parts = np.split(order, np.cumsum(np.bincount(inverse))[:-1])
    made = [ReplicaLayout(**dict(zip(("tp", "pp", "dp", "ep"), map(int, stacked[:, i]), strict=True))) for i in first]
    return list(zip(made, parts, strict=True))


def predict_replica(replica: GpuReplica, rows: Columns) -> Answers:
    """Predict rows of one layout."""
    load = rank_load(replica, rows)
    estimate = aggregated(replica.steps, load)
    layout = replica.key.layout
    fits = replica.most_sequences(rows.isl, rows.osl, rows.token_budget) >= 1.0
    requests = estimate.requests_per_s * layout.dp * layout.pp
    named = {
        "sequences": load.slots,
        "ttft_ms": estimate.ttft.mean(),
        "ttft_p90_ms": estimate.ttft.quantile(0.9),
        "ttft_p99_ms": estimate.ttft.quantile(0.99),
        "tpot_ms": estimate.tpot.mean(),
        "requests_per_s": requests,
        "output_tokens_per_s_per_gpu": requests * rows.osl / layout.ranks,
        "prefill_share": estimate.prefill_share,
        "queue_ms": estimate.queue_ms,
    }
    return Answers(fits=fits, **{name: np.where(fits, array, np.nan) for name, array in named.items()})


def rank_load(replica: GpuReplica, rows: Columns) -> RankLoad:
    """What one attention rank is asked to do.

    Users spread evenly over attention ranks and over the micro-batches that keep pipeline stages busy.
    """
    layout, traits = replica.key.layout, replica.traits
    share = float(layout.dp * layout.pp)
    most = replica.most_sequences(rows.isl, rows.osl, rows.token_budget)
    return RankLoad(
        users=np.where(rows.users > 0, np.maximum(rows.users / share, 1.0), 0.0),
        rate_per_s=rows.rate_per_s / share,
        slots=np.maximum(np.minimum(most, rows.max_sequences), 1.0),
        token_budget=rows.token_budget,
        isl=rows.isl,
        osl=rows.osl,
        cached=rows.cached,
        request_ms=replica.request_ms + rows.client_ms,
        run_requests=10.0 * np.maximum(rows.users, 10.0),
        burst_share=rows.burst_share,
        admission_steps=np.where(
            rows.admission_steps > 0, rows.admission_steps, traits.admission(rows.users, layout.dp)
        ),
        stream_tokens=rows.stream_tokens,
        accepted=rows.accepted,
        drafted=rows.drafted,
        ranks=1.0 if traits.balances_ranks else float(layout.dp),
    )


def estimate_replica(replica: GpuReplica, rows: Columns) -> ServingEstimate:
    """The full estimate of rows of one layout, for one attention rank."""
    return aggregated(replica.steps, rank_load(replica, rows))
