"""One candidate's prediction, accounted for: steps by operation, origins of times, memory, the bottleneck.

Holds for every engine that `ServingPredictor` knows and for both modes; `explain.py` does it for a replica alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from perf_model.batch import StepBatch, step_batch
from perf_model.columns import rank_load
from perf_model.curves import Origin
from perf_model.embedded_groups import EmbeddedGroups
from perf_model.explain import Bottleneck, grouped
from perf_model.gpu_groups import GpuGroups
from perf_model.groups import GroupAnswer, option
from perf_model.memory import MemoryNeed
from perf_model.phases import StepTimes
from perf_model.serving_predictor import ServingPredictor
from search_spaces.problem import Problem
from search_spaces.serving import Candidate, Mode, Pool, Role


@dataclass(frozen=True, kw_only=True)
class RoleAccount:
    """The replicas of one role. Step times are milliseconds by operation, bytes those of one rank.

    `prefill_ms` is a step that computes one prompt (as much of it as a step holds), `decode_ms` one in which
    `decode_seqs` sequences decode; each is empty where the role has no such step. `kv_bytes` are those of the running
    sequences; `most_sequences` of full length fit beside the weights. `origins` are shares of the steps' kernel time.
    """

    role: Role
    prefill_ms: Mapping[str, float]
    decode_ms: Mapping[str, float]
    decode_seqs: float
    origins: Mapping[Origin, float]
    weight_bytes: float
    kv_bytes: float
    activation_bytes: float
    reserve_bytes: float
    capacity_bytes: float
    most_sequences: float


@dataclass(frozen=True, kw_only=True)
class Account:
    """A candidate's roles, and what limits it, as a word and in a sentence."""

    roles: tuple[RoleAccount, ...]
    bottleneck: Bottleneck
    sentence: str


@dataclass(frozen=True, kw_only=True)
class _Replica:
    """What both kinds of engine say of the replicas of one pool."""

    steps: StepTimes
    users: float
    slots: float
    most_sequences: float
    need: MemoryNeed
    budget: float
    cached: float
    sources: _Origins


class _Origins(Protocol):
    def origins(self, batch: StepBatch) -> dict[Origin, float]:
        """Share of the time of a single step by where it comes from."""
        ...


def account(predictor: ServingPredictor, problem: Problem, candidate: Candidate) -> Account:
    """Account for a feasible `candidate` of `problem`; raises as `ServingPredictor.predict`."""
    groups, candidate = predictor.of(candidate), predictor.seen(candidate)
    answer = groups.answer([candidate])
    decode_seqs = max(float(answer.estimate.decode_seqs[0]), 1.0)
    replicas = [_replica(groups, candidate, pool, decode_seqs) for pool in candidate.config.pools]
    roles = tuple(
        _role_account(problem, pool.role, replica, decode_seqs)
        for pool, replica in zip(candidate.config.pools, replicas, strict=True)
    )
    bottleneck, sentence = _bottleneck(candidate, answer, replicas, roles)
    return Account(roles=roles, bottleneck=bottleneck, sentence=sentence)


def _replica(groups: EmbeddedGroups | GpuGroups, candidate: Candidate, pool: Pool, decode_seqs: float) -> _Replica:
    if isinstance(groups, GpuGroups):
        return _on_gpus(groups, candidate, pool, decode_seqs)
    engine = candidate.config.engine
    need = groups.memory([candidate], pool.role)
    slots = float(option(engine, pool, "max_num_seqs"))
    one = need.kv_bytes / max(float(option(engine, each, "max_num_seqs")) for each in candidate.config.pools)
    room = need.capacity_bytes - need.weight_bytes - need.activation_bytes - need.reserve_bytes
    load = groups.rank_load([candidate], [pool], np.array([float(pool.replicas)]))
    steps = groups.steps(engine, pool)
    return _Replica(
        steps=steps,
        users=float(load.users[0]),
        slots=slots,
        most_sequences=float(np.floor(np.maximum(room / one, 0.0))[0]),
        need=need,
        budget=float(load.token_budget[0]),
        cached=float(load.cached[0]),
        sources=steps,
    )


def _on_gpus(groups: GpuGroups, candidate: Candidate, pool: Pool, decode_seqs: float) -> _Replica:
    replica, rows = groups.replica(candidate.config.engine, pool), groups.rows([candidate], [pool])
    if pool.role is Role.PREFILL:
        rows = replace(rows, osl=np.zeros_like(rows.osl))
    load = rank_load(replica, rows)
    running = np.array([decode_seqs if pool.role is not Role.PREFILL else 1.0])
    return _Replica(
        steps=replica.steps,
        users=float(load.users[0]),
        slots=float(load.slots[0]),
        most_sequences=float(np.floor(replica.most_sequences(rows.isl, rows.osl, rows.token_budget))[0]),
        need=replica.footprint.need(running, rows.isl + rows.osl / 2.0, rows.token_budget),
        budget=float(rows.token_budget[0]),
        cached=float(rows.cached[0]),
        sources=replica.steps,
    )


def _role_account(problem: Problem, role: Role, replica: _Replica, decode_seqs: float) -> RoleAccount:
    isl, osl = float(problem.workload.isl.mean), float(problem.workload.osl.mean)
    new = max(isl - replica.cached, 1.0)
    prompt = step_batch(
        prefill_tokens=[min(new, replica.budget)], prefill_seqs=[1.0], prompt=[isl], cached=[replica.cached]
    )
    decode = step_batch(decode_seqs=[decode_seqs], decode_context=[isl + osl / 2.0])
    prefills, decodes = role is not Role.DECODE, role is not Role.PREFILL
    need = replica.need
    return RoleAccount(
        role=role,
        prefill_ms=_parts(replica.steps, prompt) if prefills else {},
        decode_ms=_parts(replica.steps, decode) if decodes else {},
        decode_seqs=decode_seqs if decodes else 0.0,
        origins=_origins(replica, prompt if prefills else None, decode if decodes else None, osl / decode_seqs),
        weight_bytes=float(need.weight_bytes[0]),
        kv_bytes=float(need.kv_bytes[0]),
        activation_bytes=float(need.activation_bytes[0]),
        reserve_bytes=float(need.reserve_bytes[0]),
        capacity_bytes=float(need.capacity_bytes[0]),
        most_sequences=replica.most_sequences,
    )


def _parts(steps: StepTimes, batch: StepBatch) -> dict[str, float]:
    """Milliseconds by operation, the longest first."""
    parts = {name: float(np.ravel(values)[0]) for name, values in steps.breakdown_ms(batch).items()}
    return dict(sorted(((name, ms) for name, ms in parts.items() if ms != 0.0), key=lambda item: -item[1]))


def _origins(
    replica: _Replica, prompt: StepBatch | None, decode: StepBatch | None, decodes: float
) -> dict[Origin, float]:
    """Shares over a request: one prompt, and `decodes` decode steps (its own share of them)."""
    total, weight = dict.fromkeys(Origin, 0.0), 0.0
    for batch, count in ((prompt, 1.0), (decode, decodes)):
        if batch is not None:
            time = count * float(np.ravel(replica.steps.step_ms(batch))[0])
            for origin, share in replica.sources.origins(batch).items():
                total[origin] += time * share
            weight += time
    return {origin: time / weight for origin, time in total.items()}


def _bottleneck(
    candidate: Candidate, answer: GroupAnswer, replicas: list[_Replica], roles: tuple[RoleAccount, ...]
) -> tuple[Bottleneck, str]:
    estimate = answer.estimate
    waiting, ttft = float(estimate.queue_ms[0]), float(estimate.ttft.mean()[0])
    last = replicas[-1]
    if waiting > 0.5 * ttft:
        return _waiting(candidate, last, waiting / ttft)
    prefill_share = float(estimate.prefill_share[0])
    if candidate.config.mode is Mode.AGGREGATED and prefill_share > 0.5:
        return Bottleneck.COMPUTE, f"Compute limits it: {prefill_share:.0%} of the engine's time goes to prefill."
    return _of_decode(roles[-1], last)


def _waiting(candidate: Candidate, replica: _Replica, share: float) -> tuple[Bottleneck, str]:
    aggregated = candidate.config.mode is Mode.AGGREGATED
    if aggregated and replica.users > replica.slots:
        limit = "its options allow" if replica.slots < replica.most_sequences else "its memory holds"
        return Bottleneck.KV_CAPACITY, (
            f"KV capacity limits it: {limit} {replica.slots:.0f} of {replica.users:.0f} sequences in flight on a rank; "
            f"{share:.0%} of the TTFT is waiting for a place."
        )
    where = "others' prefill" if aggregated else "a prefill replica or a place to decode"
    return Bottleneck.QUEUEING, f"Queueing limits it: {share:.0%} of the TTFT is waiting for {where}."


def _of_decode(role: RoleAccount, replica: _Replica) -> tuple[Bottleneck, str]:
    parts, step = role.decode_ms, sum(role.decode_ms.values())
    groups = grouped(parts)
    name = max(groups, key=lambda group: groups[group])
    share, longest = groups[name] / step, next(iter(parts))
    detail = f"{longest} takes {parts[longest]:.2f} of the {step:.2f} ms of a decode step of {role.decode_seqs:.0f}"
    if name == "interconnect":
        return Bottleneck.INTERCONNECT, f"Interconnect limits it: {share:.0%} of a decode step is exchange; {detail}."
    if name == "host":
        return Bottleneck.HOST, f"The host limits it: {share:.0%} of a decode step is neither kernel nor exchange."
    if name == "weights" and _grows_with_rows(replica.steps, role.decode_seqs):
        return Bottleneck.COMPUTE, f"Compute limits it: {share:.0%} of a decode step multiplies matrices; {detail}."
    what = "reads weights" if name == "weights" else "reads the KV cache"
    return Bottleneck.MEMORY_BANDWIDTH, f"Memory bandwidth limits it: {share:.0%} of a decode step {what}; {detail}."


def _grows_with_rows(steps: StepTimes, seqs: float) -> bool:
    """True where twice the sequences would make matrix products at least 1.6 times as long: arithmetic, not reading."""

    def products(rows: float) -> float:
        return grouped(_parts(steps, step_batch(decode_seqs=[rows], decode_context=[1.0])))["weights"]

    return products(2.0 * seqs) > 1.6 * products(seqs)
