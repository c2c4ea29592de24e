"""Options of TensorRT-LLM's server (`trtllm-serve`), as far as the performance model understands them.

Names are those of its command line, but for `enable_block_reuse`, a key of `kv_cache_config` in its options file.
Defaults are its own: 2048 sequences, 8192 tokens of a step, 0.9 of the memory that weights leave free, no chunked
prefill. Weights keep the checkpoint's format: it quantises nothing while loading.
"""

from __future__ import annotations

from search_spaces.engines.base import EngineParameter, EngineSpec
from search_spaces.hardware import DeviceKind

TRTLLM = EngineSpec(
    name="trtllm",
    apart=True,
    devices=(DeviceKind.GPU,),
    shared_options=("kv_cache_dtype",),
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
            meaning="element type of the KV cache, auto for the model's own (--kv_cache_dtype)",
        ),
        EngineParameter(
            name="kv_cache_free_gpu_memory_fraction",
            choices=(0.7, 0.8, 0.85, 0.9, 0.95),
            default=0.9,
            unit="share",
            meaning="share of the memory that weights leave free (--kv_cache_free_gpu_memory_fraction)",
        ),
    ),
)
