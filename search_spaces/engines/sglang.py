"""Options of SGLang, under the names of its command line (`python -m sglang.launch_server`).

SGLang works out several defaults from the GPU's memory when it starts. Stated here is what it arrives at on GPUs of 80
to 141 GiB: chunks of 8192 tokens, 0.88 of the memory, at most 2048 requests (the lower end of its own range). Options
that are not searched unless a study names them keep what SGLang does when left alone.
"""

from __future__ import annotations

from collections.abc import Mapping

from search_spaces.engines.base import SPLIT_ROLES, EngineParameter, EngineSpec, Scheduling
from search_spaces.hardware import DeviceKind
from search_spaces.serving import OptionValue, Parallelism

DRAFTS_OF_THEIR_OWN = ("EAGLE", "EAGLE3", "STANDALONE")
"""Algorithms of speculative decoding that load a second model, which the installation names."""


def _parallel_conflict(sizes: Parallelism, options: Mapping[str, OptionValue]) -> str | None:
    """Experts may be spread over a part of the tensor-parallel group, unless an exchange of tokens needs all of it."""
    ranks = sizes.tp * sizes.dp
    exchange = str(options.get("moe_a2a_backend", "none"))
    if sizes.ep > 1 and sizes.ep != ranks and exchange != "none":
        return (
            f"ep={sizes.ep} is not tp*dp={ranks}: moe_a2a_backend={exchange} exchanges tokens over the whole group; "
            f"choose ep={ranks}, or moe_a2a_backend none"
        )
    if sizes.dp > 1 and options.get("speculative_algorithm") == "NGRAM":
        return f"speculative_algorithm=NGRAM does not work with data-parallel attention (dp={sizes.dp}); choose another"
    return None


def _conflict(options: Mapping[str, OptionValue]) -> str | None:
    if options.get("disable_radix_cache") and options.get("schedule_policy") in {"lpm", "dfs-weight"}:
        return (
            f"schedule_policy={options['schedule_policy']} orders requests by the cache that disable_radix_cache=true "
            "does away with; choose fcfs"
        )
    return None


SGLANG = EngineSpec(
    name="sglang",
    apart=True,
    scheduling=Scheduling(
        sequences="max_running_requests",
        step_tokens="chunked_prefill_size",
        memory_share="mem_fraction_static",
        forgets_prompts="disable_radix_cache",
    ),
    devices=(DeviceKind.GPU,),
    conflict=_conflict,
    parallel_conflict=_parallel_conflict,
    shared_options=(
        "kv_cache_dtype",
        "transfer_backend",
        "kv_transport",
        "page_size",
        "dtype",
        "quantization",
        "speculative_algorithm",
        "speculative_num_steps",
    ),
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
            name="mem_fraction_static",
            choices=(0.7, 0.8, 0.85, 0.88, 0.9, 0.95),
            default=0.88,
            unit="share",
            meaning="share of a GPU's memory for weights and KV cache (--mem-fraction-static)",
        ),
        EngineParameter(
            name="dtype",
            choices=("auto", "bfloat16", "float16"),
            default="auto",
            unit="type",
            meaning="type of weights and activations, auto for the checkpoint's own (--dtype)",
            searched=False,
            numerics=True,
        ),
        EngineParameter(
            name="disable_cuda_graph",
            choices=(False, True),
            default=False,
            unit="switch",
            meaning="no CUDA graphs: starts sooner and with more memory, steps take longer (--disable-cuda-graph)",
            searched=False,
        ),
        EngineParameter(
            name="attention_backend",
            choices=("auto", "fa3", "flashinfer", "triton", "flashmla", "cutlass_mla", "trtllm_mla", "trtllm_mha"),
            default="auto",
            unit="kernel",
            meaning="attention kernels, those with mla for latent attention (--attention-backend)",
            searched=False,
        ),
        EngineParameter(
            name="page_size",
            choices=("auto", 1, 16, 32, 64, 128),
            default="auto",
            unit="tokens",
            meaning="tokens of a KV page; auto for the attention kernel's own (--page-size)",
            searched=False,
        ),
        EngineParameter(
            name="schedule_policy",
            choices=("fcfs", "lpm", "lof", "dfs-weight"),
            default="fcfs",
            unit="policy",
            meaning="who is scheduled first; lpm is the longest cached prefix (--schedule-policy)",
            searched=False,
        ),
        EngineParameter(
            name="speculative_algorithm",
            choices=("none", "NGRAM", "NEXTN", "EAGLE", "EAGLE3", "STANDALONE"),
            default="none",
            unit="method",
            meaning="who drafts tokens: n-grams, the model's own multi-token head, or a second model that the "
            "installation names as draft_model (--speculative-algorithm)",
            searched=False,
        ),
        EngineParameter(
            name="speculative_num_steps",
            choices=(1, 2, 3, 4, 5),
            default=3,
            unit="steps",
            meaning="draft steps of a chain, each one token; without effect where speculative_algorithm is none",
            searched=False,
        ),
        EngineParameter(
            name="moe_a2a_backend",
            choices=("none", "deepep"),
            default="none",
            unit="kernel",
            meaning="exchange of tokens between expert-parallel ranks (--moe-a2a-backend)",
            searched=False,
        ),
        EngineParameter(
            name="transfer_backend",
            choices=("mooncake", "nixl"),
            default="mooncake",
            unit="connector",
            meaning="what carries KV caches from prefill to decode replicas (--disaggregation-transfer-backend)",
            roles=SPLIT_ROLES,
            searched=False,
        ),
        EngineParameter(
            name="kv_transport",
            choices=("auto", "rdma", "tcp"),
            default="auto",
            unit="transport",
            meaning="what the transfer backend may use: RDMA, TCP, or what it finds best (MC_FORCE_TCP, UCX_TLS)",
            roles=SPLIT_ROLES,
            searched=False,
        ),
    ),
)
