"""Profiles and predictions of emulated replicas, and study files that ask for them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from perf_model.batch import step_batch
from perf_model.serving_predictor import NO_TABLES, ServingPredictor
from perf_model.tables import default_root
from search_spaces.emulation import Chunk, FaultKind
from search_spaces.errors import InvalidValueError
from search_spaces.hardware import NodePool
from search_spaces.known_gpus import GPUS, known_gpu
from search_spaces.known_models import known_model
from search_spaces.problem import Objective, Problem
from search_spaces.rules import infeasibility
from search_spaces.serving import Candidate, Mode, Parallelism, Pool, Role, ServingConfig, make_options
from search_spaces.workload import Arrival, Length, Load, Workload
from tests.support.ray_problem import POOL
from tuner.emulation import Profiles, step_times
from tuner.study_errors import StudyFileError
from tuner.study_file import load_study_file, parse_study
from tuner.wiring import emulated_backend, make_problem, make_space

EXAMPLE = Path(__file__).parents[2] / "examples" / "emulated-70b.yaml"
BY_LIGHT = Profiles(None)
"""Without operation tables, whether or not some are installed here."""

PROBLEM = Problem(
    model=known_model("Llama-3.1-70B"),
    workload=Workload(isl=Length(mean=1024, spread=0.25), osl=Length(mean=128, spread=0.25)),
    node_pools=tuple(
        NodePool(name=name, device=device, nodes=2, devices_per_node=8, price_per_hour=20.0)
        for name, device in GPUS.items()
    ),
    objectives=(Objective(metric="ttft_p50_ms"), Objective(metric="output_tokens_per_dollar")),
)


def pool(role: Role = Role.MIXED, gpu: str = "h100_sxm", tp: int = 4, replicas: int = 1, **options: object) -> Pool:
    return Pool(
        role=role,
        node_pool=gpu,
        replicas=replicas,
        parallelism=Parallelism(tp=tp),
        options=make_options(options),  # type: ignore[arg-type]  # values of options
    )


def config(*pools: Pool) -> ServingConfig:
    return ServingConfig(engine="emulated", pools=pools)


def decode_ms(gpu: str, tp: int) -> float:
    profile = BY_LIGHT(config(pool(gpu=gpu, tp=tp)), PROBLEM)[Role.MIXED]
    return profile.times.step_ms([], 8, 1000.0)


def test_a_decode_step_reads_the_weights_at_the_gpus_bandwidth() -> None:
    """70.6e9 weights of 2 bytes on 4 GPUs of 3.35 TB/s take 10.5 ms at the speed of light, and not 2.2 times that."""
    light_ms = 2 * 70.6e9 / 4 / 3.35e12 * 1e3
    assert light_ms < decode_ms("h100_sxm", 4) < 2.2 * light_ms
    assert decode_ms("h200_sxm", 4) < decode_ms("h100_sxm", 4) < decode_ms("a100_sxm", 4)
    assert decode_ms("h100_sxm", 8) < decode_ms("h100_sxm", 4)


def test_a_prompt_takes_what_its_products_take() -> None:
    """2 * 70.6e9 FLOP a token on 4 GPUs of 989 TFLOP/s: 36.5 ms for 1,024 tokens at the speed of light."""
    profile = BY_LIGHT(config(pool()), PROBLEM)[Role.MIXED]
    light_ms = 2 * 70.6e9 * 1024 / 4 / 989e12 * 1e3
    assert light_ms < profile.times.step_ms([Chunk(tokens=1024)], 0, 0.0) < 3.0 * light_ms


def test_the_table_gives_back_the_model_between_its_points() -> None:
    replica = BY_LIGHT.replica(pool(), PROBLEM)
    times = step_times(replica, budget=2048, seqs=64, context=2048)
    for prompt, seqs, context in ((0, 3, 700.0), (0, 50, 1500.0), (300, 0, 0.0), (1500, 40, 900.0), (90, 7, 100.0)):
        batch = step_batch(
            prefill_tokens=float(prompt),
            prefill_seqs=float(prompt > 0),
            prompt=float(prompt),
            decode_seqs=np.array([float(seqs)]),
            decode_context=context,
        )
        chunks = [Chunk(tokens=prompt)] if prompt else []
        assert times.step_ms(chunks, seqs, context) == pytest.approx(float(replica.steps.step_ms(batch)[0]), rel=0.05)


def test_a_chunk_late_in_a_prompt_is_what_the_model_says() -> None:
    replica = BY_LIGHT.replica(pool(), PROBLEM)
    times = step_times(replica, budget=2048, seqs=64, context=16384)
    batch = step_batch(prefill_tokens=2048.0, prefill_seqs=1.0, prompt=10240.0, cached=np.array([8192.0]))
    expected = float(replica.steps.step_ms(batch)[0])
    assert times.step_ms([Chunk(tokens=2048, start=8192)], 0, 0.0) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("gpu", "tp", "fits"), [("h100_sxm", 1, False), ("h100_sxm", 4, True), ("h200_sxm", 2, True)])
def test_memory_decides_what_starts(gpu: str, tp: int, fits: bool) -> None:
    memory = BY_LIGHT.memory(pool(gpu=gpu, tp=tp), PROBLEM)
    assert (memory.kv_tokens(0.9) >= PROBLEM.workload.longest_context) is fits
    assert memory.weight_bytes == pytest.approx(2 * 70.6e9 / tp, rel=0.03)


def test_an_fp8_cache_holds_twice_as_much() -> None:
    plain, halved = (BY_LIGHT.memory(pool(kv_cache_dtype=t), PROBLEM).kv_bytes_per_token for t in ("auto", "fp8"))
    assert plain == pytest.approx(2 * halved)
    assert plain == pytest.approx(80 * 2 * 8 * 128 * 2 / 4)


def test_a_hand_over_goes_at_the_pace_of_the_slower_network() -> None:
    apart = config(pool(Role.PREFILL, "h200_sxm", tp=2), pool(Role.DECODE, "a100_sxm", tp=4))
    for role in (Role.PREFILL, Role.DECODE):
        hand_over = BY_LIGHT(apart, PROBLEM)[role].hand_over
        assert hand_over is not None
        assert hand_over.bytes_per_token == pytest.approx(80 * 2 * 8 * 128 * 2)
        assert hand_over.bandwidth == pytest.approx(2 * 25e9)
    near = config(pool(Role.PREFILL, "h200_sxm", tp=2), pool(Role.DECODE, "h200_sxm", tp=2))
    inside = BY_LIGHT(near, PROBLEM)[Role.DECODE].hand_over
    assert inside is not None
    assert inside.bandwidth == pytest.approx(2 * 450e9)
    assert BY_LIGHT(config(pool()), PROBLEM)[Role.MIXED].hand_over is None


def test_profiles_say_where_their_times_come_from_and_are_json() -> None:
    profile = BY_LIGHT(config(pool()), PROBLEM)[Role.MIXED]
    assert "speed of light" in profile.origin
    assert json.loads(json.dumps(asdict(profile)))["gpu"] == "h100_sxm"


def test_installed_tables_are_used_where_there_are_some() -> None:
    pytest.importorskip("aiconfigurator_core", reason="the extra [silicon] is not installed")
    for gpu in ("h100_sxm", "h200_sxm", "a100_sxm"):
        profile = Profiles(default_root())(config(pool(gpu=gpu)), PROBLEM)[Role.MIXED]
        assert "operation tables" in profile.origin
        assert 5.0 < profile.times.step_ms([], 8, 1000.0) < 80.0


def test_cpus_are_not_emulated() -> None:
    problem = replace(PROBLEM, node_pools=(POOL,))
    with pytest.raises(InvalidValueError, match="stands for GPUs"):
        BY_LIGHT(config(Pool(role=Role.MIXED, node_pool=POOL.name)), problem)


def test_gpus_by_name() -> None:
    with pytest.raises(InvalidValueError, match="did you mean h100_sxm"):
        known_gpu("h100_sxn")


def predict(candidate_config: ServingConfig, concurrency: float) -> dict[str, float]:
    candidate = Candidate(config=candidate_config, load=Load(arrival=Arrival.CLOSED, value=concurrency))
    (found,) = ServingPredictor(PROBLEM, tables=NO_TABLES).predict([candidate])
    assert found.infeasible is None, found.infeasible
    return dict(found.metrics)


def test_more_users_get_more_done_more_slowly() -> None:
    few, many = predict(config(pool()), 2), predict(config(pool()), 32)
    assert many["output_tokens_per_s"] > 2 * few["output_tokens_per_s"]
    assert many["tpot_p50_ms"] > few["tpot_p50_ms"]


def test_prefill_and_decode_on_different_gpu_types_are_predicted_by_their_own_times() -> None:
    fast = predict(config(pool(Role.PREFILL, "h200_sxm"), pool(Role.DECODE, "a100_sxm")), 4)
    slow = predict(config(pool(Role.PREFILL, "a100_sxm"), pool(Role.DECODE, "h200_sxm")), 4)
    assert fast["ttft_p50_ms"] < slow["ttft_p50_ms"]
    assert fast["tpot_p50_ms"] > slow["tpot_p50_ms"]


def test_what_does_not_fit_is_predicted_infeasible_with_the_figures() -> None:
    candidate = Candidate(config=config(pool(tp=1)), load=Load(arrival=Arrival.CLOSED, value=4))
    (found,) = ServingPredictor(PROBLEM, tables=NO_TABLES).predict([candidate])
    assert found.infeasible is not None
    assert "out of memory" in found.infeasible
    assert found.metrics == {}


def test_predictions_come_in_the_order_asked() -> None:
    asked = [
        Candidate(config=config(pool(gpu=gpu, tp=tp)), load=Load(arrival=Arrival.CLOSED, value=load))
        for gpu in ("h100_sxm", "a100_sxm")
        for tp in (4, 8)
        for load in (1, 16)
    ]
    predictor = ServingPredictor(PROBLEM, tables=NO_TABLES)
    together = predictor.predict(asked)
    for candidate, found in zip(asked, together, strict=True):
        assert predictor.predict([candidate])[0].metrics == pytest.approx(dict(found.metrics))


def test_the_example_is_a_study_of_three_gpu_types() -> None:
    study = load_study_file(EXAMPLE)
    problem = make_problem(study)
    space = make_space(study, problem)
    assert {node_pool.device.name for node_pool in problem.node_pools} == {"h200_sxm", "h100_sxm", "a100_sxm"}
    assert problem.model.parameters == pytest.approx(70.6e9, rel=0.01)
    for mode in Mode:
        assert infeasibility(space.default(mode), problem) is None
    backend = emulated_backend(study, problem)
    assert backend.plan.shares == {FaultKind.OUT_OF_MEMORY_UNDER_LOAD: 0.03}


BAD = {
    "unknown gpu": ("node_pools.h200.device=h200_xsm", "'h200_xsm' is no known device"),
    "unknown model": ("model.name=Llama-3.1-7B", "not in the catalogue"),
    "unknown fault": ("emulation.faults={meltdown: 0.1}", "fault 'meltdown' is unknown"),
    "share above 1": ("emulation.faults={garbage: 3}", "emulation.faults.garbage"),
    "cpu": ("node_pools.a100={device: cpu, cpus_per_node: 2, price_per_hour: 1}", "cpu is never emulated"),
    "real engine beside it": ("engines=[emulated, llamacpp]", "not compared with a real one"),
}


@pytest.mark.parametrize(("override", "said"), list(BAD.values()), ids=list(BAD))
def test_study_files_that_cannot_be_emulated(override: str, said: str) -> None:
    with pytest.raises(StudyFileError, match=said):
        parse_study(EXAMPLE.read_text(encoding="utf-8"), [override])


def test_emulation_is_for_the_emulated_engine() -> None:
    text = "name: x\nworkload: {isl: 8, osl: 8, concurrency: 1}\nobjectives: [ttft_p50_ms, tpot_p50_ms]\n"
    text += "engines: [llamacpp]\n"
    pools = "node_pools: {local: {cpus_per_node: 2}}\n"
    with pytest.raises(StudyFileError, match="goes with the engine emulated"):
        parse_study(text + pools + "emulation: {}\n")
    with pytest.raises(StudyFileError, match="runs on cpu here"):
        parse_study(text + "node_pools: {gpus: {device: h100_sxm, gpus_per_node: 8}}\n")
