"""The deployments that a plan may use: those that a study measured and, where asked for, those that it predicts.

How replicas scale is read from the study where it can be: of two measured configurations that differ in nothing but k
times the replicas of every pool under k times the load, the rate of the larger over k times that of the smaller.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from search_spaces.serving import Candidate, ServingConfig
from search_spaces.slos import Slo, feasible
from search_spaces.workload import Load
from studies.records import TrialRecord
from tuner.plan import Unit
from tuner.score import Measured, measured_configurations

LEAST_EFFICIENCY = 0.1


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Share of linear scaling that `pairs` pairs of measured configurations show, 1 at most; 1 without a pair."""

    efficiency: float
    pairs: int


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A unit of the plan and the candidate that it stands for; `runs` counts its measurements, 0 of a prediction."""

    unit: Unit
    candidate: Candidate
    runs: int
    emulated: bool = False


def measured_offers(trials: Sequence[TrialRecord], slos: Sequence[Slo]) -> tuple[Offer, ...]:
    """The measured configurations of `trials` that meet `slos`, each under the load that it was measured with."""
    return tuple(
        Offer(
            unit=_unit(str(each.trial.number), each.trial.candidate, each.metrics, predicted=False),
            candidate=each.trial.candidate,
            runs=each.runs,
            emulated=bool(each.trial.measurement and each.trial.measurement.emulated),
        )
        for each in measured_configurations(trials)
        if each.trial.candidate is not None
        and each.metrics.get("requests_per_s", 0.0) > 0
        and meets(each.metrics, slos)
    )


def meets(metrics: Mapping[str, float], slos: Sequence[Slo]) -> bool:
    """True where `metrics` has every figure that an SLO is about, and no hard one is missed."""
    return all(slo.metric in metrics for slo in slos) and feasible(slos, metrics)


def predicted_offers(
    predictions: Sequence[tuple[Candidate, Mapping[str, float]]], slos: Sequence[Slo]
) -> tuple[Offer, ...]:
    """The predicted configurations that meet `slos`."""
    return tuple(
        Offer(unit=_unit(f"predicted-{index}", candidate, metrics, predicted=True), candidate=candidate, runs=0)
        for index, (candidate, metrics) in enumerate(predictions)
        if metrics.get("requests_per_s", 0.0) > 0 and meets(metrics, slos)
    )


def _unit(name: str, candidate: Candidate, metrics: Mapping[str, float], *, predicted: bool) -> Unit:
    sizes: dict[str, tuple[int, ...]] = {}
    for pool in candidate.config.pools:
        sizes[pool.node_pool] = sizes.get(pool.node_pool, ()) + (pool.devices_per_replica,) * pool.replicas
    return Unit(
        name=name,
        rate=metrics["requests_per_s"],
        users=in_flight(candidate.load, metrics),
        sizes=sizes,
        metrics=metrics,
        predicted=predicted,
    )


def in_flight(load: Load, metrics: Mapping[str, float]) -> float:
    """Requests in flight: those of a closed loop; rate times mean end-to-end time of an open one (Little's law)."""
    if load.concurrency is not None:
        return float(load.concurrency)
    return metrics["requests_per_s"] * metrics["e2e_mean_ms"] / 1000.0


def scaling(trials: Sequence[TrialRecord]) -> Scaling:
    """How replicas scale in the measured `trials`."""
    found = [each for each in measured_configurations(trials) if each.trial.candidate is not None]
    by_shape: dict[tuple[str, str], list[tuple[int, Measured]]] = {}
    for each in found:
        candidate = each.trial.candidate
        if candidate is not None:
            times, shape = _reduced(candidate)
            by_shape.setdefault((shape.key, candidate.load.arrival), []).append((times, each))
    ratios = [
        larger.metrics["requests_per_s"] / (times / least * smaller.metrics["requests_per_s"])
        for members in by_shape.values()
        for least, smaller in members
        for times, larger in members
        if times > least and smaller.metrics["requests_per_s"] > 0
    ]
    if not ratios:
        return Scaling(efficiency=1.0, pairs=0)
    return Scaling(efficiency=min(1.0, max(LEAST_EFFICIENCY, statistics.median(ratios))), pairs=len(ratios))


def _reduced(candidate: Candidate) -> tuple[int, Candidate]:
    """How many times over `candidate` is its smallest whole part, and that part: fewest replicas, and its load."""
    config = candidate.config
    times = math.gcd(*(pool.replicas for pool in config.pools))
    pools = tuple(replace(pool, replicas=pool.replicas // times) for pool in config.pools)
    value = candidate.load.value / times
    if candidate.load.concurrency is not None and not float(value).is_integer():
        return 1, candidate
    load = Load(arrival=candidate.load.arrival, value=value)
    return times, Candidate(config=ServingConfig(engine=config.engine, pools=pools), load=load)


def nearest_miss(trials: Sequence[TrialRecord], slos: Sequence[Slo]) -> tuple[TrialRecord, dict[str, float]] | None:
    """The measured configuration that misses `slos` by least in sum, with the violation of each that it misses."""
    best: tuple[float, TrialRecord, dict[str, float]] | None = None
    for each in measured_configurations(trials):
        missed = {
            slo.metric: slo.excess(each.metrics[slo.metric])
            for slo in slos
            if slo.metric in each.metrics and slo.excess(each.metrics[slo.metric]) > 0
        }
        total = sum(missed.values())
        if best is None or total < best[0]:
            best = (total, each.trial, missed)
    return (best[1], best[2]) if best else None
