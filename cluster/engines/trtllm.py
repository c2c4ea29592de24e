"""TensorRT-LLM as an engine: what to launch for a replica or a router, and what their ends mean.

Much of its configuration has no flag: a YAML file of options lies beside the process and is part of its command.
Hand-over of KV caches: the context server answers with parameters by which the generation server fetches the cache. Its
`/metrics` is no Prometheus text, so nothing of it is recorded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.engines.apart import UCX_TLS, PairedRouter, checked_version, classify_by_log, paired_router_command
from cluster.engines.base import LaunchCommand, ReplicaSpec, RouterSpec
from cluster.engines.flags import HelpRequest
from cluster.engines.hf_model import has_weights, loadable_folder
from cluster.engines.installation import Installation, Installations, installation_of
from search_spaces.engines.trtllm import DRAFTS_OF_THEIR_OWN, TRTLLM
from search_spaces.errors import InvalidValueError
from search_spaces.model import ModelSpec
from search_spaces.outcome import FailureReason
from search_spaces.serving import OptionValue, Pool, Role, ServingConfig

Tree = dict[str, object]
HELP = HelpRequest(help=("serve", "--help"), package="tensorrt_llm")


@dataclass(frozen=True, kw_only=True)
class TrtllmBackend:
    """See `cluster.engines.base.EngineBackend`. `installations` say where each node pool has its `trtllm-serve`."""

    installations: Installations

    name = "trtllm"
    emulated = False

    def prepare(self, model: ModelSpec, directory: Path) -> ModelSpec:
        """Write a folder without weights where the model has nothing to load; raises `InvalidValueError`."""
        return replace(model, source=loadable_folder(model, directory))

    def replica_command(self, replica: ReplicaSpec) -> LaunchCommand:
        """`trtllm-serve` for one replica; raises `InvalidValueError` for what TensorRT-LLM cannot do."""
        source = replica.source
        found = installation_of(self.installations, replica.pool)
        options = replica.work_dir / f"{replica.pool.role}-{replica.index}.options.yaml"
        argv = (
            *found.program(self.name),
            "serve",
            source,
            *_flags(replica),
            "--extra_llm_api_options",
            str(options),
        )
        text = json.dumps(_options_file(replica, found), indent=1) + "\n"  # JSON is YAML
        return LaunchCommand(argv=argv, env={**_env(replica), **found.env}, files={str(options): text})

    def check_command(self, command: LaunchCommand, pool: Pool) -> str:
        """Version that `command` starts; raises `InvalidValueError` for flags that it does not know."""
        found = installation_of(self.installations, pool)
        return f"TensorRT-LLM {checked_version(self.name, found, command, HELP)}"

    def router_command(self, router: RouterSpec) -> LaunchCommand:
        """Our router: load balancing where aggregated, hand-over of parameters where disaggregated."""
        return paired_router_command(router, PairedRouter(protocol="disaggregated_params"))

    def transport(self, config: ServingConfig) -> str | None:
        """How KV caches go from context to generation servers; None where they do not."""
        if len(config.pools) == 1:
            return None
        pool = config.pool(Role.PREFILL)
        allowed = str(_option(pool, "kv_transport"))
        return f"{_option(pool, 'cache_transceiver')} ({'its own choice' if allowed == 'auto' else allowed})"

    def classify(self, exit_code: int | None, log_tail: str, *, ready: bool) -> FailureReason:
        """Class of a failure from its exit code and last lines."""
        return classify_by_log(exit_code, log_tail, ready=ready)

    def version(self) -> str:
        """What is known without a node; replicas say which version they are when they are launched."""
        return "TensorRT-LLM"


def _option(pool: Pool, name: str) -> OptionValue:
    return pool.option(name, TRTLLM.parameter(name).default)


def _flags(replica: ReplicaSpec) -> tuple[str, ...]:
    """Attention data parallelism lives inside the tensor-parallel group, which is then `tp * dp` ranks wide."""
    pool, sizes = replica.pool, replica.pool.parallelism
    named: dict[str, OptionValue] = {
        "--host": replica.host,
        "--port": replica.port,
        "--backend": "pytorch",
        "--max_seq_len": replica.workload.longest_context,
        "--max_batch_size": _option(pool, "max_batch_size"),
        "--max_num_tokens": _option(pool, "max_num_tokens"),
        "--kv_cache_free_gpu_memory_fraction": _option(pool, "kv_cache_free_gpu_memory_fraction"),
        "--tp_size": sizes.tp * sizes.dp,
        "--pp_size": sizes.pp,
        "--ep_size": sizes.ep,
    }
    unsaid = {name for name in ("--pp_size", "--ep_size") if named[name] == 1}
    flags = [word for name, value in named.items() if name not in unsaid for word in (name, str(value))]
    return (*flags, *(["--enable_chunked_prefill"] if _option(pool, "enable_chunked_prefill") else []))


def _options_file(replica: ReplicaSpec, found: Installation) -> Tree:
    """What has no flag. The overlap scheduler is off where it is not supported: context servers, n-grams."""
    pool = replica.pool
    tree: Tree = {
        "kv_cache_config": _kv_cache(pool),
        "cuda_graph_config": {"enable_padding": True} if _option(pool, "cuda_graphs") else None,
        "enable_attention_dp": pool.parallelism.dp > 1,
        "attn_backend": _option(pool, "attention_backend"),
        "scheduler_config": {"capacity_scheduler_policy": _option(pool, "scheduling_policy")},
    }
    if not has_weights(replica.source):
        tree["load_format"] = "dummy"
    if _option(pool, "moe_backend") != "auto":
        tree["moe_config"] = {"backend": _option(pool, "moe_backend")}
    speculation = _speculation(pool, found)
    if speculation is not None:
        tree["speculative_config"] = speculation
    if pool.role is not Role.MIXED:
        tree["cache_transceiver_config"] = {
            "backend": _option(pool, "cache_transceiver"),
            "max_tokens_in_buffer": _rounded_up(replica.workload.isl.longest),
        }
    if pool.role is Role.PREFILL or (speculation is not None and speculation["decoding_type"] == "NGram"):
        tree["disable_overlap_scheduler"] = True
    return tree


def _kv_cache(pool: Pool) -> Tree:
    """The section of the KV cache; it takes the place of flags, so that the memory fraction stands here, too."""
    tree: Tree = {
        "enable_block_reuse": _option(pool, "enable_block_reuse"),
        "free_gpu_memory_fraction": _option(pool, "kv_cache_free_gpu_memory_fraction"),
    }
    if _option(pool, "kv_cache_dtype") != "auto":
        tree["dtype"] = _option(pool, "kv_cache_dtype")
    if _option(pool, "tokens_per_block") != "auto":
        tree["tokens_per_block"] = _option(pool, "tokens_per_block")
    return tree


def _rounded_up(tokens: int, step: int = 1024) -> int:
    """The buffer of a hand-over should hold the longest prompt."""
    return -(-tokens // step) * step


def _speculation(pool: Pool, found: Installation) -> Tree | None:
    """The section of speculative decoding, under names that 1.0 has and later versions take for their own."""
    method, tokens = str(_option(pool, "speculative_method")), _option(pool, "speculative_tokens")
    if method == "none" or (method == "NGram" and pool.role is Role.PREFILL):
        return None  # other drafts have KV caches, which a context server must fill as well
    if method == "MTP":
        return {"decoding_type": "MTP", "num_nextn_predict_layers": tokens}
    if method == "NGram":
        return {"decoding_type": "NGram", "max_draft_len": tokens, "max_matching_ngram_size": 2}
    if method in DRAFTS_OF_THEIR_OWN and found.draft_model is None:
        raise InvalidValueError(
            f"speculative_method={method} loads a second model; name it with "
            f"node_pools.{pool.node_pool}.engines.trtllm.draft_model, or choose NGram"
        )
    return {"decoding_type": "Eagle", "max_draft_len": tokens, "speculative_model_dir": found.draft_model}


def _env(replica: ReplicaSpec) -> dict[str, str]:
    env = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, replica.device_ids))} if replica.device_ids else {}
    if Path(replica.source).is_absolute():
        env |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if replica.pool.role is Role.MIXED or _option(replica.pool, "kv_transport") == "auto":
        return env
    return env | {"UCX_TLS": UCX_TLS[str(_option(replica.pool, "kv_transport"))]}
