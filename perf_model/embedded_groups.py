"""Groups of candidates on the embedded engine: memory fit, steps from the roofline of a core, serving."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import numpy as np

from perf_model.batch import StepBatch, step_batch
from perf_model.curves import Origin
from perf_model.disaggregated import PairLoad, disaggregated
from perf_model.embedded import ACTIVATION_BYTES, KV_BYTES, EmbeddedSteps
from perf_model.engine_traits import EngineTraits, engine_traits
from perf_model.groups import GroupAnswer, burst_share, option
from perf_model.memory import MemoryNeed
from perf_model.numeric import FloatArray, floats
from perf_model.serving import RankLoad, aggregated
from perf_model.step_tables import MeasuredNode, MeasuredSteps
from search_spaces.problem import Problem
from search_spaces.serving import Candidate, Mode, Pool, Role
from search_spaces.workload import Workload

CONTEXT_STEP = 256
"""llama.cpp rounds the context of a slot up to a multiple of this many tokens."""
LEAST_ACTION_MS = 0.3  # llama.cpp's own account of saving or restoring a slot of 64 tokens of a small model


class EmbeddedGroups:
    """Answers groups of candidates of `problem` on the embedded engine."""

    def __init__(
        self,
        problem: Problem,
        run_requests: float,
        measured: Mapping[str, MeasuredNode] | None = None,
        traits: EngineTraits | None = None,
    ) -> None:
        """`measured` holds what was measured of the engine on node pools, by name; `traits` are in place of its own."""
        self._own_traits = traits
        self._problem = problem
        self._run_requests = run_requests
        self._measured = measured or {}

    def _traits(self, engine: str) -> EngineTraits:
        return self._own_traits or engine_traits(engine)

    def layout(self, candidate: Candidate) -> Hashable:
        """What must be equal for candidates to be computed as one array: all that is not a number in the arrays."""
        engine = candidate.config.engine
        return engine, tuple(
            (
                pool.role,
                pool.node_pool,
                pool.devices_per_replica,
                option(engine, pool, "ubatch_size"),
                option(engine, pool, "kv_cache_dtype"),
            )
            for pool in candidate.config.pools
        )

    def answer(self, group: list[Candidate]) -> GroupAnswer:
        """Serving, throughput and memory fit of candidates of one layout."""
        if group[0].config.mode is Mode.AGGREGATED:
            return self._aggregated(group)
        return self._disaggregated(group)

    def _infeasible(self, group: list[Candidate]) -> list[str | None]:
        reasons: list[str | None] = [None] * len(group)
        for role in group[0].config.mode.roles:
            need = self.memory(group, role)
            for index in np.flatnonzero(~need.fits):
                reasons[index] = reasons[index] or f"{role} replica: {need.explain(int(index))}"
        return reasons

    def memory(self, group: list[Candidate], role: Role) -> MemoryNeed:
        """What a replica of each candidate's pool of `role` needs.

        A saved slot restores only into a replica with as many slots, so both pools have the slots of the larger one; a
        slot's room is a multiple of `CONTEXT_STEP` tokens.
        """
        model, engine = self._problem.model, group[0].config.engine
        pools = [c.config.pool(role) for c in group]
        tokens = float(np.ceil(self._problem.workload.longest_context / CONTEXT_STEP) * CONTEXT_STEP)
        slots = floats([max(option(engine, pool, "max_num_seqs") for pool in c.config.pools) for c in group])
        ubatch = floats([option(engine, pool, "ubatch_size") for pool in pools])
        kv_bytes = model.kv_bytes_per_token(KV_BYTES[str(option(engine, pools[0], "kv_cache_dtype"))])
        widest = model.vocab_size + 8.0 * model.hidden_size
        device = self._problem.node_pool(pools[0].node_pool).device
        return MemoryNeed(
            weight_bytes=np.full(len(pools), model.weight_bytes),
            kv_bytes=slots * tokens * kv_bytes,
            activation_bytes=ubatch * widest * ACTIVATION_BYTES,
            reserve_bytes=np.full(len(pools), self._traits(engine).reserve_bytes),
            capacity_bytes=floats([device.memory_bytes * pool.devices_per_replica for pool in pools]),
        )

    def steps(self, engine: str, pool: Pool) -> EmbeddedSteps | MeasuredSteps:
        """Step times of a replica of `pool`: measured ones where there are any."""
        roofline = self._roofline(engine, pool)
        node = self._measured.get(pool.node_pool)
        return roofline if node is None else node.steps(roofline)

    def _roofline(self, engine: str, pool: Pool) -> EmbeddedSteps:
        return EmbeddedSteps(
            model=self._problem.model,
            device=self._problem.node_pool(pool.node_pool).device,
            traits=self._traits(engine),
            cores=pool.devices_per_replica,
            ubatch_size=int(option(engine, pool, "ubatch_size")),
            kv_cache_dtype=str(option(engine, pool, "kv_cache_dtype")),
        )

    def _call_ms(self, engine: str, pool: Pool) -> float:
        """A request to an engine, or to the router before it, outside of the engine's steps."""
        node = self._measured.get(pool.node_pool)
        measured = None if node is None else node.request_ms()
        return self._traits(engine).request_ms if measured is None else measured

    def _aggregated(self, group: list[Candidate]) -> GroupAnswer:
        engine = group[0].config.engine
        pools = [c.config.pool(Role.MIXED) for c in group]
        replicas = floats([pool.replicas for pool in pools])
        load = self.rank_load(group, pools, replicas)
        steps = self.steps(engine, pools[0])
        estimate = aggregated(steps, load)
        batch = step_batch(decode_seqs=np.maximum(estimate.decode_seqs, 1.0), decode_context=load.mean_context)
        return GroupAnswer(
            estimate=estimate,
            requests_per_s=estimate.requests_per_s * replicas,
            breakdown_ms=steps.breakdown_ms(batch),
            refused=self._infeasible(group),
            roofline_share=_roofline_share(steps, batch),
        )

    def rank_load(self, group: list[Candidate], pools: list[Pool], replicas: FloatArray) -> RankLoad:
        """What a replica of each of `pools` is asked to do."""
        engine, workload = group[0].config.engine, self._problem.workload
        size, isl = len(group), float(workload.isl.mean)
        return RankLoad(
            users=floats([c.load.concurrency or 0 for c in group]) / replicas,
            rate_per_s=floats([c.load.request_rate or 0.0 for c in group]) / replicas,
            slots=floats([option(engine, pool, "max_num_seqs") for pool in pools]),
            token_budget=floats([option(engine, pool, "batch_size") for pool in pools]),
            isl=np.full(size, isl),
            osl=np.full(size, float(workload.osl.mean)),
            cached=np.full(size, np.floor(isl * workload.shared_prefix)),
            request_ms=self._call_ms(engine, pools[0]) * np.where(replicas > 1, 2.0, 1.0),
            run_requests=np.full(size, self._run_requests),
            burst_share=np.full(size, _lockstep(workload)),
        )

    def _disaggregated(self, group: list[Candidate]) -> GroupAnswer:
        engine = group[0].config.engine
        decode = self.steps(engine, group[0].config.pool(Role.DECODE))
        prefill = self.steps(engine, group[0].config.pool(Role.PREFILL))
        load = self.pair_load(group)
        estimate = disaggregated(prefill, decode, load)
        context = load.isl + load.osl / 2.0
        batch = step_batch(decode_seqs=np.maximum(estimate.decode_seqs, 1.0), decode_context=context)
        return GroupAnswer(
            estimate=estimate,
            requests_per_s=estimate.requests_per_s,
            breakdown_ms=decode.breakdown_ms(batch),
            refused=self._infeasible(group),
            roofline_share=_roofline_share(decode, batch),
        )

    def pair_load(self, group: list[Candidate]) -> PairLoad:
        """What the replicas of disaggregated candidates are asked to do."""
        engine, workload = group[0].config.engine, self._problem.workload
        size, isl = len(group), float(workload.isl.mean)
        prefills = [c.config.pool(Role.PREFILL) for c in group]
        decodes = [c.config.pool(Role.DECODE) for c in group]
        send, receive = self._hand_over_ms(group[0])
        return PairLoad(
            users=floats([c.load.concurrency or 0 for c in group]),
            rate_per_s=floats([c.load.request_rate or 0.0 for c in group]),
            prefill_ranks=floats([pool.replicas for pool in prefills]),
            decode_ranks=floats([pool.replicas for pool in decodes]),
            decode_slots=floats([option(engine, pool, "max_num_seqs") for pool in decodes]),
            token_budget=floats([option(engine, pool, "batch_size") for pool in prefills]),
            isl=np.full(size, isl),
            osl=np.full(size, float(workload.osl.mean)),
            cached=np.full(size, np.floor(isl * workload.shared_prefix)),
            request_ms=np.zeros(size),
            wire_ms=np.zeros(size),
            send_ms=np.full(size, send),
            receive_ms=np.full(size, receive),
            run_requests=np.full(size, self._run_requests),
            burst_share=np.full(size, burst_share(workload)),
            prefill_slots=floats([option(engine, pool, "max_num_seqs") for pool in prefills]),
            hop_ms=np.full(size, self._call_ms(engine, prefills[0])),
            through_engines=True,
        )

    def _hand_over_ms(self, candidate: Candidate) -> tuple[float, float]:
        """What a hand-over occupies of the sending and of the receiving engine, apart from the calls that ask for it.

        What was measured is a call with all that it brings about.
        """
        engine, prefill = candidate.config.engine, candidate.config.pool(Role.PREFILL)
        node = self._measured.get(prefill.node_pool)
        tokens = float(self._problem.workload.isl.mean)
        measured = None if node is None else node.hand_over_ms(self._roofline(engine, prefill), tokens)
        if measured is not None:
            call = self._call_ms(engine, prefill)
            return max(measured[0] - call, LEAST_ACTION_MS), max(measured[1] - call, LEAST_ACTION_MS)
        half = self._handover_bytes(engine, prefill) / self._handover_bandwidth(candidate) / 2.0 * 1e3
        return half + LEAST_ACTION_MS, half + LEAST_ACTION_MS

    def _handover_bytes(self, engine: str, prefill: Pool) -> float:
        per_element = KV_BYTES[str(option(engine, prefill, "kv_cache_dtype"))]
        return self._problem.model.kv_bytes_per_token(per_element) * self._problem.workload.isl.mean

    def _handover_bandwidth(self, candidate: Candidate) -> float:
        """Bytes/s between the pools: a link inside a pool's nodes, the network between pools."""
        source = self._problem.node_pool(candidate.config.pool(Role.PREFILL).node_pool)
        target = self._problem.node_pool(candidate.config.pool(Role.DECODE).node_pool)
        if source.name == target.name:
            return source.device.link_bandwidth
        return min(source.device.network_bandwidth, target.device.network_bandwidth)


def _lockstep(workload: Workload) -> float:
    """Share of requests of users that stay in step on a replica that prefills and decodes.

    llama.cpp computes a new prompt in its next step, whole, so that users lose each other with the first lengths that
    differ: at 12 tokens of spread 4 users had a TTFT of 1.3 prefills, where users in step would have 2.5.
    """
    return 1.0 / (1.0 + workload.osl.longest - workload.osl.shortest)


def _roofline_share(steps: EmbeddedSteps | MeasuredSteps, batch: StepBatch) -> float:
    """Share of the first candidate's decode step that no table backs; half of what another model's tables back."""
    first = step_batch(decode_seqs=batch.decode_seqs[:1], decode_context=batch.decode_context[:1])
    origins = steps.origins(first)
    return origins[Origin.ROOFLINE] + 0.5 * origins[Origin.EXTRAPOLATED]
