"""vLLM on cores is predicted from the roofline of a core; the same engine on GPUs is not concerned."""

from __future__ import annotations

import pytest

from perf_model.accounts import account
from perf_model.serving_predictor import ServingPredictor
from search_spaces.hardware import Device, DeviceKind, NodePool
from search_spaces.known_gpus import known_gpu
from search_spaces.model_presets import TINY_MODEL
from search_spaces.problem import Objective, Problem
from search_spaces.serving import Candidate, Mode
from search_spaces.space import Space, build_space
from search_spaces.workload import Length, Workload

CORE = Device(
    name="core",
    kind=DeviceKind.CPU,
    memory_bytes=6e9,
    memory_bandwidth=1e10,
    flops={"fp32": 1e11},
    link_bandwidth=1e9,
    network_bandwidth=1e9,
)


def problem(device: Device) -> Problem:
    return Problem(
        model=TINY_MODEL,
        workload=Workload(isl=Length(mean=300), osl=Length(mean=32)),
        node_pools=(NodePool(name="pool", device=device, nodes=1, devices_per_node=4),),
        objectives=(Objective(metric="output_tokens_per_s"), Objective(metric="ttft_p50_ms")),
    )


def space(device: Device, **options: tuple[object, ...]) -> Space:
    fixed = {"max_num_seqs": (8,), "max_num_batched_tokens": (2048,), "enable_chunked_prefill": (True,)}
    return build_space(problem(device), engines={"vllm": {**fixed, **options}}, loads=(1.0, 4.0))  # type: ignore[dict-item]  # option values


def of(where: Space, mode: Mode) -> Candidate:
    return where.default(mode)


@pytest.mark.parametrize("mode", list(Mode))
def test_both_modes_are_predicted_and_accounted_for_on_cores(mode: Mode) -> None:
    asked = space(CORE)
    model = ServingPredictor(asked.problem)
    candidate = of(asked, mode)
    (prediction,) = model.predict([candidate])
    assert prediction.infeasible is None
    assert 5 < prediction.metrics["tpot_p50_ms"] < 60
    assert prediction.metrics["ttft_p50_ms"] > 50
    found = account(model, asked.problem, candidate)
    assert [role.role for role in found.roles] == [pool.role for pool in candidate.config.pools]


def test_more_cores_of_a_rank_and_more_users_tell() -> None:
    asked = space(CORE, threads=(1, 4))
    model = ServingPredictor(asked.problem)
    one, four = (asked.decode({"mode": "aggregated", "mixed.threads": n, "concurrency": 4.0}) for n in (1, 4))
    slow, fast = model.predict([one, four])
    assert fast.metrics["ttft_p50_ms"] < slow.metrics["ttft_p50_ms"]
    assert four.config.devices == 4
    alone, together = model.predict([asked.decode({"mode": "aggregated", "concurrency": n}) for n in (1.0, 4.0)])
    assert together.metrics["tpot_p50_ms"] > alone.metrics["tpot_p50_ms"]
    assert together.metrics["output_tokens_per_s"] > alone.metrics["output_tokens_per_s"]


def test_on_gpus_cores_have_no_part_in_it() -> None:
    asked = space(known_gpu("h100_sxm"))
    candidate = of(asked, Mode.AGGREGATED)
    assert "threads" not in dict(candidate.config.pools[0].options)
    assert candidate.config.pools[0].devices_per_rank == 1
    assert "gpu_memory_utilization" not in dict(of(space(CORE), Mode.AGGREGATED).config.pools[0].options)
    (prediction,) = ServingPredictor(asked.problem).predict([candidate])
    assert prediction.metrics["tpot_p50_ms"] < 5


def test_a_connector_through_files_keeps_prompts_whole() -> None:
    asked = space(CORE, kv_connector=("NixlConnector", "ExampleConnector"))
    chosen = asked.decode({"mode": "disaggregated", "prefill.kv_connector": "ExampleConnector"})
    for pool in chosen.config.pools:
        assert pool.option("kv_connector") == "ExampleConnector"
        assert pool.option("enable_chunked_prefill") is False
    assert asked.decode(asked.encode(chosen)) == chosen
