"""Options of vLLM, under the names of its command line (`vllm serve`).

Defaults are those of its OpenAI server on GPUs of 70 GiB and more (1024 sequences, 8192 tokens of a step, 0.92 of the
memory; 256 and 2048 on smaller ones and on the A100), from `EngineArgs` and `CacheConfig` of its sources. Options that
are not searched unless a study names them keep what vLLM does when left alone.
"""

from __future__ import annotations

from collections.abc import Mapping

from search_spaces.engines.base import SPLIT_ROLES, EngineParameter, EngineSpec, OptionValues, Scheduling
from search_spaces.hardware import DeviceKind
from search_spaces.serving import OptionValue, Parallelism
from search_spaces.workload import Workload

FILE_CONNECTOR = "ExampleConnector"
"""vLLM's connector through files: it stores a prompt when it is first scheduled, so the prompt must be whole then."""
DRAFTS_OF_THEIR_OWN = ("eagle3", "draft_model")
"""Methods of speculative decoding that load a second model, which the installation names."""


def _repair(options: Mapping[str, OptionValue]) -> OptionValues:
    """The file connector keeps prompts whole."""
    if options.get("kv_connector") != FILE_CONNECTOR:
        return dict(options)
    return {**options, "enable_chunked_prefill": False}


def _conflict(options: Mapping[str, OptionValue]) -> str | None:
    seqs, tokens = int(options.get("max_num_seqs", 1024)), int(options.get("max_num_batched_tokens", 8192))
    if tokens < seqs:
        return (
            f"max_num_batched_tokens={tokens} is below max_num_seqs={seqs}, which vLLM refuses; "
            "raise it or lower max_num_seqs"
        )
    if options.get("kv_connector") == FILE_CONNECTOR and options.get("enable_chunked_prefill", True):
        return (
            f"kv_connector={FILE_CONNECTOR} stores a prompt as it is first scheduled, which is a part of it with "
            "enable_chunked_prefill=true; set that to false, or use NixlConnector"
        )
    return None


def _parallel_conflict(sizes: Parallelism, _options: Mapping[str, OptionValue]) -> str | None:
    """Experts are spread over all ranks of a stage, or split like the rest: vLLM takes no size of its own for them."""
    ranks = sizes.tp * sizes.dp
    if sizes.ep in {1, ranks}:
        return None
    return f"ep={sizes.ep} is neither 1 nor tp*dp={ranks}, but vLLM spreads experts over all; choose 1 or {ranks}"


def _workload_conflict(options: Mapping[str, OptionValue], workload: Workload) -> str | None:
    tokens = int(options.get("max_num_batched_tokens", 8192))
    if options.get("enable_chunked_prefill", True) or tokens >= workload.longest_context:
        return None
    return (
        f"max_num_batched_tokens={tokens} cannot hold the longest request of {workload.longest_context} tokens, which "
        "vLLM refuses with enable_chunked_prefill=false; raise it"
    )


_GPU, _CPU = (DeviceKind.GPU,), (DeviceKind.CPU,)

VLLM = EngineSpec(
    name="vllm",
    apart=True,
    scheduling=Scheduling(
        sequences="max_num_seqs",
        step_tokens="max_num_batched_tokens",
        memory_share="gpu_memory_utilization",
        reuses_prompts="enable_prefix_caching",
        splits_prompts="enable_chunked_prefill",
    ),
    devices=(DeviceKind.GPU, DeviceKind.CPU),
    devices_per_rank_option="threads",
    repair=_repair,
    conflict=_conflict,
    parallel_conflict=_parallel_conflict,
    workload_conflict=_workload_conflict,
    shared_options=(
        "kv_cache_dtype",
        "kv_connector",
        "kv_transport",
        "block_size",
        "dtype",
        "quantization",
        "speculative_method",
        "speculative_tokens",
    ),
    parameters=(
        EngineParameter(
            name="max_num_seqs",
            choices=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
            default=1024,
            unit="sequences",
            meaning="sequences that a rank runs together (--max-num-seqs)",
        ),
        EngineParameter(
            name="max_num_batched_tokens",
            choices=(512, 1024, 2048, 4096, 8192, 16384, 32768),
            default=8192,
            unit="tokens",
            meaning="tokens that one step may hold (--max-num-batched-tokens)",
        ),
        EngineParameter(
            name="enable_chunked_prefill",
            choices=(True, False),
            default=True,
            unit="switch",
            meaning="prompts are computed in parts beside decoding sequences (--enable-chunked-prefill)",
        ),
        EngineParameter(
            name="enable_prefix_caching",
            choices=(True, False),
            default=True,
            unit="switch",
            meaning="blocks of earlier prompts are used again (--enable-prefix-caching)",
        ),
        EngineParameter(
            name="kv_cache_dtype",
            choices=("auto", "fp8"),
            default="auto",
            unit="type",
            meaning="element type of the KV cache, auto for the model's own (--kv-cache-dtype)",
            searched=False,
            numerics=True,
        ),
        EngineParameter(
            name="quantization",
            choices=("none", "fp8"),
            default="none",
            unit="type",
            meaning="weights are quantised while loading; none leaves the checkpoint as it is (--quantization)",
            searched=False,
            numerics=True,
        ),
        EngineParameter(
            name="gpu_memory_utilization",
            choices=(0.7, 0.8, 0.85, 0.9, 0.92, 0.95),
            default=0.92,
            unit="share",
            meaning="share of a GPU's memory that the engine uses (--gpu-memory-utilization)",
            kinds=_GPU,
        ),
        EngineParameter(
            name="dtype",
            choices=("auto", "bfloat16", "float16", "float32"),
            default="auto",
            unit="type",
            meaning="type of weights and activations, auto for the checkpoint's own (--dtype)",
            searched=False,
            numerics=True,
        ),
        EngineParameter(
            name="enforce_eager",
            choices=(False, True),
            default=False,
            unit="switch",
            meaning="neither torch.compile nor CUDA graphs: starts sooner, steps take longer (--enforce-eager)",
            searched=False,
        ),
        EngineParameter(
            name="attention_backend",
            choices=(
                "auto",
                "FLASH_ATTN",
                "FLASHINFER",
                "TRITON_ATTN",
                "FLASH_ATTN_MLA",
                "FLASHMLA",
                "CUTLASS_MLA",
                "TRITON_MLA",
            ),
            default="auto",
            unit="kernel",
            meaning="attention kernels, those with MLA for latent attention (--attention-backend)",
            kinds=_GPU,
            searched=False,
        ),
        EngineParameter(
            name="block_size",
            choices=("auto", 16, 32, 64, 128),
            default="auto",
            unit="tokens",
            meaning="tokens of a KV block; auto for the platform's own (--block-size)",
            searched=False,
        ),
        EngineParameter(
            name="scheduling_policy",
            choices=("fcfs", "priority"),
            default="fcfs",
            unit="policy",
            meaning="who is scheduled first (--scheduling-policy)",
            searched=False,
        ),
        EngineParameter(
            name="speculative_method",
            choices=("none", "ngram", "mtp", "eagle3", "draft_model"),
            default="none",
            unit="method",
            meaning="who drafts tokens: n-grams of the prompt, the model's own multi-token head, or a second model "
            "that the installation names as draft_model (--speculative-config)",
            searched=False,
        ),
        EngineParameter(
            name="speculative_tokens",
            choices=(1, 2, 3, 4, 5, 8),
            default=3,
            unit="tokens",
            meaning="tokens drafted for each step; without effect where speculative_method is none",
            searched=False,
        ),
        EngineParameter(
            name="all2all_backend",
            choices=("auto", "allgather_reducescatter", "deepep_high_throughput", "deepep_low_latency", "pplx"),
            default="auto",
            unit="kernel",
            meaning="exchange of tokens between expert-parallel ranks (--all2all-backend)",
            kinds=_GPU,
            searched=False,
        ),
        EngineParameter(
            name="kv_connector",
            choices=("NixlConnector", FILE_CONNECTOR),
            default="NixlConnector",
            unit="connector",
            meaning="how KV caches go from prefill to decode replicas: NIXL, or files in a shared folder, which are "
            "for tests (--kv-transfer-config)",
            roles=SPLIT_ROLES,
            searched=False,
        ),
        EngineParameter(
            name="kv_transport",
            choices=("auto", "rdma", "tcp", "shm"),
            default="auto",
            unit="transport",
            meaning="what NIXL may use: RDMA, TCP, shared memory of a node, or what UCX finds best (UCX_TLS)",
            roles=SPLIT_ROLES,
            searched=False,
        ),
        EngineParameter(
            name="threads",
            choices=(1, 2, 4, 8, 16, 32, 64),
            default=1,
            unit="cores",
            meaning="cores of a rank on a CPU (VLLM_CPU_OMP_THREADS_BIND)",
            kinds=_CPU,
            searched=False,
        ),
        EngineParameter(
            name="cpu_kv_cache_gib",
            choices=(1, 2, 4, 8, 16, 32, 64),
            default=4,
            unit="GiB",
            meaning="KV cache of a rank on a CPU (VLLM_CPU_KVCACHE_SPACE)",
            kinds=_CPU,
            searched=False,
        ),
    ),
)
