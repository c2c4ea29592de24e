"""vLLM as an engine: what to launch for a replica or a router, and what their ends mean.

`replica_command` is a pure function of the configuration, the model's source, the ports and the addresses: whatever is
measured can be deployed word for word. Hand-over of KV caches: NIXL, where the prefill replica answers with the address
of the blocks, which goes to the decode replica with the same prompt; or, for tests, files of a shared folder, where the
decode replica finds the prompt's blocks by their hash.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.engines.apart import UCX_TLS, PairedRouter, checked_version, classify_by_log, paired_router_command
from cluster.engines.base import HttpCall, LaunchCommand, ReplicaSpec, RouterSpec
from cluster.engines.flags import HelpRequest
from cluster.engines.hf_model import has_weights, loadable_folder
from cluster.engines.installation import Installation, Installations, installation_of, side_port
from search_spaces.engines.vllm import DRAFTS_OF_THEIR_OWN, FILE_CONNECTOR, VLLM
from search_spaces.errors import InvalidValueError
from search_spaces.model import ModelSpec
from search_spaces.outcome import FailureReason
from search_spaces.serving import OptionValue, Pool, Role, ServingConfig

METRICS: Mapping[str, str] = {
    "requests_running": "vllm:num_requests_running",
    "requests_waiting": "vllm:num_requests_waiting",
    "kv_cache_usage_ratio": "vllm:kv_cache_usage_perc",
    "preemptions_total": "vllm:num_preemptions_total",
    "prompt_tokens_total": "vllm:prompt_tokens_total",
    "output_tokens_total": "vllm:generation_tokens_total",
    "kv_tokens_received_total": 'vllm:prompt_tokens_by_source_total{source="external_kv_transfer"}',
}
"""The figures of a replica's `/metrics` that are recorded, under our names."""
HELP = HelpRequest(help=("serve", "--help=all"), package="vllm")
RANK_PROCESS_BYTES = 2.0e9
"""What a rank takes on a CPU besides weights and KV cache (libraries, buffers): vLLM 0.32 with a small model."""
_ALWAYS_SAID = ("max_num_seqs", "max_num_batched_tokens", "enable_chunked_prefill", "enable_prefix_caching")
"""Options that the command line always states: what vLLM does when left alone depends on the GPU."""
_WHERE_NOT_DEFAULT = (
    "kv_cache_dtype",
    "quantization",
    "dtype",
    "enforce_eager",
    "attention_backend",
    "block_size",
    "scheduling_policy",
    "all2all_backend",
)


@dataclass(frozen=True, kw_only=True)
class VllmBackend:
    """See `cluster.engines.base.EngineBackend`. `installations` say where each node pool has its vLLM."""

    installations: Installations

    name = "vllm"
    emulated = False

    def prepare(self, model: ModelSpec, directory: Path) -> ModelSpec:
        """Write a folder without weights where the model has nothing to load; raises `InvalidValueError`."""
        return replace(model, source=loadable_folder(model, directory))

    def replica_command(self, replica: ReplicaSpec) -> LaunchCommand:
        """`vllm serve` for one replica; raises `InvalidValueError` for what vLLM cannot do."""
        source = replica.source
        found = installation_of(self.installations, replica.pool)
        argv = (
            *found.program(self.name),
            "serve",
            source,
            *_serving_flags(replica),
            *_parallel_flags(replica),
            *_option_flags(replica.pool, found),
            *_speculation_flags(replica.pool, found),
            *_hand_over_flags(replica, found),
        )
        env = {**_common_env(replica), **_device_env(replica, found), **_hand_over_env(replica, found), **found.env}
        return LaunchCommand(argv=argv, env=env)

    def check_command(self, command: LaunchCommand, pool: Pool) -> str:
        """Version of the vLLM that `command` starts; raises `InvalidValueError` for flags that it does not know."""
        found = installation_of(self.installations, pool)
        return f"vLLM {checked_version(self.name, found, command, HELP)}"

    def router_command(self, router: RouterSpec) -> LaunchCommand:
        """Our router: load balancing where aggregated, hand-over of KV caches where disaggregated."""
        connector = None if router.prefill_pool is None else _option(router.prefill_pool, "kv_connector")
        protocol = "repeat" if connector == FILE_CONNECTOR else "kv_transfer_params"
        return paired_router_command(router, PairedRouter(protocol=protocol, metrics=METRICS))

    def reset_calls(self, pool: Pool) -> tuple[HttpCall, ...]:
        """Forget the blocks of earlier prompts."""
        return (HttpCall(path="/reset_prefix_cache"),) if _option(pool, "enable_prefix_caching") else ()

    def transport(self, config: ServingConfig) -> str | None:
        """How KV caches go from prefill to decode replicas; None where they do not."""
        if len(config.pools) == 1:
            return None
        pool = config.pool(Role.PREFILL)
        if _option(pool, "kv_connector") == FILE_CONNECTOR:
            return f"{FILE_CONNECTOR} (files of a shared folder)"
        allowed = str(_option(pool, "kv_transport"))
        return f"NixlConnector over UCX ({'its own choice' if allowed == 'auto' else allowed})"

    def needs_shared_folder(self, config: ServingConfig) -> bool:
        """True where KV caches go through files."""
        return any(pool.option("kv_connector", "") == FILE_CONNECTOR for pool in config.pools)

    def host_memory_bytes(self, replica: ReplicaSpec) -> float:
        """Bytes of a replica on a CPU: weights, the KV cache that it takes at once, and the process of each rank."""
        sizes = replica.pool.parallelism
        kv_bytes = float(_option(replica.pool, "cpu_kv_cache_gib")) * 2**30
        return sizes.dp * replica.model.weight_bytes + sizes.ranks * (kv_bytes + RANK_PROCESS_BYTES)

    def span_refusal(self, pool: Pool, devices: tuple[int, ...]) -> str | None:
        """A replica spans nodes by its data-parallel ranks, or where it has none by its other ranks."""
        sizes = pool.parallelism
        if sizes.dp > 1 and any(count % (sizes.tp * sizes.pp) for count in devices):
            return f"dp={sizes.dp} ranks of {sizes.tp * sizes.pp} GPUs do not split into {devices}; lower dp"
        if sizes.dp == 1 and len(set(devices)) > 1:
            return f"vLLM wants the same number of GPUs on each node, not {devices}; lower pp"
        return None

    def classify(self, exit_code: int | None, log_tail: str, *, ready: bool) -> FailureReason:
        """Class of a failure from its exit code and last lines."""
        return classify_by_log(exit_code, log_tail, ready=ready)

    def version(self) -> str:
        """What is known without a node; replicas say which version they are when they are launched."""
        return "vLLM"


def _option(pool: Pool, name: str) -> OptionValue:
    return pool.option(name, VLLM.parameter(name).default)


def _serving_flags(replica: ReplicaSpec) -> tuple[str, ...]:
    """Who is served where. The access log is off: its lines would push an engine's last words out of its log's end."""
    dummy = () if has_weights(replica.source) else ("--load-format", "dummy")
    follows = replica.part is not None and not replica.part.leads
    address = () if follows else ("--host", replica.host, "--port", str(replica.port))
    return (
        "--served-model-name",
        replica.model.name,
        *address,
        "--max-model-len",
        str(replica.workload.longest_context),
        "--disable-uvicorn-access-log",
        "--enable-prompt-tokens-details",
        *dummy,
    )


def _parallel_flags(replica: ReplicaSpec) -> tuple[str, ...]:
    sizes = replica.pool.parallelism
    named = {
        "--tensor-parallel-size": sizes.tp,
        "--pipeline-parallel-size": sizes.pp,
        "--data-parallel-size": sizes.dp,
    }
    flags = [word for name, size in named.items() if size > 1 for word in (name, str(size))]
    expert = ["--enable-expert-parallel"] if sizes.ep > 1 else []
    return (*flags, *expert, *_span_flags(replica))


def _span_flags(replica: ReplicaSpec) -> tuple[str, ...]:
    """The part of this node in a replica that spans several: its data-parallel ranks, or its stages."""
    part, sizes = replica.part, replica.pool.parallelism
    if part is None:
        return ()
    headless = () if part.leads else ("--headless",)
    if sizes.dp == 1:
        return (
            "--nnodes",
            str(len(part.hosts)),
            "--node-rank",
            str(part.rank),
            "--master-addr",
            part.leader_host,
            "--master-port",
            str(part.rendezvous_port),
            *headless,
        )
    ranks = sizes.tp * sizes.pp
    return (
        "--data-parallel-size-local",
        str(part.devices[part.rank] // ranks),
        "--data-parallel-start-rank",
        str(part.first_device // ranks),
        "--data-parallel-address",
        part.leader_host,
        "--data-parallel-rpc-port",
        str(part.rendezvous_port),
        *headless,
    )


def _option_flags(pool: Pool, found: Installation) -> tuple[str, ...]:
    flags = [word for name in _ALWAYS_SAID for word in _flag(name, _option(pool, name))]
    if found.on_gpu:
        flags += _flag("gpu_memory_utilization", _option(pool, "gpu_memory_utilization"))
    for name in _WHERE_NOT_DEFAULT:
        value = _option(pool, name)
        if value != VLLM.parameter(name).default:
            flags += _flag(name, value)
    return tuple(flags)


def _flag(name: str, value: OptionValue) -> tuple[str, ...]:
    """A switch is `--name` or `--no-name`, anything else `--name value`."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return (f"--{flag}" if value else f"--no-{flag}",)
    return (f"--{flag}", str(value))


def _speculation_flags(pool: Pool, found: Installation) -> tuple[str, ...]:
    method = str(_option(pool, "speculative_method"))
    if method == "none" or (method == "ngram" and pool.role is Role.PREFILL):
        return ()  # other drafts have KV caches, which a prefill replica must fill as well
    config: dict[str, OptionValue] = {
        "method": method,
        "num_speculative_tokens": int(_option(pool, "speculative_tokens")),
    }
    if method == "ngram":
        config |= {"prompt_lookup_min": 2, "prompt_lookup_max": 4}
    if method in DRAFTS_OF_THEIR_OWN:
        if found.draft_model is None:
            raise InvalidValueError(
                f"speculative_method={method} loads a second model; name it with "
                f"node_pools.{pool.node_pool}.engines.vllm.draft_model, or choose ngram"
            )
        config |= {"model": found.draft_model}
    return ("--speculative-config", json.dumps(config))


def _hand_over_flags(replica: ReplicaSpec, found: Installation) -> tuple[str, ...]:
    role = replica.pool.role
    if role is Role.MIXED:
        return ()
    connector = str(_option(replica.pool, "kv_connector"))
    if connector == FILE_CONNECTOR:
        folder = {"shared_storage_path": str(replica.shared_dir / "kv")}
        config = {"kv_connector": connector, "kv_role": "kv_both", "kv_connector_extra_config": folder}
    else:
        kv_role = "kv_producer" if role is Role.PREFILL else "kv_consumer"
        config = {"kv_connector": connector, "kv_role": kv_role}
        if not found.on_gpu:
            config |= {"kv_buffer_device": "cpu"}
    return ("--kv-transfer-config", json.dumps(config))


def _common_env(replica: ReplicaSpec) -> dict[str, str]:
    """Nothing goes out to others' servers for a local model, and `/reset_prefix_cache` is there."""
    env = {"VLLM_NO_USAGE_STATS": "1", "VLLM_SERVER_DEV_MODE": "1", "VLLM_HOST_IP": replica.host}
    if Path(replica.source).is_absolute():
        env |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if replica.api_key is not None:
        env["VLLM_API_KEY"] = replica.api_key
    return env


def _device_env(replica: ReplicaSpec, found: Installation) -> dict[str, str]:
    ids = [str(number) for number in replica.device_ids]
    if found.on_gpu:
        return {"CUDA_VISIBLE_DEVICES": ",".join(ids)} if ids else {}
    size = replica.pool.devices_per_rank
    ranks = [",".join(ids[start : start + size]) for start in range(0, len(ids), size)]
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(_option(replica.pool, "cpu_kv_cache_gib")),
        **({"VLLM_CPU_OMP_THREADS_BIND": "|".join(ranks)} if ranks else {}),
    }


def _hand_over_env(replica: ReplicaSpec, found: Installation) -> dict[str, str]:
    if replica.pool.role is Role.MIXED or _option(replica.pool, "kv_connector") == FILE_CONNECTOR:
        return {}
    env = {
        "VLLM_NIXL_SIDE_CHANNEL_HOST": replica.host,
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(side_port(replica.port)),
    }
    transport = str(_option(replica.pool, "kv_transport"))
    if transport != "auto":
        allowed = [name for name in UCX_TLS[transport].split(",") if found.on_gpu or not name.startswith("cuda")]
        env["UCX_TLS"] = ",".join(allowed)
    if replica.host == "127.0.0.1":
        env["UCX_NET_DEVICES"] = "lo"
    return env
