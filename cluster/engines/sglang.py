"""SGLang as an engine: what to launch for a replica or a router, and what their ends mean.

Hand-over of KV caches: both replicas get a request at once, with the address of the prefill replica's bootstrap server
and a room; the transfer engine (Mooncake or NIXL) carries the cache from one to the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from cluster.engines.apart import UCX_TLS, PairedRouter, checked_version, classify_by_log, paired_router_command
from cluster.engines.base import HttpCall, LaunchCommand, ReplicaSpec, RouterSpec
from cluster.engines.flags import HelpRequest
from cluster.engines.hf_model import has_weights, loadable_folder
from cluster.engines.installation import Installation, Installations, installation_of, side_port
from search_spaces.engines.sglang import DRAFTS_OF_THEIR_OWN, SGLANG
from search_spaces.errors import InvalidValueError
from search_spaces.model import ModelSpec
from search_spaces.outcome import FailureReason
from search_spaces.serving import OptionValue, Pool, Role, ServingConfig

METRICS: Mapping[str, str] = {
    "requests_running": "sglang:num_running_reqs",
    "requests_waiting": "sglang:num_queue_reqs",
    "kv_cache_usage_ratio": "sglang:token_usage",
    "prompt_tokens_total": "sglang:prompt_tokens_total",
    "output_tokens_total": "sglang:generation_tokens_total",
}
"""The figures of a replica's `/metrics` that are recorded, under our names; it counts no tokens that it received."""
HELP = HelpRequest(help=("--help",), package="sglang")
_SWITCHES = ("disable_radix_cache", "disable_cuda_graph")
_WHERE_NOT_DEFAULT = (
    "kv_cache_dtype",
    "quantization",
    "dtype",
    "attention_backend",
    "page_size",
    "schedule_policy",
    "moe_a2a_backend",
)


@dataclass(frozen=True, kw_only=True)
class SglangBackend:
    """See `cluster.engines.base.EngineBackend`. `installations` say where each node pool has its SGLang."""

    installations: Installations

    name = "sglang"
    emulated = False

    def prepare(self, model: ModelSpec, directory: Path) -> ModelSpec:
        """Write a folder without weights where the model has nothing to load; raises `InvalidValueError`."""
        return replace(model, source=loadable_folder(model, directory))

    def replica_command(self, replica: ReplicaSpec) -> LaunchCommand:
        """`python -m sglang.launch_server` for one replica; raises `InvalidValueError` for what SGLang cannot do."""
        found = installation_of(self.installations, replica.pool)
        argv = (
            *found.program(self.name),
            *_serving_flags(replica),
            *_parallel_flags(replica),
            *_option_flags(replica.pool),
            *_speculation_flags(replica.pool, found),
            *_hand_over_flags(replica),
        )
        return LaunchCommand(argv=argv, env={**_env(replica), **found.env})

    def check_command(self, command: LaunchCommand, pool: Pool) -> str:
        """Version of the SGLang that `command` starts; raises `InvalidValueError` for flags that it does not know."""
        found = installation_of(self.installations, pool)
        return f"SGLang {checked_version(self.name, found, command, HELP)}"

    def router_command(self, router: RouterSpec) -> LaunchCommand:
        """Our router: load balancing where aggregated, meeting of the two replicas where disaggregated."""
        ports = tuple(side_port(urlsplit(url).port or 0) for url in router.prefill_urls)
        return paired_router_command(router, PairedRouter(protocol="bootstrap", metrics=METRICS, side_ports=ports))

    def reset_calls(self, pool: Pool) -> tuple[HttpCall, ...]:
        """Forget the pages of earlier prompts."""
        return () if _option(pool, "disable_radix_cache") else (HttpCall(path="/flush_cache"),)

    def transport(self, config: ServingConfig) -> str | None:
        """How KV caches go from prefill to decode replicas; None where they do not."""
        if len(config.pools) == 1:
            return None
        pool = config.pool(Role.PREFILL)
        allowed = str(_option(pool, "kv_transport"))
        return f"{_option(pool, 'transfer_backend')} ({'its own choice' if allowed == 'auto' else allowed})"

    def span_refusal(self, pool: Pool, devices: tuple[int, ...]) -> str | None:
        """SGLang wants the same number of GPUs on each node."""
        if len(set(devices)) == 1:
            return None
        return f"SGLang wants the same number of GPUs on each node of the {pool.role} replica, not {devices}"

    def classify(self, exit_code: int | None, log_tail: str, *, ready: bool) -> FailureReason:
        """Class of a failure from its exit code and last lines."""
        return classify_by_log(exit_code, log_tail, ready=ready)

    def version(self) -> str:
        """What is known without a node; replicas say which version they are when they are launched."""
        return "SGLang"


def _option(pool: Pool, name: str) -> OptionValue:
    return pool.option(name, SGLANG.parameter(name).default)


def _serving_flags(replica: ReplicaSpec) -> tuple[str, ...]:
    dummy = () if has_weights(replica.source) else ("--load-format", "dummy")
    return (
        "--model-path",
        replica.source,
        "--served-model-name",
        replica.model.name,
        "--host",
        replica.host,
        "--port",
        str(replica.port),
        "--context-length",
        str(replica.workload.longest_context),
        "--log-level-http",
        "warning",
        "--enable-metrics",
        "--enable-cache-report",
        *dummy,
    )


def _parallel_flags(replica: ReplicaSpec) -> tuple[str, ...]:
    """Attention data parallelism lives inside the tensor-parallel group, which is then `tp * dp` ranks wide."""
    sizes = replica.pool.parallelism
    named = {"--tp-size": sizes.tp * sizes.dp, "--pp-size": sizes.pp, "--dp-size": sizes.dp, "--ep-size": sizes.ep}
    flags = [word for name, size in named.items() if size > 1 for word in (name, str(size))]
    attention = ["--enable-dp-attention"] if sizes.dp > 1 else []
    part = replica.part
    if part is None:
        return (*flags, *attention)
    nodes = ["--nnodes", str(len(part.hosts)), "--node-rank", str(part.rank)]
    return (*flags, *attention, *nodes, "--dist-init-addr", f"{part.leader_host}:{part.rendezvous_port}")


def _option_flags(pool: Pool) -> tuple[str, ...]:
    flags: list[str] = []
    for name in ("max_running_requests", "chunked_prefill_size", "mem_fraction_static"):
        flags += _flag(name, _option(pool, name))
    flags += [f"--{name.replace('_', '-')}" for name in _SWITCHES if _option(pool, name)]
    for name in _WHERE_NOT_DEFAULT:
        value = _option(pool, name)
        if value != SGLANG.parameter(name).default:
            flags += _flag(name, value)
    return tuple(flags)


def _flag(name: str, value: OptionValue) -> tuple[str, str]:
    return f"--{name.replace('_', '-')}", str(value)


def _speculation_flags(pool: Pool, found: Installation) -> tuple[str, ...]:
    """A chain of drafts: one token for each step, all of them checked at once."""
    algorithm = str(_option(pool, "speculative_algorithm"))
    if algorithm == "none" or (algorithm == "NGRAM" and pool.role is Role.PREFILL):
        return ()  # other drafts have KV caches, which a prefill replica must fill as well
    steps = int(_option(pool, "speculative_num_steps"))
    drafted = _flag("speculative_num_draft_tokens", steps + 1)
    if algorithm == "NGRAM":
        return (*_flag("speculative_algorithm", algorithm), *drafted)
    chain = (*_flag("speculative_num_steps", steps), *_flag("speculative_eagle_topk", 1), *drafted)
    if algorithm not in DRAFTS_OF_THEIR_OWN:
        return (*_flag("speculative_algorithm", algorithm), *chain)
    if found.draft_model is None:
        raise InvalidValueError(
            f"speculative_algorithm={algorithm} loads a second model; name it with "
            f"node_pools.{pool.node_pool}.engines.sglang.draft_model, or choose NGRAM"
        )
    model = _flag("speculative_draft_model_path", found.draft_model)
    return (*_flag("speculative_algorithm", algorithm), *model, *chain)


def _hand_over_flags(replica: ReplicaSpec) -> tuple[str, ...]:
    role = replica.pool.role
    if role is Role.MIXED:
        return ()
    backend = ("--disaggregation-transfer-backend", str(_option(replica.pool, "transfer_backend")))
    bootstrap = ("--disaggregation-bootstrap-port", str(side_port(replica.port))) if role is Role.PREFILL else ()
    return ("--disaggregation-mode", str(role), *backend, *bootstrap)


def _env(replica: ReplicaSpec) -> dict[str, str]:
    env = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, replica.device_ids))} if replica.device_ids else {}
    if Path(replica.source).is_absolute():
        env |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if replica.pool.role is Role.MIXED:
        return env
    transport = str(_option(replica.pool, "kv_transport"))
    if transport == "auto":
        return env
    if _option(replica.pool, "transfer_backend") == "nixl":
        return env | {"UCX_TLS": UCX_TLS[transport]}
    return env | ({"MC_FORCE_TCP": "1"} if transport == "tcp" else {})
