"""Predicts candidates on the emulated engine: the model of GPU serving, with the options that the engine has."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from perf_model.batch import step_batch
from perf_model.disaggregated import PairLoad, disaggregated
from perf_model.figures import Deployment, metrics
from perf_model.numeric import FloatArray, floats
from perf_model.phases import StepTimes
from perf_model.serving import RankLoad, ServingEstimate, aggregated
from search_spaces.errors import InvalidValueError
from search_spaces.outcome import Prediction
from search_spaces.problem import Problem
from search_spaces.serving import Candidate, Mode, Pool, Role
from tuner.emulation import Profiles, option

MODEL_ERROR = 0.3
"""Standard deviation of the logarithm of any raw figure, before measurements correct it."""


@dataclass(frozen=True, kw_only=True)
class EmulatedPredictor:
    """See `perf_model.predictor.Predictor`. A run measures `run_requests` requests."""

    problem: Problem
    profiles: Profiles
    run_requests: int = 64

    def predict(self, candidates: Sequence[Candidate]) -> list[Prediction]:
        """One prediction for each candidate, in order."""
        groups: dict[Hashable, list[int]] = defaultdict(list)
        for index, candidate in enumerate(candidates):
            groups[_alike(candidate)].append(index)
        answers: dict[int, Prediction] = {}
        for members in groups.values():
            found = self._predict_group([candidates[index] for index in members])
            answers.update(zip(members, found, strict=True))
        return [answers[index] for index in range(len(candidates))]

    def _predict_group(self, group: list[Candidate]) -> list[Prediction]:
        """Predictions of candidates that differ in numbers only."""
        reasons = [self._infeasible(candidate) for candidate in group]
        if all(reasons):
            return [Prediction(metrics={}, infeasible=reason) for reason in reasons]
        is_aggregated = group[0].config.mode is Mode.AGGREGATED
        estimate, rate, steps = self._aggregated(group) if is_aggregated else self._disaggregated(group)
        named = metrics(estimate, self._deployment(group, rate), self.problem.slos)
        batch = step_batch(decode_seqs=np.maximum(estimate.decode_seqs, 1.0), decode_context=self._mean_context)
        breakdown = steps.breakdown_ms(batch)
        return [_prediction(index, reason, named, breakdown) for index, reason in enumerate(reasons)]

    def _infeasible(self, candidate: Candidate) -> str | None:
        """Why an engine would not start, None where it would."""
        longest = self.problem.workload.longest_context
        for pool in candidate.config.pools:
            try:
                tokens = self._kv_tokens(pool)
            except InvalidValueError as error:
                return str(error)
            if tokens < longest:
                device = self.problem.node_pool(pool.node_pool).device.name
                return (
                    f"{pool.role} replica: a rank on {device} has room for {tokens} tokens of KV cache beside weights "
                    f"and a request holds up to {longest}; use more GPUs for a replica or more of their memory"
                )
        return None

    def _kv_tokens(self, pool: Pool) -> int:
        return self.profiles.memory(pool, self.problem).kv_tokens(float(option(pool, "gpu_memory_utilization")))

    def _slots(self, pool: Pool) -> float:
        """Sequences that a rank runs together, by its slots and by its memory."""
        fitting = self._kv_tokens(pool) / (self.problem.workload.isl.mean + self.problem.workload.osl.mean)
        return max(1.0, min(float(option(pool, "max_num_seqs")), fitting))

    def _aggregated(self, group: list[Candidate]) -> tuple[ServingEstimate, FloatArray, StepTimes]:
        pools = [candidate.config.pool(Role.MIXED) for candidate in group]
        replica = self.profiles.replica(pools[0], self.problem)
        ranks = floats([pool.replicas * pool.parallelism.dp * pool.parallelism.pp for pool in pools])
        users = floats([c.load.concurrency or 0 for c in group])
        load = RankLoad(
            users=np.where(users > 0, np.maximum(users / ranks, 1.0), 0.0),
            rate_per_s=floats([c.load.request_rate or 0.0 for c in group]) / ranks,
            slots=floats([self._slots(pool) for pool in pools]),
            token_budget=floats([option(pool, "max_num_batched_tokens") for pool in pools]),
            request_ms=self._full(group, replica.traits.request_ms),
            ranks=1.0,
            **self._lengths(group, [bool(option(pool, "enable_prefix_caching")) for pool in pools]),
        )
        estimate = aggregated(replica.steps, load)
        busy = np.where(users > 0, np.minimum(users, ranks), ranks)
        return estimate, estimate.requests_per_s * busy, replica.steps

    def _disaggregated(self, group: list[Candidate]) -> tuple[ServingEstimate, FloatArray, StepTimes]:
        first = group[0].config
        prefill = self.profiles.replica(first.pool(Role.PREFILL), self.problem)
        decode = self.profiles.replica(first.pool(Role.DECODE), self.problem)
        prefills, decodes = ([c.config.pool(role) for c in group] for role in (Role.PREFILL, Role.DECODE))
        half = self.profiles.hand_over(first.pool(Role.DECODE), first, self.problem)
        wire_ms = 2.0 * half.half_ms(self.problem.workload.isl.mean) if half is not None else 0.0
        load = PairLoad(
            users=floats([c.load.concurrency or 0 for c in group]),
            rate_per_s=floats([c.load.request_rate or 0.0 for c in group]),
            prefill_ranks=floats([p.replicas * p.parallelism.dp * p.parallelism.pp for p in prefills]),
            decode_ranks=floats([p.replicas * p.parallelism.dp * p.parallelism.pp for p in decodes]),
            decode_slots=floats([self._slots(pool) for pool in decodes]),
            token_budget=floats([option(pool, "max_num_batched_tokens") for pool in prefills]),
            request_ms=self._full(group, prefill.traits.request_ms + decode.traits.request_ms),
            wire_ms=self._full(group, wire_ms),
            send_ms=self._full(group, 0.0),
            receive_ms=self._full(group, 0.0),
            **self._lengths(group, [bool(option(pool, "enable_prefix_caching")) for pool in prefills]),
        )
        estimate = disaggregated(prefill.steps, decode.steps, load)
        return estimate, estimate.requests_per_s, decode.steps

    def _lengths(self, group: list[Candidate], caching: list[bool]) -> dict[str, FloatArray]:
        """The fields that both kinds of load share."""
        workload = self.problem.workload
        return {
            "isl": self._full(group, workload.isl.mean),
            "osl": self._full(group, workload.osl.mean),
            "cached": np.floor(workload.isl.mean * workload.shared_prefix * floats(caching)),
            "run_requests": self._full(group, self.run_requests),
            "burst_share": self._full(group, 0.0),
        }

    def _full(self, group: list[Candidate], value: float) -> FloatArray:
        return np.full(len(group), float(value))

    @property
    def _mean_context(self) -> float:
        return self.problem.workload.isl.mean + self.problem.workload.osl.mean / 2.0

    def _deployment(self, group: list[Candidate], requests_per_s: FloatArray) -> Deployment:
        pool_of = self.problem.node_pool
        price = [sum(p.devices * pool_of(p.node_pool).price_per_device_hour for p in c.config.pools) for c in group]
        return Deployment(
            requests_per_s=requests_per_s,
            devices=floats([c.config.devices for c in group]),
            price_per_hour=floats(price),
            isl=self._full(group, self.problem.workload.isl.mean),
            osl=self._full(group, self.problem.workload.osl.mean),
        )


def _alike(candidate: Candidate) -> Hashable:
    """What must be equal for candidates to be computed as one array."""
    pools = candidate.config.pools
    return tuple((p.role, p.node_pool, p.parallelism, option(p, "kv_cache_dtype")) for p in pools)


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
