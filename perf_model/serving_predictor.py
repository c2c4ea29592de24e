"""Predicts the candidates of a problem: memory fit, steps, serving, metrics."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from perf_model.batch import step_batch
from perf_model.disaggregated import PairLoad, disaggregated
from perf_model.embedded import ACTIVATION_BYTES, KV_BYTES, EmbeddedSteps
from perf_model.engine_traits import EngineTraits, engine_traits
from perf_model.figures import Deployment, metrics
from perf_model.memory import MemoryNeed
from perf_model.numeric import FloatArray, floats
from perf_model.serving import RankLoad, ServingEstimate, aggregated
from search_spaces.engines import engine_spec
from search_spaces.outcome import Prediction
from search_spaces.problem import Problem
from search_spaces.serving import Candidate, Mode, OptionValue, Pool, Role

MODEL_ERROR = 0.3  # standard deviation of the logarithm of any raw figure, before measurements correct it


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A candidate and its place in the answer."""

    index: int
    candidate: Candidate


class ServingPredictor:
    """Predicts candidates of `problem` on the embedded engine from the roofline of its nodes.

    `run_requests` is the length of a measurement run, which decides how far the queue of an overloaded open loop grows.
    Candidates that share everything but numbers are computed together as arrays.
    """

    def __init__(self, problem: Problem, *, run_requests: int = 64) -> None:
        self._problem = problem
        self._run_requests = float(run_requests)

    def predict(self, candidates: Sequence[Candidate]) -> list[Prediction]:
        """One prediction for each candidate, in order; raises `InvalidValueError` for unknown engines or pools."""
        groups: dict[Hashable, list[_Row]] = defaultdict(list)
        for index, candidate in enumerate(candidates):
            groups[_layout(candidate)].append(_Row(index=index, candidate=candidate))
        answers: dict[int, Prediction] = {}
        for rows in groups.values():
            predicted = self._predict_group([row.candidate for row in rows])
            answers.update(zip((row.index for row in rows), predicted, strict=True))
        return [answers[index] for index in range(len(candidates))]

    def _predict_group(self, group: list[Candidate]) -> list[Prediction]:
        refused = self._infeasible(group)
        if group[0].config.mode is Mode.AGGREGATED:
            estimate, rate, breakdown = self._aggregated(group)
        else:
            estimate, rate, breakdown = self._disaggregated(group)
        named = metrics(estimate, self._deployment(group, rate), self._problem.slos)
        return [_prediction(i, reason, named, breakdown) for i, reason in enumerate(refused)]

    def _deployment(self, group: list[Candidate], requests_per_s: FloatArray) -> Deployment:
        workload = self._problem.workload
        price = [
            sum(pool.devices * self._problem.node_pool(pool.node_pool).price_per_device_hour for pool in c.config.pools)
            for c in group
        ]
        return Deployment(
            requests_per_s=requests_per_s,
            devices=floats([c.config.devices for c in group]),
            price_per_hour=floats(price),
            isl=np.full(len(group), float(workload.isl.mean)),
            osl=np.full(len(group), float(workload.osl.mean)),
        )

    def _infeasible(self, group: list[Candidate]) -> list[str | None]:
        limit, longest = self._problem.model.max_context, self._problem.workload.longest_context
        if longest > limit:
            text = f"a request holds up to {longest} tokens but the model's context ends at {limit}; shorten isl or osl"
            return [text] * len(group)
        reasons: list[str | None] = [None] * len(group)
        for role in group[0].config.mode.roles:
            need = self._memory([c.config.pool(role) for c in group], group[0].config.engine)
            for index in np.flatnonzero(~need.fits):
                reasons[index] = reasons[index] or f"{role} replica: {need.explain(int(index))}"
        return reasons

    def _memory(self, pools: list[Pool], engine: str) -> MemoryNeed:
        model, traits = self._problem.model, engine_traits(engine)
        tokens = self._problem.workload.longest_context
        slots = floats([_option(engine, pool, "max_num_seqs") for pool in pools])
        ubatch = floats([_option(engine, pool, "ubatch_size") for pool in pools])
        kv_bytes = model.kv_bytes_per_token(KV_BYTES[str(_option(engine, pools[0], "kv_cache_dtype"))])
        widest = model.vocab_size + 8.0 * model.hidden_size
        device = self._problem.node_pool(pools[0].node_pool).device
        return MemoryNeed(
            weight_bytes=np.full(len(pools), model.weight_bytes),
            kv_bytes=slots * tokens * kv_bytes,
            activation_bytes=ubatch * widest * ACTIVATION_BYTES,
            reserve_bytes=np.full(len(pools), traits.reserve_bytes),
            capacity_bytes=floats([device.memory_bytes * pool.devices_per_replica for pool in pools]),
        )

    def _steps(self, engine: str, pool: Pool) -> EmbeddedSteps:
        return EmbeddedSteps(
            model=self._problem.model,
            device=self._problem.node_pool(pool.node_pool).device,
            traits=engine_traits(engine),
            cores=pool.devices_per_replica,
            ubatch_size=int(_option(engine, pool, "ubatch_size")),
            kv_cache_dtype=str(_option(engine, pool, "kv_cache_dtype")),
        )

    def _aggregated(self, group: list[Candidate]) -> tuple[ServingEstimate, FloatArray, dict[str, FloatArray]]:
        engine = group[0].config.engine
        pools = [c.config.pool(Role.MIXED) for c in group]
        replicas = floats([pool.replicas for pool in pools])
        load = self._rank_load(group, pools, replicas)
        steps = self._steps(engine, pools[0])
        estimate = aggregated(steps, load)
        batch = step_batch(decode_seqs=np.maximum(estimate.decode_seqs, 1.0), decode_context=load.mean_context)
        return estimate, estimate.requests_per_s * replicas, steps.breakdown_ms(batch)

    def _rank_load(self, group: list[Candidate], pools: list[Pool], replicas: FloatArray) -> RankLoad:
        engine, workload = group[0].config.engine, self._problem.workload
        size, isl = len(group), float(workload.isl.mean)
        return RankLoad(
            users=floats([c.load.concurrency or 0 for c in group]) / replicas,
            rate_per_s=floats([c.load.request_rate or 0.0 for c in group]) / replicas,
            slots=floats([_option(engine, pool, "max_num_seqs") for pool in pools]),
            token_budget=floats([_option(engine, pool, "batch_size") for pool in pools]),
            isl=np.full(size, isl),
            osl=np.full(size, float(workload.osl.mean)),
            cached=np.full(size, np.floor(isl * workload.shared_prefix)),
            request_ms=np.full(size, engine_traits(engine).request_ms),
            run_requests=np.full(size, self._run_requests),
            burst_share=np.zeros(size),
        )

    def _disaggregated(self, group: list[Candidate]) -> tuple[ServingEstimate, FloatArray, dict[str, FloatArray]]:
        engine = group[0].config.engine
        decode = self._steps(engine, group[0].config.pool(Role.DECODE))
        prefill = self._steps(engine, group[0].config.pool(Role.PREFILL))
        load = self._pair_load(group)
        estimate = disaggregated(prefill, decode, load)
        context = load.isl + load.osl / 2.0
        batch = step_batch(decode_seqs=np.maximum(estimate.decode_seqs, 1.0), decode_context=context)
        return estimate, estimate.requests_per_s, decode.breakdown_ms(batch)

    def _pair_load(self, group: list[Candidate]) -> PairLoad:
        engine, workload = group[0].config.engine, self._problem.workload
        traits: EngineTraits = engine_traits(engine)
        size, isl = len(group), float(workload.isl.mean)
        prefills = [c.config.pool(Role.PREFILL) for c in group]
        decodes = [c.config.pool(Role.DECODE) for c in group]
        half = self._handover_bytes(engine, prefills[0]) / self._handover_bandwidth(group[0]) / 2.0 * 1e3
        return PairLoad(
            users=floats([c.load.concurrency or 0 for c in group]),
            rate_per_s=floats([c.load.request_rate or 0.0 for c in group]),
            prefill_ranks=floats([pool.replicas for pool in prefills]),
            decode_ranks=floats([pool.replicas for pool in decodes]),
            decode_slots=floats([_option(engine, pool, "max_num_seqs") for pool in decodes]),
            token_budget=floats([_option(engine, pool, "batch_size") for pool in prefills]),
            isl=np.full(size, isl),
            osl=np.full(size, float(workload.osl.mean)),
            cached=np.full(size, np.floor(isl * workload.shared_prefix)),
            request_ms=np.full(size, 2.0 * traits.request_ms),
            wire_ms=np.full(size, traits.handover_ms),
            send_ms=np.full(size, half),
            receive_ms=np.full(size, half),
            run_requests=np.full(size, self._run_requests),
            burst_share=np.zeros(size),
        )

    def _handover_bytes(self, engine: str, prefill: Pool) -> float:
        per_element = KV_BYTES[str(_option(engine, prefill, "kv_cache_dtype"))]
        return self._problem.model.kv_bytes_per_token(per_element) * self._problem.workload.isl.mean

    def _handover_bandwidth(self, candidate: Candidate) -> float:
        """Bytes/s between the pools: a link inside a pool's nodes, the network between pools."""
        source = self._problem.node_pool(candidate.config.pool(Role.PREFILL).node_pool)
        target = self._problem.node_pool(candidate.config.pool(Role.DECODE).node_pool)
        if source.name == target.name:
            return source.device.link_bandwidth
        return min(source.device.network_bandwidth, target.device.network_bandwidth)


def _option(engine: str, pool: Pool, name: str) -> OptionValue:
    """The pool's value of an engine option, the engine's own default where it is not set."""
    return pool.option(name, engine_spec(engine).parameter(name).default)


def _layout(candidate: Candidate) -> Hashable:
    """What must be equal for candidates to be computed as one array: all that is not a number in the arrays."""
    engine = candidate.config.engine
    return engine, tuple(
        (
            pool.role,
            pool.node_pool,
            pool.devices_per_replica,
            _option(engine, pool, "ubatch_size"),
            _option(engine, pool, "kv_cache_dtype"),
        )
        for pool in candidate.config.pools
    )


def _prediction(
    index: int, infeasible: str | None, named: dict[str, FloatArray], breakdown: dict[str, FloatArray]
) -> Prediction:
    if infeasible is not None:
        return Prediction(metrics={}, infeasible=infeasible)
    values = {name: float(array[index]) for name, array in named.items() if not np.isnan(array[index])}
    return Prediction(
        metrics=values,
        log_stddev=dict.fromkeys(values, MODEL_ERROR),
        breakdown_ms={name: float(array[index]) for name, array in breakdown.items()},
    )
