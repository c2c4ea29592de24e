"""Options of vLLM, under the names of its command line, as far as the performance model understands them.

Defaults are those of its OpenAI server on GPUs of 70 GiB and more (1024 sequences, 8192 tokens of a step, 0.92 of the
memory; 256 and 2048 on smaller ones and on the A100), from `EngineArgs` and `CacheConfig` of its sources.
"""

from __future__ import annotations

from collections.abc import Mapping

from search_spaces.engines.base import EngineParameter, EngineSpec
from search_spaces.hardware import DeviceKind
from search_spaces.serving import OptionValue


def _conflict(options: Mapping[str, OptionValue]) -> str | None:
    seqs, tokens = int(options.get("max_num_seqs", 1024)), int(options.get("max_num_batched_tokens", 8192))
    if tokens >= seqs:
        return None
    return (
        f"max_num_batched_tokens={tokens} is below max_num_seqs={seqs}, which vLLM refuses; "
        "raise it or lower max_num_seqs"
    )


VLLM = EngineSpec(
    name="vllm",
    devices=(DeviceKind.GPU,),
    launchable=False,
    conflict=_conflict,
    shared_options=("kv_cache_dtype",),
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
        ),
        EngineParameter(
            name="quantization",
            choices=("none", "fp8"),
            default="none",
            unit="type",
            meaning="weights are quantised while loading; none leaves the checkpoint as it is (--quantization)",
        ),
        EngineParameter(
            name="gpu_memory_utilization",
            choices=(0.7, 0.8, 0.85, 0.9, 0.92, 0.95),
            default=0.92,
            unit="share",
            meaning="share of a GPU's memory that the engine uses (--gpu-memory-utilization)",
        ),
    ),
)
