"""Predictions on GPU engines with what public measured runs teach (see `prior.py`) applied to them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from perf_model.gpu_groups import GpuGroups
from perf_model.numeric import floats
from perf_model.predictor import Predictor
from perf_model.prior import Occasion, Prior, Subject, subject
from perf_model.raw_errors import RawErrors, on_gpus
from search_spaces.outcome import Prediction
from search_spaces.problem import Problem
from search_spaces.serving import Candidate

_RATES = (
    "output_tokens_per_s",
    "output_tokens_per_s_per_gpu",
    "output_tokens_per_dollar",
    "total_tokens_per_s",
    "input_tokens_per_s",
    "requests_per_s",
    "goodput_rps",
    "goodput_rps_per_gpu",
    "goodput_requests_per_dollar",
    "requests_per_dollar",
    "output_tokens_per_joule",
)
_COSTS = ("cost_per_million_tokens", "cost_per_million_output_tokens")


@dataclass(frozen=True, kw_only=True)
class Factors:
    """What a prior says of one candidate: factors on latencies, standard deviations of what remains (of logs)."""

    ttft: float
    tpot: float
    ttft_sd: float
    tpot_sd: float


@dataclass(frozen=True, kw_only=True)
class CorrectedPredictor:
    """`model`, whose answers for candidates on GPU engines `prior` corrects; `groups` knows their replicas.

    TTFT, TPOT and ITL are multiplied by the prior's factors and E2E follows from them. In a closed loop throughput is
    the inverse of E2E (Little's law); the arrivals of an open loop stay what they are. The share of requests that meet
    the SLOs is the uncorrected model's.
    """

    model: Predictor
    groups: GpuGroups
    problem: Problem
    prior: Prior

    def predict(self, candidates: Sequence[Candidate]) -> list[Prediction]:
        """One corrected prediction for each candidate, in order; infeasible ones stay as they are."""
        raw = self.model.predict(candidates)
        by_subject: dict[Subject, list[int]] = defaultdict(list)
        for index, (candidate, prediction) in enumerate(zip(candidates, raw, strict=True)):
            if prediction.infeasible is None:
                by_subject[self._subject(candidate)].append(index)
        for who, members in by_subject.items():
            factors = self._factors(who, [(candidates[i], raw[i]) for i in members])
            for index, found in zip(members, factors, strict=True):
                raw[index] = self._corrected(candidates[index], raw[index], found)
        return raw

    def _subject(self, candidate: Candidate) -> Subject:
        """The replica that the prior knows: the decode replica where prefill has its own."""
        config = candidate.config
        return subject(self.groups.key(config.engine, config.pools[-1]), config.mode)

    def _factors(self, who: Subject, members: Sequence[tuple[Candidate, Prediction]]) -> list[Factors]:
        workload = self.problem.workload
        found = self.prior.apply(
            who,
            Occasion(
                users=floats([_users_of_a_rank(candidate, prediction) for candidate, prediction in members]),
                isl=np.full(len(members), float(workload.isl.mean)),
                osl=np.full(len(members), float(workload.osl.mean)),
                ttft_ms=floats([prediction.metrics["ttft_mean_ms"] for _, prediction in members]),
                tpot_ms=floats([prediction.metrics["tpot_mean_ms"] for _, prediction in members]),
            ),
        )
        columns = (found.ttft_factor, found.tpot_factor, found.ttft_log_sd, found.tpot_log_sd)
        return [
            Factors(ttft=float(a), tpot=float(b), ttft_sd=float(c), tpot_sd=float(d))
            for a, b, c, d in zip(*columns, strict=True)
        ]

    def _corrected(self, candidate: Candidate, raw: Prediction, factors: Factors) -> Prediction:
        values = dict(raw.metrics)
        gaps = max(self.problem.workload.osl.mean - 1.0, 1.0)
        for name in raw.metrics:
            latency, _, rest = name.partition("_")
            values[name] *= {"ttft": factors.ttft, "tpot": factors.tpot, "itl": factors.tpot}.get(latency, 1.0)
            if latency == "e2e":
                values[name] = (
                    factors.ttft * raw.metrics[f"ttft_{rest}"] + gaps * factors.tpot * raw.metrics[f"tpot_{rest}"]
                )
        speed = 1.0
        if candidate.load.concurrency is not None:
            speed = raw.metrics["e2e_mean_ms"] / values["e2e_mean_ms"]
        for name in _RATES:
            if name in values:
                values[name] *= speed
        for name in _COSTS:
            if name in values:
                values[name] /= speed
        values["output_tokens_per_s_per_user"] = 1000.0 / values["tpot_mean_ms"]
        return replace(
            raw, metrics=values, log_stddev=_log_stddevs(raw, values, factors, on_gpus(candidate.config.mode))
        )


def _users_of_a_rank(candidate: Candidate, prediction: Prediction) -> float:
    """Requests in flight on an attention rank of the last pool; of an open loop by Little's law."""
    pool = candidate.config.pools[-1]
    ranks = pool.parallelism.dp * pool.parallelism.pp * pool.replicas
    rate = candidate.load.request_rate or 0.0
    users = candidate.load.concurrency or rate * prediction.metrics["e2e_mean_ms"] / 1e3
    return max(float(users), 1e-3) / ranks


def _log_stddevs(raw: Prediction, values: dict[str, float], factors: Factors, errors: RawErrors) -> dict[str, float]:
    """The prior's standard deviations, widened as the raw ones are for time that no table backs."""
    wait = values["ttft_mean_ms"] / values["e2e_mean_ms"]
    both = math.hypot(wait * factors.ttft_sd, (1.0 - wait) * factors.tpot_sd)
    named = {"ttft": factors.ttft_sd, "tpot": factors.tpot_sd, "itl": factors.tpot_sd}
    result: dict[str, float] = {}
    for name, sd in raw.log_stddev.items():
        if sd == 0.0:
            result[name] = 0.0
            continue
        guessed = max(sd**2 - errors.log_stddev(name, 0.0) ** 2, 0.0)
        result[name] = math.sqrt(named.get(name.partition("_")[0], both) ** 2 + guessed)
    return result
