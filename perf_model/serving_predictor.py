"""Predicts the candidates of a problem: memory fit, steps, serving, metrics."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from perf_model.embedded_groups import EmbeddedGroups
from perf_model.engine_traits import TRAITS
from perf_model.figures import Deployment, metrics
from perf_model.gpu_groups import GpuGroups
from perf_model.groups import GroupAnswer
from perf_model.numeric import FloatArray, floats
from perf_model.raw_errors import ON_CORES, RawErrors, on_gpus
from perf_model.silicon import Silicon
from perf_model.step_tables import MeasuredNode
from perf_model.tables import default_root
from perf_model.vllm_on_cpu import VLLM_ON_CPU, as_embedded, is_vllm_on_cpu
from search_spaces.outcome import Prediction
from search_spaces.problem import Problem
from search_spaces.serving import Candidate

NO_TABLES = Path("no-operation-tables")  # a directory that does not exist: everything comes from the roofline


class ServingPredictor:
    """Predicts candidates of `problem`: the embedded engine from its cores' roofline, GPU engines from tables.

    `run_requests` is the length of a measurement run, which decides how far the queue of an overloaded open loop grows.
    `tables` is a directory of operation tables, by default that of the installed public ones; without either GPUs are
    modelled by their roofline. `measured` holds engine steps measured on CPU pools, by pool. Candidates that share
    everything but numbers are computed together as arrays.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        run_requests: int = 64,
        tables: Path | None = None,
        measured: Mapping[str, MeasuredNode] | None = None,
    ) -> None:
        self._problem = problem
        self.embedded = EmbeddedGroups(problem, float(run_requests), measured)
        self.vllm_on_cpu = EmbeddedGroups(problem, float(run_requests), traits=VLLM_ON_CPU)
        silicon = Silicon(tables or default_root() or NO_TABLES)
        self.gpus = GpuGroups(problem, silicon, float(run_requests))

    def predict(self, candidates: Sequence[Candidate]) -> list[Prediction]:
        """One prediction for each candidate, in order; raises `InvalidValueError` for unknown engines or pools."""
        groups: dict[Hashable, list[int]] = defaultdict(list)
        for index, candidate in enumerate(candidates):
            seen = self.seen(candidate)
            groups[candidate.config.engine, self.of(candidate).layout(seen)].append(index)
        answers: dict[int, Prediction] = {}
        for indices in groups.values():
            predicted = self._predict_group([candidates[index] for index in indices])
            answers.update(zip(indices, predicted, strict=True))
        return [answers[index] for index in range(len(candidates))]

    def seen(self, candidate: Candidate) -> Candidate:
        """`candidate` as who answers for it sees it."""
        return as_embedded(candidate, self._problem) if is_vllm_on_cpu(candidate, self._problem) else candidate

    def of(self, candidate: Candidate) -> EmbeddedGroups | GpuGroups:
        """Who answers for the engine of `candidate`."""
        if is_vllm_on_cpu(candidate, self._problem):
            return self.vllm_on_cpu
        return self.embedded if candidate.config.engine in TRAITS else self.gpus

    def _predict_group(self, group: list[Candidate]) -> list[Prediction]:
        limit, longest = self._problem.model.max_context, self._problem.workload.longest_context
        if longest > limit:
            text = f"a request holds up to {longest} tokens but the model's context ends at {limit}; shorten isl or osl"
            return [Prediction(metrics={}, infeasible=text)] * len(group)
        answer = self.of(group[0]).answer([self.seen(candidate) for candidate in group])
        named = metrics(answer.estimate, self._deployment(group, answer.requests_per_s), self._problem.slos)
        errors = on_gpus(group[0].config.mode) if self.of(group[0]) is self.gpus else ON_CORES
        spreads = {share: _spreads(named, errors, share) for share in {answer.backing(i) for i in range(len(group))}}
        return [_prediction(i, answer, named, spreads[answer.backing(i)]) for i in range(len(group))]

    def _deployment(self, group: list[Candidate], requests_per_s: FloatArray) -> Deployment:
        workload = self._problem.workload
        price = [
            sum(pool.devices * self._problem.node_pool(pool.node_pool).price_per_device_hour for pool in c.config.pools)
            for c in group
        ]
        power = [
            sum(
                pool.devices * (self._problem.node_pool(pool.node_pool).device.power_w or math.nan)
                for pool in c.config.pools
            )
            for c in group
        ]
        return Deployment(
            requests_per_s=requests_per_s,
            rated_power_w=floats(power),
            devices=floats([c.config.devices for c in group]),
            price_per_hour=floats(price),
            isl=np.full(len(group), float(workload.isl.mean)),
            osl=np.full(len(group), float(workload.osl.mean)),
        )


def _spreads(names: Iterable[str], errors: RawErrors, roofline_share: float) -> dict[str, float]:
    return {name: errors.log_stddev(name, roofline_share) for name in names}


def _prediction(index: int, answer: GroupAnswer, named: dict[str, FloatArray], spreads: dict[str, float]) -> Prediction:
    refused = answer.refused[index]
    if refused is not None:
        return Prediction(metrics={}, infeasible=refused)
    values = {name: float(array[index]) for name, array in named.items() if not np.isnan(array[index])}
    return Prediction(
        metrics=values,
        log_stddev=spreads if len(values) == len(spreads) else {name: spreads[name] for name in values},
        breakdown_ms={name: float(a[index]) for name, a in answer.breakdown_ms.items() if not np.isnan(a[index])},
    )
