"""Why a prediction is what it is: parts of a step, origins of their times, memory, and the bottleneck in a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from perf_model.batch import StepBatch, step_batch
from perf_model.columns import Columns, estimate_replica, rank_load
from perf_model.curves import Origin
from perf_model.memory import MemoryNeed
from perf_model.serving import RankLoad, ServingEstimate
from perf_model.silicon import GpuReplica
from search_spaces.errors import require


class Bottleneck(StrEnum):
    """What more of would help most."""

    COMPUTE = "compute"
    MEMORY_BANDWIDTH = "memory bandwidth"
    INTERCONNECT = "interconnect"
    KV_CAPACITY = "KV capacity"
    QUEUEING = "queueing"
    HOST = "the host"


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """One configuration, explained. Times are milliseconds; `decode_ms` and `prefill_ms` are steps by operation.

    `origins` are shares of the decode step's kernel time by where they come from.
    """

    ttft_ms: float
    ttft_p99_ms: float
    tpot_ms: float
    requests_per_s: float
    decode_seqs: float
    decode_ms: Mapping[str, float]
    prefill_ms: Mapping[str, float]
    origins: Mapping[Origin, float]
    memory: MemoryNeed
    bottleneck: Bottleneck
    sentence: str


def explain(replica: GpuReplica, row: Columns) -> Explanation:
    """Explain the one configuration of `row`, which must be of the replica's layout."""
    require(len(row) == 1, f"{len(row)} rows were given; explain one at a time")
    load, estimate = rank_load(replica, row), estimate_replica(replica, row)
    decode = step_batch(decode_seqs=np.maximum(estimate.decode_seqs, 1.0), decode_context=load.mean_context)
    tokens = np.minimum(load.new_tokens, load.token_budget)
    prompt = step_batch(prefill_tokens=tokens, prefill_seqs=1.0, prompt=load.isl, cached=load.cached)
    parts = _first(replica, decode)
    bottleneck, sentence = _bottleneck(replica, load, estimate, parts)
    layout = replica.key.layout
    return Explanation(
        ttft_ms=float(estimate.ttft.mean()[0]),
        ttft_p99_ms=float(estimate.ttft.quantile(0.99)[0]),
        tpot_ms=float(estimate.tpot.mean()[0]),
        requests_per_s=float(estimate.requests_per_s[0]) * layout.dp * layout.pp,
        decode_seqs=float(estimate.decode_seqs[0]),
        decode_ms=parts,
        prefill_ms=_first(replica, prompt),
        origins=replica.steps.origins(decode),
        memory=replica.footprint.need(estimate.decode_seqs, load.isl + load.osl / 2.0, load.token_budget),
        bottleneck=bottleneck,
        sentence=sentence,
    )


def _first(replica: GpuReplica, batch: StepBatch) -> dict[str, float]:
    """Milliseconds by operation, the longest first."""
    parts = {name: float(values[0]) for name, values in replica.steps.breakdown_ms(batch).items()}
    return dict(sorted(((n, v) for n, v in parts.items() if abs(v) > 0), key=lambda item: -item[1]))


def _bottleneck(
    replica: GpuReplica, load: RankLoad, estimate: ServingEstimate, parts: Mapping[str, float]
) -> tuple[Bottleneck, str]:
    waiting, ttft = float(estimate.queue_ms[0]), float(estimate.ttft.mean()[0])
    if waiting > 0.5 * ttft:
        return _waiting(load, waiting, ttft)
    prefill_share = float(estimate.prefill_share[0])
    if prefill_share > 0.5:
        return Bottleneck.COMPUTE, f"Compute limits it: {prefill_share:.0%} of the engine's time goes to prefill."
    step = sum(parts.values())
    groups = grouped(parts)
    name = max(groups, key=lambda group: groups[group])
    share = groups[name] / step
    longest = max(parts, key=lambda part: parts[part])
    detail = f"{longest} takes {parts[longest]:.2f} of the {step:.2f} ms of a decode step"
    if name == "interconnect":
        return Bottleneck.INTERCONNECT, f"Interconnect limits it: {share:.0%} of a decode step is exchange; {detail}."
    if name == "host":
        return Bottleneck.HOST, f"The host limits it: {share:.0%} of a decode step is neither kernel nor exchange."
    if name == "weights" and _arithmetic(replica, load, estimate):
        return Bottleneck.COMPUTE, f"Compute limits it: {share:.0%} of a decode step multiplies matrices; {detail}."
    what = "reads weights" if name == "weights" else "reads the KV cache"
    return Bottleneck.MEMORY_BANDWIDTH, f"Memory bandwidth limits it: {share:.0%} of a decode step {what}; {detail}."


def _waiting(load: RankLoad, waiting: float, ttft: float) -> tuple[Bottleneck, str]:
    users, slots = float(load.users[0]), float(load.slots[0])
    if users > slots:
        sentence = (
            f"KV capacity limits it: a rank holds {slots:.0f} sequences of {users:.0f} in flight, and "
            f"{waiting / ttft:.0%} of the TTFT is waiting for a place."
        )
        return Bottleneck.KV_CAPACITY, sentence
    return Bottleneck.QUEUEING, f"Queueing limits it: {waiting / ttft:.0%} of the TTFT is waiting for others' prefill."


def grouped(parts: Mapping[str, float]) -> dict[str, float]:
    """Milliseconds of a step by what they hang on: interconnect, KV cache, weights, host."""
    exchange = ("all-", "reduce-", "hop", "alltoall")
    groups = dict.fromkeys(("interconnect", "KV cache", "weights", "host"), 0.0)
    for name, value in parts.items():
        if any(word in name for word in exchange):
            groups["interconnect"] += value
        elif "attention" in name and "linear" not in name:
            groups["KV cache"] += value
        elif name in {"host", "overhead"}:
            groups["host"] += max(value, 0.0)
        else:
            groups["weights"] += value
    return groups


def _arithmetic(replica: GpuReplica, load: RankLoad, estimate: ServingEstimate) -> bool:
    """True where a decode step's matrix products have more arithmetic than traffic."""
    system = replica.footprint.system
    rows = float(estimate.decode_seqs[0]) * (1.0 + float(np.asarray(load.drafted).flat[0]))
    active = replica.key.model.active_parameters / replica.key.model.parameters
    return rows * active > system.peak("bf16") / system.memory_bandwidth
