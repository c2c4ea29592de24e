"""Replicas, columns, predictions of problems and explanations on a system whose tables are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest

from perf_model.batch import step_batch
from perf_model.columns import columns, predict_columns, predict_replica
from perf_model.curves import Origin
from perf_model.explain import Bottleneck, explain
from perf_model.layout import ReplicaLayout
from perf_model.precision import Precision, checkpoint_precision
from perf_model.serving_predictor import ServingPredictor
from perf_model.silicon import ReplicaKey, Silicon
from search_spaces.errors import InvalidValueError
from search_spaces.hardware import Device, DeviceKind, NodePool
from search_spaces.known_models import known_model
from search_spaces.problem import Objective, Problem
from search_spaces.serving import Candidate, Parallelism, Pool, Role, ServingConfig, make_options
from search_spaces.workload import Arrival, Length, Load, Workload
from tests.perf_model.test_costs import MODEL

MODEL_128K = replace(MODEL, max_context=131072)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path / "cache"))


def key(layout: ReplicaLayout | None = None) -> ReplicaKey:
    return ReplicaKey(
        model=MODEL_128K,
        system="test_sxm",
        engine="vllm",
        layout=layout or ReplicaLayout(),
        precision=Precision(),
    )


def test_columns_agree_with_one_row_at_a_time(tables: Path) -> None:
    silicon = Silicon(tables)
    random = np.random.default_rng(0)
    count = 300
    rows = columns(
        tp=random.choice([1, 2, 4], count),
        users=random.integers(1, 200, count),
        isl=random.choice([128, 1000, 5000], count),
        osl=random.choice([16, 300], count),
        token_budget=random.choice([512, 8192], count),
    )
    together = predict_columns(silicon, key(), rows)
    for i in range(0, count, 37):
        one = rows.take(np.array([i]))
        alone = predict_replica(silicon.replica(key(ReplicaLayout(tp=int(rows.tp[i])))), one)
        for name in ("ttft_ms", "tpot_ms", "requests_per_s", "ttft_p99_ms"):
            assert getattr(together, name)[i] == pytest.approx(getattr(alone, name)[0]), name


def test_more_gpus_shorten_times(tables: Path) -> None:
    answers = predict_columns(Silicon(tables), key(), columns(tp=[1, 2, 4], users=32, isl=4000, osl=200))
    assert np.all(np.diff(answers.ttft_ms) < 0)


def test_what_does_not_fit_is_told(tables: Path) -> None:
    answers = predict_columns(Silicon(tables), key(), columns(tp=1, users=1, isl=[1000, 1e9], osl=10))
    assert answers.fits.tolist() == [True, False]
    assert np.isnan(answers.ttft_ms[1])


def test_columns_name_what_is_wrong() -> None:
    with pytest.raises(TypeError, match="isl"):
        columns(tp=1, osl=3)
    with pytest.raises(TypeError, match="colour"):
        columns(tp=1, isl=1, osl=3, colour=2)


def test_formats_follow_the_checkpoint() -> None:
    assert checkpoint_precision(known_model("DeepSeek-V3")).moe == "fp8_block"
    assert checkpoint_precision(known_model("gpt-oss-120b")).moe == "w4a16_mxfp4"
    kimi = checkpoint_precision(known_model("Kimi-K2.5"), cache="fp8")
    assert (kimi.moe, kimi.projections, kimi.cache) == ("int4_wo", "bfloat16", "fp8")
    with pytest.raises(InvalidValueError, match="fp7"):
        Precision(gemm="fp7")


GPU = Device(
    name="TEST-SXM",
    kind=DeviceKind.GPU,
    memory_bytes=80e9,
    memory_bandwidth=1e12,
    flops={"bf16": 1e14},
    link_bandwidth=4e11,
    network_bandwidth=5e10,
)


def problem(device: Device = GPU) -> Problem:
    pool = NodePool(name="gpus", device=device, nodes=2, devices_per_node=8, price_per_hour=16.0)
    return Problem(
        model=MODEL_128K,
        workload=Workload(isl=Length(mean=1000, spread=0.2), osl=Length(mean=200, spread=0.2)),
        node_pools=(pool,),
        objectives=(Objective(metric="ttft_p90_ms"), Objective(metric="output_tokens_per_s_per_gpu")),
    )


def candidate(*roles: Role, users: int = 16, tp: int = 1, **options: float | str | bool) -> Candidate:
    pools = tuple(
        Pool(role=role, node_pool="gpus", parallelism=Parallelism(tp=tp), options=make_options(dict(options)))
        for role in roles
    )
    return Candidate(
        config=ServingConfig(engine="emulated", pools=pools), load=Load(arrival=Arrival.CLOSED, value=users)
    )


def test_problems_on_gpus_are_predicted_from_tables(tables: Path) -> None:
    predictor = ServingPredictor(problem(), tables=tables)
    together, apart, wide = predictor.predict(
        [candidate(Role.MIXED), candidate(Role.PREFILL, Role.DECODE), candidate(Role.MIXED, tp=4)]
    )
    assert together.infeasible is None
    assert apart.metrics["tpot_mean_ms"] < together.metrics["tpot_mean_ms"]
    assert wide.metrics["devices"] == 4
    assert wide.metrics["price_per_hour"] == pytest.approx(8.0)
    assert sum(together.breakdown_ms.values()) > 0
    assert 0.1 < together.log_stddev["tpot_mean_ms"] < 0.3


def test_fewer_sequences_queue(tables: Path) -> None:
    predictor = ServingPredictor(problem(), tables=tables)
    few, many = predictor.predict([candidate(Role.MIXED, users=64, max_num_seqs=n) for n in (4, 64)])
    assert few.metrics["ttft_mean_ms"] > 5 * many.metrics["ttft_mean_ms"]


def test_a_gpu_without_tables_borrows_utilisation_and_is_less_sure(tables: Path) -> None:
    """The same GPU under another name has no tables: the times are the same, the certainty is not."""
    unknown = replace(GPU, name="X900")
    known, guessed = (
        ServingPredictor(problem(device), tables=tables).predict([candidate(Role.MIXED)])[0]
        for device in (GPU, unknown)
    )
    assert guessed.metrics["tpot_mean_ms"] == pytest.approx(known.metrics["tpot_mean_ms"], rel=0.05)
    assert guessed.log_stddev["tpot_mean_ms"] > known.log_stddev["tpot_mean_ms"]


def test_a_faster_gpu_without_tables_is_faster_by_its_speed_of_light(tables: Path) -> None:
    silicon = Silicon(tables)
    slow = silicon.system("test_sxm")
    fast = replace(slow, name="fast", memory_bandwidth=2e12, flops={k: 2 * v for k, v in slow.flops.items()})
    batch = step_batch(prefill_tokens=[4096.0], prefill_seqs=1.0, prompt=[4096.0])
    one = silicon.kernels(key()).breakdown_ms(batch)
    two = silicon.with_system(fast).kernels(replace(key(), system="fast")).breakdown_ms(batch)
    for name in ("qkv projection", "feed-forward down", "prefill attention"):
        assert two[name][0] == pytest.approx(one[name][0] / 2, rel=0.02), name
    assert silicon.kernels(replace(key(), system="fast")).origins(batch)[Origin.ROOFLINE] == pytest.approx(1.0)


def test_without_any_table_the_roofline_answers(tables: Path, tmp_path: Path) -> None:
    backed = ServingPredictor(problem(), tables=tables).predict([candidate(Role.MIXED)])[0]
    bare = ServingPredictor(problem(), tables=tmp_path / "none").predict([candidate(Role.MIXED)])[0]
    assert bare.metrics["tpot_mean_ms"] == pytest.approx(backed.metrics["tpot_mean_ms"], rel=1.0)
    assert bare.log_stddev["tpot_mean_ms"] > backed.log_stddev["tpot_mean_ms"]


def test_too_small_a_gpu_says_what_it_lacks(tables: Path) -> None:
    small = replace(GPU, name="small", memory_bytes=1e7)
    prediction = ServingPredictor(problem(small), tables=tables).predict([candidate(Role.MIXED)])[0]
    assert prediction.infeasible is not None
    assert "weights" in prediction.infeasible


def test_explanations_name_the_bottleneck(tables: Path) -> None:
    replica = Silicon(tables).replica(key())
    crowded = replace(replica, footprint=replace(replica.footprint, memory_share=0.02))
    quiet = explain(replica, columns(tp=1, users=1, isl=1000, osl=200))
    assert sum(quiet.decode_ms.values()) == pytest.approx(quiet.tpot_ms, rel=0.2)
    assert sum(quiet.origins.values()) == pytest.approx(1.0)
    assert quiet.bottleneck in {Bottleneck.MEMORY_BANDWIDTH, Bottleneck.HOST}
    waiting = explain(crowded, columns(tp=1, users=600, isl=1000, osl=200))
    assert waiting.bottleneck is Bottleneck.KV_CAPACITY
    assert "sequences" in waiting.sentence
    busy = explain(replica, columns(tp=1, users=64, isl=8000, osl=2))
    assert busy.bottleneck in {Bottleneck.COMPUTE, Bottleneck.QUEUEING}


def test_pairs_of_any_layouts_agree_with_one_at_a_time(tables: Path) -> None:
    """Closed and open loops, GPUs with and without tables, sizes: pools of one layout are computed together."""
    random = Random(0)
    small = NodePool(name="small", device=replace(GPU, name="X900", memory_bytes=2e9), nodes=4, devices_per_node=4)
    asked = replace(problem(), node_pools=(*problem().node_pools, small))
    candidates = [_any_pair(random) for _ in range(16)]
    together = ServingPredictor(asked, tables=tables).predict(candidates)
    for pair, prediction in zip(candidates, together, strict=True):
        (alone,) = ServingPredictor(asked, tables=tables).predict([pair])
        assert prediction.infeasible == alone.infeasible
        assert prediction.metrics == pytest.approx(alone.metrics, rel=1e-9)
        assert prediction.breakdown_ms == pytest.approx(alone.breakdown_ms, rel=1e-9)
    assert {prediction.infeasible is None for prediction in together} == {True, False}


def _any_pair(random: Random) -> Candidate:
    pools = tuple(
        Pool(
            role=role,
            node_pool=random.choice(["gpus", "small"]),
            replicas=random.choice([1, 2, 3]),
            parallelism=Parallelism(tp=random.choice([1, 2, 4]), pp=random.choice([1, 2])),
            options=make_options(
                {
                    "max_num_seqs": random.choice([4, 32, 256]),
                    "max_num_batched_tokens": random.choice([512, 2048, 65536]),
                    "kv_cache_dtype": random.choice(["auto", "fp8"]),
                    "gpu_memory_utilization": random.choice([0.9, 0.02]),
                }
            ),
        )
        for role in (Role.PREFILL, Role.DECODE)
    )
    arrival = random.choice([Arrival.POISSON, Arrival.CLOSED, Arrival.CLOSED])
    load = Load(arrival=arrival, value=random.choice([1, 30, 200]))
    return Candidate(config=ServingConfig(engine="emulated", pools=pools), load=load)
