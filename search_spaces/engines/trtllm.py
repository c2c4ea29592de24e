"""Options of TensorRT-LLM's server (`trtllm-serve`, PyTorch backend).

Names are those of its command line, or of keys in its options file (`--extra_llm_api_options`): `enable_block_reuse`
and `kv_cache_dtype` of `kv_cache_config`, `cuda_graphs`, `attention_backend`, `speculative_*` and `cache_transceiver`.
Defaults are its own: 2048 sequences, 8192 tokens of a step, 0.9 of the memory that weights leave free, no chunked
prefill. Weights keep the checkpoint's format: it quantises nothing while loading.
"""

from __future__ import annotations

from collections.abc import Mapping

from search_spaces.engines.base import SPLIT_ROLES, EngineParameter, EngineSpec, Scheduling
from search_spaces.hardware import DeviceKind
from search_spaces.serving import OptionValue, Parallelism

DRAFTS_OF_THEIR_OWN = ("Eagle3",)
"""Methods of speculative decoding that load a second model, which the installation names."""


def _parallel_conflict(sizes: Parallelism, _options: Mapping[str, OptionValue]) -> str | None:
    """Attention is split over the tensor-parallel group, or repeated on each of its ranks (attention DP); not both."""
    if sizes.dp > 1 and sizes.tp > 1:
        return (
            f"tp={sizes.tp} with dp={sizes.dp}: TensorRT-LLM's attention DP puts whole attention on every rank; "
            f"choose tp=1 with dp={sizes.tp * sizes.dp}, or dp=1"
        )
    return None


TRTLLM = EngineSpec(
    name="trtllm",
    apart=True,
    scheduling=Scheduling(
        sequences="max_batch_size",
        step_tokens="max_num_tokens",
        memory_share="kv_cache_free_gpu_memory_fraction",
        reuses_prompts="enable_block_reuse",
        splits_prompts="enable_chunked_prefill",
    ),
    devices=(DeviceKind.GPU,),
    parallel_conflict=_parallel_conflict,
    shared_options=(
        "kv_cache_dtype",
        "cache_transceiver",
        "kv_transport",
        "tokens_per_block",
        "speculative_method",
        "speculative_tokens",
    ),
    parameters=(
        EngineParameter(
            name="max_batch_size",
            choices=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048),
            default=2048,
            unit="sequences",
            meaning="sequences that a rank runs together (--max_batch_size)",
        ),
        EngineParameter(
            name="max_num_tokens",
            choices=(1024, 2048, 4096, 8192, 16384, 32768),
            default=8192,
            unit="tokens",
            meaning="tokens that one step may hold (--max_num_tokens)",
        ),
        EngineParameter(
            name="enable_chunked_prefill",
            choices=(False, True),
            default=False,
            unit="switch",
            meaning="prompts are computed in parts beside decoding sequences (--enable_chunked_prefill)",
        ),
        EngineParameter(
            name="enable_block_reuse",
            choices=(True, False),
            default=True,
            unit="switch",
            meaning="blocks of earlier prompts are used again (kv_cache_config.enable_block_reuse)",
        ),
        EngineParameter(
            name="kv_cache_dtype",
            choices=("auto", "fp8"),
            default="auto",
            unit="type",
            meaning="element type of the KV cache, auto for the model's own (kv_cache_config.dtype)",
            searched=False,
            numerics=True,
        ),
        EngineParameter(
            name="kv_cache_free_gpu_memory_fraction",
            choices=(0.7, 0.8, 0.85, 0.9, 0.95),
            default=0.9,
            unit="share",
            meaning="share of the memory that weights leave free (--kv_cache_free_gpu_memory_fraction)",
        ),
        EngineParameter(
            name="cuda_graphs",
            choices=(True, False),
            default=True,
            unit="switch",
            meaning="CUDA graphs of decode steps, padded to captured sizes (cuda_graph_config)",
            searched=False,
        ),
        EngineParameter(
            name="attention_backend",
            choices=("TRTLLM", "FLASHINFER"),
            default="TRTLLM",
            unit="kernel",
            meaning="attention kernels (attn_backend)",
            searched=False,
        ),
        EngineParameter(
            name="scheduling_policy",
            choices=("GUARANTEED_NO_EVICT", "MAX_UTILIZATION"),
            default="GUARANTEED_NO_EVICT",
            unit="policy",
            meaning="whether a started request may be paused for want of KV cache "
            "(scheduler_config.capacity_scheduler_policy)",
            searched=False,
        ),
        EngineParameter(
            name="tokens_per_block",
            choices=("auto", 32, 64, 128),
            default="auto",
            unit="tokens",
            meaning="tokens of a KV block; auto for its own (kv_cache_config.tokens_per_block)",
            searched=False,
        ),
        EngineParameter(
            name="speculative_method",
            choices=("none", "NGram", "MTP", "Eagle3"),
            default="none",
            unit="method",
            meaning="who drafts tokens: n-grams, the model's own multi-token head, or a second model that the "
            "installation names as draft_model (speculative_config)",
            searched=False,
        ),
        EngineParameter(
            name="speculative_tokens",
            choices=(1, 2, 3, 4, 5),
            default=3,
            unit="tokens",
            meaning="tokens drafted for each step; without effect where speculative_method is none",
            searched=False,
        ),
        EngineParameter(
            name="moe_backend",
            choices=("auto", "CUTLASS", "TRTLLM", "DEEPGEMM", "WIDEEP"),
            default="auto",
            unit="kernel",
            meaning="kernels of experts (moe_config.backend)",
            searched=False,
        ),
        EngineParameter(
            name="cache_transceiver",
            choices=("DEFAULT", "UCX", "NIXL", "MPI"),
            default="DEFAULT",
            unit="connector",
            meaning="what carries KV caches from context to generation servers (cache_transceiver_config.backend)",
            roles=SPLIT_ROLES,
            searched=False,
        ),
        EngineParameter(
            name="kv_transport",
            choices=("auto", "rdma", "tcp"),
            default="auto",
            unit="transport",
            meaning="what UCX may use: RDMA, TCP, or what it finds best (UCX_TLS)",
            roles=SPLIT_ROLES,
            searched=False,
        ),
    ),
)
