"""The embedded engine's predictions: laws that any configuration must obey, and limits known in closed form."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from perf_model.engine_traits import engine_traits
from perf_model.serving_predictor import ServingPredictor
from search_spaces.hardware import Device, DeviceKind, NodePool
from search_spaces.metrics import METRICS, POWER_METRICS
from search_spaces.model import Attention, DenseFeedForward, LayerGroup, ModelSpec
from search_spaces.outcome import Prediction
from search_spaces.problem import Objective, Problem, Slo
from search_spaces.serving import Candidate, Pool, Role, ServingConfig, make_options
from search_spaces.workload import Arrival, Length, Load, Workload

CORE = Device(
    name="core",
    kind=DeviceKind.CPU,
    memory_bytes=4e9,
    memory_bandwidth=13e9,
    flops={"fp32": 107e9},
    link_bandwidth=7.5e8,
    network_bandwidth=1e9,
)
MODEL = ModelSpec(
    name="tiny",
    hidden_size=512,
    vocab_size=4096,
    layers=(
        LayerGroup(
            count=8,
            attention=Attention(heads=8, kv_heads=4, head_dim=64),
            feed_forward=DenseFeedForward(intermediate_size=1408),
        ),
    ),
)


def problem(isl: int = 128, osl: int = 32, slos: tuple[Slo, ...] = (), price: float = 1.0) -> Problem:
    return Problem(
        model=MODEL,
        workload=Workload(isl=Length(mean=isl), osl=Length(mean=osl)),
        node_pools=(NodePool(name="cpu", device=CORE, nodes=1, devices_per_node=4, price_per_hour=price),),
        objectives=(Objective(metric="ttft_p90_ms"), Objective(metric="output_tokens_per_s")),
        slos=slos,
    )


def mixed(load: float, *, replicas: int = 1, arrival: Arrival = Arrival.CLOSED, **options: int | str) -> Candidate:
    pool = Pool(role=Role.MIXED, node_pool="cpu", replicas=replicas, options=make_options(dict(options)))
    return Candidate(config=ServingConfig(engine="llamacpp", pools=(pool,)), load=Load(arrival=arrival, value=load))


def pair(load: float, prefill: int = 1, decode: int = 1, arrival: Arrival = Arrival.CLOSED) -> Candidate:
    pools = (
        Pool(role=Role.PREFILL, node_pool="cpu", replicas=prefill),
        Pool(role=Role.DECODE, node_pool="cpu", replicas=decode),
    )
    return Candidate(config=ServingConfig(engine="llamacpp", pools=pools), load=Load(arrival=arrival, value=load))


def one(candidate: Candidate, **settings: object) -> Prediction:
    return ServingPredictor(problem(**settings)).predict([candidate])[0]  # type: ignore[arg-type]  # test shorthand


def test_every_metric_is_predicted_and_finite() -> None:
    prediction = one(mixed(4))
    assert set(prediction.metrics) == set(METRICS) - set(POWER_METRICS), "cores report no power"
    assert all(value == value and abs(value) < 1e12 for value in prediction.metrics.values())  # noqa: PLR0124 - NaN


def test_figures_per_dollar_are_absent_without_a_price() -> None:
    assert "output_tokens_per_dollar" not in one(mixed(4), price=0.0).metrics


@pytest.mark.parametrize("candidate", [mixed(1), mixed(3), mixed(16), pair(1), pair(8), pair(64, 2, 2)])
def test_closed_loop_obeys_littles_law(candidate: Candidate) -> None:
    metrics = one(candidate).metrics
    users = candidate.load.concurrency
    assert metrics["requests_per_s"] * metrics["e2e_mean_ms"] / 1e3 == pytest.approx(users, rel=0.08)


def test_a_lone_user_waits_for_nobody() -> None:
    metrics = one(mixed(1)).metrics
    assert metrics["ttft_p99_ms"] == pytest.approx(metrics["ttft_p50_ms"])
    flop = 2 * 128 * 8 * (512 * 64 * (2 * 8 + 2 * 4) + 3 * 512 * 1408)
    assert metrics["ttft_mean_ms"] > 1e3 * flop / 107e9


def test_latency_rises_with_load_and_throughput_does_not_fall() -> None:
    rows = [one(mixed(users, max_num_seqs=16)).metrics for users in (1, 2, 4, 8, 16, 32)]
    for metric in ("ttft_mean_ms", "e2e_mean_ms", "ttft_p99_ms"):
        assert all(a[metric] <= b[metric] for a, b in pairwise(rows)), metric
    assert all(b["requests_per_s"] >= 0.95 * a["requests_per_s"] for a, b in pairwise(rows))


def test_users_beyond_the_slots_queue_without_changing_throughput() -> None:
    full, over = one(mixed(4, max_num_seqs=4)).metrics, one(mixed(12, max_num_seqs=4)).metrics
    assert over["requests_per_s"] == pytest.approx(full["requests_per_s"], rel=0.01)
    assert over["e2e_mean_ms"] == pytest.approx(3 * full["e2e_mean_ms"], rel=0.05)


def test_two_replicas_serve_twice_the_users() -> None:
    single, double = one(mixed(4)).metrics, one(mixed(8, replicas=2)).metrics
    assert double["requests_per_s"] == pytest.approx(2 * single["requests_per_s"], rel=0.02)
    call_ms = engine_traits("llamacpp").request_ms  # the router's, which a single replica does without
    assert double["ttft_mean_ms"] == pytest.approx(single["ttft_mean_ms"] + call_ms)


@pytest.mark.parametrize("candidate", [mixed(0.5, arrival=Arrival.POISSON), pair(0.5, arrival=Arrival.POISSON)])
def test_open_loop_serves_what_arrives(candidate: Candidate) -> None:
    assert one(candidate).metrics["requests_per_s"] == pytest.approx(0.5)


@pytest.mark.parametrize("make", [mixed, pair])
def test_an_overloaded_open_loop_serves_its_capacity_and_queues(make: object) -> None:
    calm = one(make(0.5, arrival=Arrival.POISSON)).metrics  # type: ignore[operator]  # mixed or pair
    storm = one(make(500.0, arrival=Arrival.POISSON)).metrics  # type: ignore[operator]  # mixed or pair
    assert storm["requests_per_s"] < 50
    assert storm["ttft_mean_ms"] > 5 * calm["ttft_mean_ms"]


def test_disaggregation_frees_decode_from_prefill() -> None:
    together, apart = one(mixed(8, max_num_seqs=8), isl=512).metrics, one(pair(8), isl=512).metrics
    assert apart["tpot_mean_ms"] < together["tpot_mean_ms"]
    assert apart["itl_p99_ms"] < together["itl_p99_ms"]


def test_too_large_a_cache_does_not_fit_and_says_why() -> None:
    small = replace(CORE, memory_bytes=3e8)
    settings = problem(isl=3000)
    tight = replace(settings, node_pools=(replace(settings.node_pools[0], device=small),))
    few, many = ServingPredictor(tight).predict([mixed(1, max_num_seqs=1), mixed(1, max_num_seqs=32)])
    assert few.infeasible is None
    assert many.infeasible is not None
    assert "KV cache" in many.infeasible
    assert not many.metrics


def test_a_context_that_the_model_cannot_hold_is_infeasible() -> None:
    reason = one(mixed(1), isl=5000).infeasible
    assert reason is not None
    assert "4096" in reason


def test_goodput_counts_only_requests_within_every_slo() -> None:
    free = one(mixed(8, max_num_seqs=8)).metrics
    median = free["ttft_p50_ms"]
    held = one(mixed(8, max_num_seqs=8), slos=(Slo(metric="ttft_p99_ms", threshold=median),)).metrics
    assert free["goodput_rps"] == pytest.approx(free["requests_per_s"])
    assert held["goodput_rps"] == pytest.approx(0.5 * held["requests_per_s"], rel=0.02)


def test_many_candidates_agree_with_one_at_a_time() -> None:
    candidates = [mixed(u, max_num_seqs=s) for u in (1, 5, 9) for s in (2, 8)] + [pair(u) for u in (1, 6)]
    candidates += [mixed(u, arrival=Arrival.POISSON) for u in (0.1, 3.0)]
    together = ServingPredictor(problem()).predict(candidates)
    alone = [one(candidate) for candidate in candidates]
    for a, b in zip(together, alone, strict=True):
        assert a.metrics == pytest.approx(b.metrics)
