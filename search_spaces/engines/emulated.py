"""Options of the emulated engine: the common ones of production engines, under their names in vLLM.

Defaults are vLLM's for serving on large GPUs (256 sequences, 8192 tokens of a step, 0.9 of the memory).
"""

from __future__ import annotations

from collections.abc import Mapping

from search_spaces.engines.base import EngineParameter, EngineSpec, Scheduling
from search_spaces.engines.vllm import VLLM
from search_spaces.hardware import DeviceKind
from search_spaces.serving import OptionValue


def _conflict(options: Mapping[str, OptionValue]) -> str | None:
    seqs, tokens = int(options.get("max_num_seqs", 256)), int(options.get("max_num_batched_tokens", 8192))
    if tokens >= seqs:
        return None
    return (
        f"max_num_batched_tokens={tokens} is below max_num_seqs={seqs}, so that a step could not hold every sequence; "
        "raise it or lower max_num_seqs"
    )


EMULATED = EngineSpec(
    name="emulated",
    emulated=True,
    scheduling=Scheduling(
        sequences="max_num_seqs",
        step_tokens="max_num_batched_tokens",
        memory_share="gpu_memory_utilization",
        reuses_prompts="enable_prefix_caching",
        splits_prompts="enable_chunked_prefill",
    ),
    devices=(DeviceKind.GPU,),
    conflict=_conflict,
    shared_options=("kv_cache_dtype",),
    parameters=(
        EngineParameter(
            name="max_num_seqs",
            choices=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
            default=256,
            unit="sequences",
            meaning="sequences that a rank runs together (--max-num-seqs)",
        ),
        EngineParameter(
            name="max_num_batched_tokens",
            choices=(256, 512, 1024, 2048, 4096, 8192, 16384),
            default=8192,
            unit="tokens",
            meaning="tokens that one step may hold (--max-num-batched-tokens)",
        ),
        VLLM.parameter("enable_chunked_prefill"),
        VLLM.parameter("enable_prefix_caching"),
        EngineParameter(
            name="kv_cache_dtype",
            choices=("auto", "fp8"),
            default="auto",
            unit="type",
            meaning="element type of the KV cache, auto for bf16 (--kv-cache-dtype)",
        ),
        EngineParameter(
            name="gpu_memory_utilization",
            choices=(0.7, 0.8, 0.85, 0.9, 0.95),
            default=0.9,
            unit="share",
            meaning="share of a GPU's memory that the engine uses (--gpu-memory-utilization)",
        ),
    ),
)
