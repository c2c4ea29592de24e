"""Groups of candidates on GPU engines: operation tables where the system has them, its roofline where not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from perf_model.batch import StepBatch, step_batch
from perf_model.columns import Columns, columns, rank_load
from perf_model.curves import Origin
from perf_model.disaggregated import DecodeSteps, PairLoad, Prompts, decode_steps_of, network, prompts_of
from perf_model.groups import GroupAnswer, burst_share, option
from perf_model.layout import ReplicaLayout
from perf_model.memory import MemoryNeed
from perf_model.numeric import FloatArray, IntArray, floats
from perf_model.precision import Precision, checkpoint_precision
from perf_model.serving import aggregated
from perf_model.silicon import GpuReplica, ReplicaKey, Silicon
from perf_model.systems import GpuSystem
from search_spaces.engines import engine_spec
from search_spaces.hardware import NodePool
from search_spaces.problem import Problem
from search_spaces.serving import Candidate, Mode, OptionValue, Pool, Role

# Engines that behave as another one does.
BEHAVES_AS = {"emulated": "vllm"}
WEIGHTS = ("gemm", "projections", "moe")
HANDOVER_MS = 10.0  # meta-data exchange before a KV cache moves


class GpuGroups:
    """Answers groups of candidates of `problem` on GPU engines, with tables of `silicon`."""

    def __init__(self, problem: Problem, silicon: Silicon, run_requests: float) -> None:
        self._problem = problem
        self._silicon = silicon
        self._run_requests = run_requests
        self._replicas: dict[Hashable, GpuReplica] = {}

    def layout(self, candidate: Candidate) -> Hashable:
        """What must be equal for candidates to be computed together."""
        config = candidate.config
        if config.mode is Mode.DISAGGREGATED:
            return config.engine, config.mode
        return config.engine, self._pool_layout(config.engine, config.pools[0])

    def _pool_layout(self, engine: str, pool: Pool) -> Hashable:
        """What must be equal for pools to be computed as one array."""
        return (
            pool.role,
            pool.node_pool,
            pool.parallelism,
            _find(engine, pool, "kv_cache_dtype"),
            _find(engine, pool, engine_spec(engine).scheduling.memory_share),
            _caches_prefixes(engine, pool),
            _find(engine, pool, "quantization"),
        )

    def answer(self, group: list[Candidate]) -> GroupAnswer:
        """Serving, throughput and memory fit of candidates of one `layout`."""
        if group[0].config.mode is Mode.AGGREGATED:
            return self._aggregated(group)
        return self._disaggregated(group)

    def key(self, engine: str, pool: Pool) -> ReplicaKey:
        """What decides the step times of the replicas of `pool`."""
        parallel = pool.parallelism
        cache = "fp8" if str(_find(engine, pool, "kv_cache_dtype") or "auto").startswith("fp8") else "bfloat16"
        precision: Precision = checkpoint_precision(self._problem.model, cache=cache)
        if _find(engine, pool, "quantization") == "fp8":
            precision = replace(
                precision, **{name: "fp8" for name in WEIGHTS if getattr(precision, name) == "bfloat16"}
            )
        return ReplicaKey(
            model=self._problem.model,
            system=system_name(self._problem.node_pool(pool.node_pool)),
            engine=BEHAVES_AS.get(engine, engine),
            layout=ReplicaLayout(tp=parallel.tp, pp=parallel.pp, dp=parallel.dp, ep=parallel.ep),
            precision=precision,
        )

    def replica(self, engine: str, pool: Pool) -> GpuReplica:
        """Step times and memory of the replicas of `pool`, made once for each layout."""
        layout = engine, self._pool_layout(engine, pool)
        if layout not in self._replicas:
            self._replicas[layout] = self._made(engine, pool)
        return self._replicas[layout]

    def _made(self, engine: str, pool: Pool) -> GpuReplica:
        node_pool = self._problem.node_pool(pool.node_pool)
        silicon = self._silicon.with_system(system_of(node_pool, self._silicon))
        replica = silicon.replica(self.key(engine, pool))
        share = _find(engine, pool, engine_spec(engine).scheduling.memory_share)
        if share is None:
            return replica
        return replace(replica, footprint=replace(replica.footprint, memory_share=float(share)))

    def rows(self, group: list[Candidate], pools: list[Pool]) -> Columns:
        """The loads of candidates of one layout on each of their `pools` (all in one role)."""
        engine, workload = group[0].config.engine, self._problem.workload
        scheduling = engine_spec(engine).scheduling
        replicas = floats([pool.replicas for pool in pools])
        isl = float(workload.isl.mean)
        caches = _caches_prefixes(engine, pools[0])
        users = floats([c.load.concurrency or 0 for c in group]) / replicas
        return columns(
            tp=pools[0].parallelism.tp,
            pp=pools[0].parallelism.pp,
            dp=pools[0].parallelism.dp,
            ep=pools[0].parallelism.ep,
            users=users,
            rate_per_s=floats([c.load.request_rate or 0.0 for c in group]) / replicas,
            isl=isl,
            osl=float(workload.osl.mean),
            cached=np.floor(isl * workload.shared_prefix) if caches else 0.0,
            max_sequences=[float(_find(engine, pool, scheduling.sequences) or 1024) for pool in pools],
            token_budget=[_token_budget(engine, pool, isl) for pool in pools],
            burst_share=burst_share(workload),
        )

    def _aggregated(self, group: list[Candidate]) -> GroupAnswer:
        pools = [c.config.pool(Role.MIXED) for c in group]
        replica = self.replica(group[0].config.engine, pools[0])
        rows = self.rows(group, pools)
        load = replace(rank_load(replica, rows), run_requests=np.full(len(group), self._run_requests))
        estimate = aggregated(replica.steps, load)
        ranks = replica.key.layout.dp * replica.key.layout.pp
        batch = step_batch(decode_seqs=np.maximum(estimate.decode_seqs, 1.0), decode_context=load.mean_context)
        return GroupAnswer(
            estimate=estimate,
            requests_per_s=estimate.requests_per_s * ranks * floats([pool.replicas for pool in pools]),
            breakdown_ms=replica.steps.breakdown_ms(batch),
            refused=_refusals(Role.MIXED, replica, rows),
            roofline_share=_roofline_share(replica, batch),
        )

    def _disaggregated(self, group: list[Candidate]) -> GroupAnswer:
        """Candidates of any layouts: each pool is computed with its like, the pairs that they form all at once."""
        prefills, decodes = self._sides(group, Role.PREFILL), self._sides(group, Role.DECODE)
        load = self._pair_load(group, prefills, decodes)
        prompts = [prompts_of(side.replica.steps, load.take(side.rows)) for side in prefills]
        steps = [decode_steps_of(side.replica.steps, load.take(side.rows)) for side in decodes]
        estimate = network(Prompts.joined(prompts, _order(prefills)), DecodeSteps.joined(steps, _order(decodes)), load)
        batches = [
            step_batch(decode_seqs=np.maximum(estimate.decode_seqs, 1.0)[rows], decode_context=context[rows])
            for context in (load.isl + load.osl / 2.0,)
            for rows in (side.rows for side in decodes)
        ]
        answered = list(zip(decodes, batches, strict=True))
        refused = [
            first or second
            for first, second in zip(
                _all_refusals(prefills, Role.PREFILL), _all_refusals(decodes, Role.DECODE), strict=True
            )
        ]
        return GroupAnswer(
            estimate=estimate,
            requests_per_s=estimate.requests_per_s,
            breakdown_ms=_all_breakdowns(answered, len(group)),
            refused=refused,
            roofline_share=_gathered(
                decodes, [np.full(len(side.rows), _roofline_share(side.replica, batch)) for side, batch in answered]
            ),
        )

    def _sides(self, group: list[Candidate], role: Role) -> list[_Side]:
        """The pools in `role` of all of `group`, those of one layout together."""
        engine, alike = group[0].config.engine, defaultdict[Hashable, list[int]](list)
        for index, candidate in enumerate(group):
            alike[self._pool_layout(engine, candidate.config.pool(role))].append(index)
        sides = []
        for indices in alike.values():
            members = [group[index] for index in indices]
            pools = [candidate.config.pool(role) for candidate in members]
            columns = self.rows(members, pools)
            if role is Role.PREFILL:  # nothing is generated there
                columns = replace(columns, osl=np.ones_like(columns.osl))
            replica = self.replica(engine, pools[0])
            sides.append(_Side(rows=np.array(indices), pools=pools, replica=replica, columns=columns))
        return sides

    def _pair_load(self, group: list[Candidate], prefills: list[_Side], decodes: list[_Side]) -> PairLoad:
        workload, full = self._problem.workload, np.ones(len(group))
        speeds = floats([self._handover_bytes_per_s(candidate) for candidate in group])
        isl = float(workload.isl.mean) * full
        sent = [side.replica.footprint.sequence_bytes(side.columns.isl) for side in decodes]
        return PairLoad(
            users=floats([c.load.concurrency or 0 for c in group]),
            rate_per_s=floats([c.load.request_rate or 0.0 for c in group]),
            prefill_ranks=_gathered(prefills, [side.ranks for side in prefills]),
            decode_ranks=_gathered(decodes, [side.ranks for side in decodes]),
            decode_slots=_gathered(decodes, [rank_load(side.replica, side.columns).slots for side in decodes]),
            token_budget=_gathered(prefills, [side.columns.token_budget for side in prefills]),
            isl=isl,
            osl=float(workload.osl.mean) * full,
            cached=_gathered(prefills, [side.columns.cached for side in prefills]),
            request_ms=_gathered(decodes, [np.full(len(side.rows), side.replica.request_ms) for side in decodes]),
            wire_ms=HANDOVER_MS + 1e3 * _gathered(decodes, sent) / speeds,
            send_ms=0.0 * full,
            receive_ms=0.0 * full,
            run_requests=self._run_requests * full,
            burst_share=burst_share(workload) * full,
        )

    def _handover_bytes_per_s(self, candidate: Candidate) -> float:
        """How fast a prompt's KV cache travels: over links inside a pool's node, over the network elsewhere."""
        names = {candidate.config.pool(role).node_pool for role in (Role.PREFILL, Role.DECODE)}
        pools = [self._problem.node_pool(name) for name in names]
        inside = len(pools) == 1 and candidate.config.devices <= pools[0].devices_per_node
        return min(pool.device.link_bandwidth if inside else pool.device.network_bandwidth for pool in pools)


@dataclass(frozen=True, kw_only=True)
class _Side:
    """Pools of one role that share a layout, those of candidates `rows` (n,) of a group, and their loads."""

    rows: IntArray
    pools: list[Pool]
    replica: GpuReplica
    columns: Columns

    @property
    def ranks(self) -> FloatArray:
        """Ranks of all replicas (n,)."""
        layout = self.replica.key.layout
        return floats([pool.replicas * layout.dp * layout.pp for pool in self.pools])


def _order(sides: Sequence[_Side]) -> IntArray:
    """Where candidate 0, 1, ... of the group is found in the sides one after the other."""
    return np.argsort(np.concatenate([side.rows for side in sides]))


def _gathered(sides: Sequence[_Side], parts: Sequence[FloatArray]) -> FloatArray:
    """What `parts` hold for `sides`, in the order of the group."""
    return np.concatenate(parts)[_order(sides)]


def _all_refusals(sides: Sequence[_Side], role: Role) -> list[str | None]:
    found = [reason for side in sides for reason in _refusals(role, side.replica, side.columns)]
    return [found[index] for index in _order(sides)]


def _all_breakdowns(answered: Sequence[tuple[_Side, StepBatch]], count: int) -> dict[str, FloatArray]:
    """Milliseconds by operation (count,); not a number where a candidate's replica has no such operation."""
    parts: dict[str, FloatArray] = defaultdict(lambda: np.full(count, np.nan))
    for side, batch in answered:
        for name, found in side.replica.steps.breakdown_ms(batch).items():
            parts[name][side.rows] = found
    return dict(parts)


def system_name(pool: NodePool) -> str:
    """The tables' name of a pool's device: its own in lower case, with underscores."""
    return pool.device.name.lower().replace("-", "_").replace(" ", "_")


def system_of(pool: NodePool, silicon: Silicon) -> GpuSystem:
    """Facts of the pool's system: those beside the tables where it is known there, else those of its device."""
    name = system_name(pool)
    if (silicon.root / f"{name}.yaml").is_file():
        return silicon.system(name)
    device = pool.device
    flops = dict(device.flops)
    flops.setdefault("bf16", flops.get("fp16", max(flops.values())))
    return GpuSystem(
        name=name,
        memory_bytes=device.memory_bytes,
        memory_bandwidth=device.memory_bandwidth,
        flops=flops,
        memory_efficiency=0.8,
        launch_s=3e-6,
        gpus_per_node=pool.devices_per_node,
        gpus_per_domain=pool.devices_per_node,
        link_bandwidth=device.link_bandwidth,
        network_bandwidth=device.network_bandwidth,
        hop_s=1e-5,
        reserve_bytes=0.02 * device.memory_bytes,
        comm_bytes={},
        nccl_version="",
        sm_version=0,
    )


def _find(engine: str, pool: Pool, name: str | None) -> OptionValue | None:
    """The pool's value of the option `name`, None where the engine offers none of that name."""
    offered = {parameter.name for parameter in engine_spec(engine).parameters}
    return option(engine, pool, name) if name is not None and name in offered else None


def _caches_prefixes(engine: str, pool: Pool) -> bool:
    """True where prompts' blocks are used again: by default, unless switched off."""
    scheduling = engine_spec(engine).scheduling
    if _find(engine, pool, scheduling.forgets_prompts) is True:
        return False
    return _find(engine, pool, scheduling.reuses_prompts) in {None, True}


def _token_budget(engine: str, pool: Pool, isl: float) -> float:
    """Tokens of a step: where prompts are not computed in parts, a step holds a whole one."""
    scheduling = engine_spec(engine).scheduling
    budget = float(_find(engine, pool, scheduling.step_tokens) or 8192)
    return max(budget, isl) if _find(engine, pool, scheduling.splits_prompts) is False else budget


def _refusals(role: Role, replica: GpuReplica, rows: Columns) -> list[str | None]:
    """Why candidates do not fit, None where they do: one sequence of full length must."""
    length = rows.isl + rows.osl
    need: MemoryNeed = replica.footprint.need(np.ones_like(length), length, rows.token_budget)
    return [None if fits else f"{role} replica: {need.explain(i)}" for i, fits in enumerate(need.fits)]


def _roofline_share(replica: GpuReplica, batch: StepBatch) -> float:
    """Share of the first candidate's decode step that no table backs."""
    first = step_batch(decode_seqs=batch.decode_seqs[:1], decode_context=batch.decode_context[:1])
    return replica.steps.origins(first)[Origin.ROOFLINE]
