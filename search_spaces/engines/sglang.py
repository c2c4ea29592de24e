"""Options of SGLang, under the names of its command line, as far as the performance model understands them.

SGLang works out several defaults from the GPU's memory when it starts. Stated here is what it arrives at on GPUs of 80
to 141 GiB: chunks of 8192 tokens, 0.88 of the memory, at most 2048 requests (the lower end of its own range).
"""

from __future__ import annotations

from search_spaces.engines.base import EngineParameter, EngineSpec
from search_spaces.hardware import DeviceKind

SGLANG = EngineSpec(
    name="sglang",
    apart=True,
    devices=(DeviceKind.GPU,),
    shared_options=("kv_cache_dtype",),
    parameters=(
        EngineParameter(
            name="max_running_requests",
            choices=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048),
            default=2048,
            unit="sequences",
            meaning="requests that run together (--max-running-requests)",
        ),
        EngineParameter(
            name="chunked_prefill_size",
            choices=(1024, 2048, 4096, 8192, 16384),
            default=8192,
            unit="tokens",
            meaning="prompt tokens of one step (--chunked-prefill-size)",
        ),
        EngineParameter(
            name="disable_radix_cache",
            choices=(False, True),
            default=False,
            unit="switch",
            meaning="earlier prompts are not used again (--disable-radix-cache)",
        ),
        EngineParameter(
            name="kv_cache_dtype",
            choices=("auto", "fp8_e4m3"),
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
            name="mem_fraction_static",
            choices=(0.7, 0.8, 0.85, 0.88, 0.9, 0.95),
            default=0.88,
            unit="share",
            meaning="share of a GPU's memory for weights and KV cache (--mem-fraction-static)",
        ),
    ),
)
