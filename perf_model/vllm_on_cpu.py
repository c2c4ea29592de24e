"""vLLM on CPU cores, seen as the embedded engine: the same roofline of a core, other constants.

There are no tables for it. What matters of its scheduler has a counterpart in the embedded engine's options: sequences,
tokens of a step (which it computes at once, without smaller parts), and the type of its KV cache.
"""

from __future__ import annotations

from dataclasses import replace

from perf_model.engine_traits import EngineTraits
from perf_model.groups import option
from search_spaces.hardware import DeviceKind
from search_spaces.problem import Problem
from search_spaces.serving import Candidate, OptionValue, Pool, make_options

ENGINE, SEEN_AS = "vllm", "llamacpp"

# Set by hand from runs of vLLM 0.32 (float32, eager, one or two cores, 3M to 7M parameters) on shared machines: a step
# of one sequence takes 10 to 15 ms, each further sequence 0.5 to 2 ms, and the process some 2.3 GB. The first trials of
# a study correct them.
VLLM_ON_CPU = EngineTraits(
    gemm_efficiency=0.4,
    attention_efficiency=0.12,
    memory_efficiency=0.6,
    step_ms=9.0,
    sequence_ms=0.8,
    request_ms=10.0,
    thread_exponent=0.7,
    half_rate_rows=8.0,
    reserve_bytes=2.3e9,
)


def is_vllm_on_cpu(candidate: Candidate, problem: Problem) -> bool:
    """True where vLLM runs on cores."""
    pools = candidate.config.pools
    return candidate.config.engine == ENGINE and any(_kind(pool, problem) is DeviceKind.CPU for pool in pools)


def _kind(pool: Pool, problem: Problem) -> DeviceKind:
    return problem.node_pool(pool.node_pool).device.kind


def as_embedded(candidate: Candidate, problem: Problem) -> Candidate:
    """`candidate` with the options that the embedded engine has in the place of vLLM's."""
    pools = tuple(replace(pool, options=_options(pool, problem)) for pool in candidate.config.pools)
    return replace(candidate, config=replace(candidate.config, engine=SEEN_AS, pools=pools))


def _options(pool: Pool, problem: Problem) -> tuple[tuple[str, OptionValue], ...]:
    tokens = int(option(ENGINE, pool, "max_num_batched_tokens"))
    return make_options(
        {
            "max_num_seqs": int(option(ENGINE, pool, "max_num_seqs")),
            "batch_size": tokens,
            "ubatch_size": tokens,
            "kv_cache_dtype": _kv_type(pool, problem),
            "flash_attention": True,
            "threads": pool.devices_per_rank,
        }
    )


def _kv_type(pool: Pool, problem: Problem) -> str:
    """The embedded engine's word for a type of as many bytes."""
    if option(ENGINE, pool, "kv_cache_dtype") == "fp8":
        return "q8_0"
    wide = {"auto": problem.model.weight_bits == 32.0, "float32": True}
    return "f32" if wide.get(str(option(ENGINE, pool, "dtype")), False) else "f16"
