"""Commands of a dozen and more deployments for each engine, word for word as they were reviewed.

`golden/ENGINE/CASE.json` holds what each replica is started with, and what it was reviewed against: every page named
there was read for it (stored copies of November 2026), and vLLM's own parser took its commands. After a change that is
meant: `UPDATE_GOLDEN=1 pytest tests/cluster/engines/test_golden_commands.py`, and review the difference.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from search_spaces.serving import Role
from search_spaces.workload import Length, Workload
from tests.support.apart import Case, commands, over_two_nodes, pair, pool, whole

GOLDEN = Path(__file__).parent / "golden"

_VLLM = "https://docs.vllm.ai/en/v0.32.0/"
_VLLM_ARGS = "vllm serve --help=all, vLLM 0.32.0"
_SGLANG = "https://docs.sglang.io/docs/advanced_features/"
_SGLANG_ARGS = f"{_SGLANG}server_arguments"
_TRTLLM = "https://nvidia.github.io/TensorRT-LLM/"
_TRTLLM_ARGS = "https://github.com/NVIDIA/TensorRT-LLM/blob/main/tensorrt_llm/commands/serve.py"
_TRTLLM_KEYS = "https://github.com/NVIDIA/TensorRT-LLM/blob/main/tensorrt_llm/llmapi/llm_args.py"
SHORT = Workload(isl=Length(mean=300), osl=Length(mean=32))

VLLM: dict[str, Case] = {
    "aggregated": Case(whole(pool()), (_VLLM_ARGS,)),
    "tensor-parallel": Case(whole(pool(sizes={"tp": 8}, max_num_seqs=256)), (_VLLM_ARGS,)),
    "pipeline-parallel": Case(
        whole(pool(sizes={"tp": 2, "pp": 2})), (f"{_VLLM}serving/parallelism_scaling.html", _VLLM_ARGS)
    ),
    "two-nodes": Case(
        over_two_nodes(pool(sizes={"tp": 8, "pp": 2})), (f"{_VLLM}serving/parallelism_scaling.html", _VLLM_ARGS)
    ),
    "expert-parallel": Case(
        whole(pool(sizes={"tp": 8, "ep": 8})), (f"{_VLLM}serving/expert_parallel_deployment.html",)
    ),
    "data-and-expert-parallel": Case(
        whole(pool(sizes={"dp": 8, "ep": 8}, all2all_backend="deepep_low_latency")),
        (f"{_VLLM}serving/expert_parallel_deployment.html",),
    ),
    "data-parallel-two-nodes": Case(
        over_two_nodes(pool(sizes={"dp": 16, "ep": 16})), (f"{_VLLM}serving/data_parallel_deployment.html",)
    ),
    "fp8-kv-cache": Case(whole(pool(kv_cache_dtype="fp8")), (_VLLM_ARGS,)),
    "fp8-weights": Case(whole(pool(quantization="fp8")), (_VLLM_ARGS,)),
    "speculation-ngram": Case(whole(pool(speculative_method="ngram", speculative_tokens=4)), (_VLLM_ARGS,)),
    "speculation-eagle3": Case(
        whole(pool(speculative_method="eagle3", speculative_tokens=3, sizes={"tp": 2})),
        (_VLLM_ARGS,),
    ),
    "kernels-and-policy": Case(
        whole(
            pool(
                enforce_eager=True,
                attention_backend="FLASHINFER",
                block_size=32,
                scheduling_policy="priority",
                enable_prefix_caching=False,
                enable_chunked_prefill=False,
                gpu_memory_utilization=0.85,
                dtype="bfloat16",
            )
        ),
        (_VLLM_ARGS,),
    ),
    "disaggregated-nixl": Case(
        pair({"tp": 2}, {"tp": 4}, kv_transport="rdma"),
        (f"{_VLLM}features/nixl_connector_usage.html", _VLLM_ARGS),
    ),
    "disaggregated-speculation": Case(
        pair({"tp": 1}, {"tp": 1}, speculative_method="mtp", speculative_tokens=1),
        (f"{_VLLM}features/nixl_connector_usage.html", _VLLM_ARGS),
    ),
    "disaggregated-cores-files": Case(
        pair(
            {},
            {},
            on="cores",
            threads=2,
            kv_connector="ExampleConnector",
            enable_chunked_prefill=False,
            cpu_kv_cache_gib=1,
            dtype="float32",
            workload=SHORT,
        ),
        (_VLLM_ARGS, "launched for real: tests/vllm"),
    ),
}

SGLANG: dict[str, Case] = {
    "aggregated": Case(whole(pool()), (_SGLANG_ARGS,)),
    "tensor-parallel": Case(whole(pool(sizes={"tp": 8}, max_running_requests=256)), (_SGLANG_ARGS,)),
    "pipeline-parallel": Case(whole(pool(sizes={"tp": 2, "pp": 2})), (_SGLANG_ARGS,)),
    "two-nodes": Case(over_two_nodes(pool(sizes={"tp": 16})), (_SGLANG_ARGS,)),
    "expert-parallel": Case(
        whole(pool(sizes={"tp": 8, "ep": 8}, moe_a2a_backend="deepep")), (f"{_SGLANG}expert_parallelism",)
    ),
    "attention-data-parallel": Case(
        whole(pool(sizes={"dp": 8, "ep": 8}, moe_a2a_backend="deepep")),
        (f"{_SGLANG}expert_parallelism", _SGLANG_ARGS),
    ),
    "attention-data-parallel-two-nodes": Case(
        over_two_nodes(pool(sizes={"tp": 2, "dp": 8})), (f"{_SGLANG}pd_disaggregation",)
    ),
    "fp8-kv-cache": Case(whole(pool(kv_cache_dtype="fp8_e4m3")), (f"{_SGLANG}quantized_kv_cache", _SGLANG_ARGS)),
    "fp8-weights": Case(whole(pool(quantization="fp8")), (_SGLANG_ARGS,)),
    "speculation-ngram": Case(
        whole(pool(speculative_algorithm="NGRAM", speculative_num_steps=3)),
        (f"{_SGLANG}speculative_decoding", _SGLANG_ARGS),
    ),
    "speculation-eagle3": Case(
        whole(pool(speculative_algorithm="EAGLE3", speculative_num_steps=3, sizes={"tp": 2})),
        (f"{_SGLANG}speculative_decoding", _SGLANG_ARGS),
    ),
    "kernels-and-policy": Case(
        whole(
            pool(
                disable_cuda_graph=True,
                attention_backend="fa3",
                page_size=64,
                schedule_policy="lpm",
                chunked_prefill_size=4096,
                mem_fraction_static=0.8,
            )
        ),
        (_SGLANG_ARGS,),
    ),
    "disaggregated-mooncake": Case(pair({"tp": 2}, {"tp": 4}, kv_transport="rdma"), (f"{_SGLANG}pd_disaggregation",)),
    "disaggregated-nixl-tcp": Case(
        pair({"tp": 1}, {"tp": 1}, transfer_backend="nixl", kv_transport="tcp", disable_radix_cache=True),
        (f"{_SGLANG}pd_disaggregation",),
    ),
}

TRTLLM: dict[str, Case] = {
    "aggregated": Case(whole(pool()), (_TRTLLM_ARGS,)),
    "tensor-parallel": Case(whole(pool(sizes={"tp": 8}, max_batch_size=256)), (_TRTLLM_ARGS,)),
    "pipeline-parallel": Case(
        whole(pool(sizes={"tp": 2, "pp": 2})), (_TRTLLM_ARGS, f"{_TRTLLM}features/parallel-strategy.html")
    ),
    "expert-parallel": Case(
        whole(pool(sizes={"tp": 8, "ep": 8}, moe_backend="DEEPGEMM")),
        (f"{_TRTLLM}features/parallel-strategy.html", _TRTLLM_KEYS),
    ),
    "attention-data-parallel": Case(
        whole(pool(sizes={"dp": 8, "ep": 8})), (f"{_TRTLLM}features/parallel-strategy.html",)
    ),
    "fp8-kv-cache": Case(
        whole(pool(kv_cache_dtype="fp8", tokens_per_block=64)), (f"{_TRTLLM}features/kvcache.html", _TRTLLM_ARGS)
    ),
    "no-block-reuse": Case(
        whole(pool(enable_block_reuse=False, kv_cache_free_gpu_memory_fraction=0.8)),
        (f"{_TRTLLM}features/kvcache.html",),
    ),
    "chunked-prefill": Case(whole(pool(enable_chunked_prefill=True, max_num_tokens=4096)), (_TRTLLM_ARGS,)),
    "speculation-ngram": Case(
        whole(pool(speculative_method="NGram", speculative_tokens=3)),
        (f"{_TRTLLM}features/speculative-decoding.html", _TRTLLM_KEYS),
    ),
    "speculation-mtp": Case(
        whole(pool(speculative_method="MTP", speculative_tokens=1, sizes={"tp": 8, "ep": 8})),
        (f"{_TRTLLM}features/speculative-decoding.html", _TRTLLM_KEYS),
    ),
    "speculation-eagle3": Case(
        whole(pool(speculative_method="Eagle3", speculative_tokens=4)),
        (f"{_TRTLLM}features/speculative-decoding.html", _TRTLLM_KEYS),
    ),
    "kernels-and-policy": Case(
        whole(pool(cuda_graphs=False, attention_backend="FLASHINFER", scheduling_policy="MAX_UTILIZATION")),
        (_TRTLLM_KEYS, _TRTLLM_ARGS),
    ),
    "disaggregated-ucx": Case(
        pair({"tp": 2}, {"tp": 4}, cache_transceiver="UCX", kv_transport="rdma"),
        (f"{_TRTLLM}features/disagg-serving.html",),
    ),
    "disaggregated-default": Case(pair({}, {"dp": 4, "ep": 4}), (f"{_TRTLLM}features/disagg-serving.html",)),
}

CASES = {"vllm": VLLM, "sglang": SGLANG, "trtllm": TRTLLM}
NAMED = [(engine, name) for engine, cases in CASES.items() for name in cases]


@pytest.mark.parametrize(("engine", "name"), NAMED)
def test_commands_are_the_reviewed_ones(engine: str, name: str) -> None:
    case = CASES[engine][name]
    built = {
        replica: {"argv": list(command.argv), "env": dict(command.env), "files": dict(command.files)}
        for replica, command in commands(engine, case).items()
    }
    tree = {"reviewed_against": list(case.reviewed_against), "replicas": built}
    file = GOLDEN / engine / f"{name}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    assert json.loads(file.read_text(encoding="utf-8")) == tree


def test_every_engine_has_twelve_cases_and_no_file_is_left_over() -> None:
    for engine, cases in CASES.items():
        assert len(cases) >= 12
        assert {file.stem for file in (GOLDEN / engine).glob("*.json")} == set(cases)


@pytest.mark.parametrize("engine", CASES)
def test_both_roles_and_every_kind_of_parallelism_are_among_the_cases(engine: str) -> None:
    specs = [spec for case in CASES[engine].values() for spec in case.replicas.values()]
    assert {spec.pool.role for spec in specs} == set(Role)
    for size in ("tp", "pp", "dp", "ep"):
        assert any(getattr(spec.pool.parallelism, size) > 1 for spec in specs)
