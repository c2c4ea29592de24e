"""Options of llama.cpp's server.

Defaults are its own: batch sizes and cache types as in its parameters (a test compares them with what is installed),
4 slots where it is left to choose, and flash attention, which its `auto` resolves to. Two differ. Its default thread
count is every core, ours is one: a replica has the cores that it reserves. And left to choose it shares one KV cache
among its slots (`--kv-unified`), so that each token attends over the room of all; ours are apart (16 requests of
256 tokens in and 64 out on one core: 26 to 30 ms a token apart, 41 to 52 ms shared).
"""

from __future__ import annotations

from collections.abc import Mapping

from search_spaces.engines.base import EngineParameter, EngineSpec, OptionValues, Scheduling
from search_spaces.serving import OptionValue


def _repair(options: Mapping[str, OptionValue]) -> OptionValues:
    """Micro-batches no larger than batches, and flash attention where a quantised KV cache needs it."""
    batch_size, ubatch_size = int(options["batch_size"]), int(options["ubatch_size"])
    needs_flash = options["kv_cache_dtype"] == "q8_0"
    return {
        **options,
        "ubatch_size": min(batch_size, ubatch_size),
        "flash_attention": bool(options["flash_attention"]) or needs_flash,
    }


LLAMACPP = EngineSpec(
    name="llamacpp",
    repair=_repair,
    scheduling=Scheduling(
        sequences="max_num_seqs",
        step_tokens="batch_size",
    ),
    devices_per_rank_option="threads",
    shared_options=("flash_attention", "kv_cache_dtype"),
    parameters=(
        EngineParameter(
            name="max_num_seqs",
            choices=(1, 2, 4, 8, 16, 32),
            default=4,
            unit="sequences",
            meaning="slots: sequences decoded together (--parallel)",
        ),
        EngineParameter(
            name="batch_size",
            choices=(64, 128, 256, 512, 1024, 2048),
            default=2048,
            unit="tokens",
            meaning="tokens that one scheduling step may hold (--batch-size)",
        ),
        EngineParameter(
            name="ubatch_size",
            choices=(32, 64, 128, 256, 512),
            default=512,
            unit="tokens",
            meaning="tokens computed at once (--ubatch-size), at most batch_size",
        ),
        EngineParameter(
            name="kv_cache_dtype",
            choices=("f16", "q8_0", "f32"),
            default="f16",
            unit="type",
            meaning="element type of the KV cache (--cache-type-k, --cache-type-v); q8_0 needs flash attention",
        ),
        EngineParameter(
            name="flash_attention",
            choices=(True, False),
            default=True,
            unit="switch",
            meaning="fused attention kernel (--flash-attn)",
        ),
        EngineParameter(
            name="threads",
            choices=(1, 2, 4, 8),
            default=1,
            unit="cores",
            meaning="threads of a replica, each on a reserved core (--threads, --threads-batch)",
        ),
    ),
)
