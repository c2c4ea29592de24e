"""llama.cpp as an engine: what to launch for a replica or a router, and what their ends mean."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from cluster.engines.base import HttpCall, LaunchCommand, ReplicaSpec, RouterSpec
from cluster.engines.child_process import Exit
from cluster.engines.gguf_header import check_is_gguf
from cluster.engines.gguf_model import write_model
from search_spaces.engines.llamacpp import LLAMACPP
from search_spaces.errors import InvalidValueError, require
from search_spaces.model import ModelSpec
from search_spaces.outcome import FailureReason
from search_spaces.serving import Mode, OptionValue, Pool, Role, ServingConfig

SIGKILL = -9
_OUT_OF_MEMORY_SIGNS = ("out of memory", "failed to allocate", "bad_alloc", "cannot allocate memory", "MemoryError")


class LlamaCppBackend:
    """The embedded engine; see `cluster.engines.base.EngineBackend`."""

    name = "llamacpp"
    emulated = False

    def prepare(self, model: ModelSpec, directory: Path) -> ModelSpec:
        """Write a random-weight GGUF where the model names no file; raises `InvalidValueError` for a bad file."""
        path = write_model(model, directory) if model.source is None else Path(model.source)
        check_is_gguf(path)
        return replace(model, source=str(path.resolve()))

    def replica_command(self, replica: ReplicaSpec) -> LaunchCommand:
        """A process with llama.cpp's server; raises `InvalidValueError` where the model was not prepared."""
        source = replica.source
        _check_peer(replica)
        pool, model = replica.pool, replica.model
        spec = {
            "model_path": source,
            "model_name": model.name,
            "host": replica.host,
            "port": replica.port,
            "slots": _allocated_slots(replica),
            "context_per_slot": replica.workload.longest_context,
            "batch_size": _option(pool, "batch_size"),
            "ubatch_size": _option(pool, "ubatch_size"),
            "kv_cache_dtype": _option(pool, "kv_cache_dtype"),
            "flash_attention": _option(pool, "flash_attention"),
            "threads": pool.devices_per_replica,
            "cores": replica.device_ids,
            "reuse_prompts": replica.workload.shared_prefix > 0,
            "slot_dir": str(replica.shared_dir),
            "kv_elements_per_token": sum(g.count * g.attention.kv_elements_per_token for g in model.layers),
            "max_context": model.max_context,
        }
        return LaunchCommand(argv=(sys.executable, "-m", "cluster.engines.llamacpp_server", "--spec", json.dumps(spec)))

    def needs_shared_folder(self, config: ServingConfig) -> bool:
        """True where KV caches are handed over: slots are saved to files and restored from them."""
        return config.mode is Mode.DISAGGREGATED

    def host_memory_bytes(self, replica: ReplicaSpec) -> float:
        """Bytes of the model file and of the KV cache at two bytes an element (llama.cpp's f16)."""
        weights = 0 if replica.model.source is None else Path(replica.model.source).stat().st_size
        elements = sum(g.count * g.attention.kv_elements_per_token for g in replica.model.layers)
        return weights + 2.0 * elements * _allocated_slots(replica) * replica.workload.longest_context

    def router_command(self, router: RouterSpec) -> LaunchCommand:
        """A process with the router: load balancing where aggregated, hand-over of slots where disaggregated."""
        spec = {
            "host": router.host,
            "port": router.port,
            "mixed_urls": router.mixed_urls,
            "prefill_urls": router.prefill_urls,
            "decode_urls": router.decode_urls,
            "prefill_slots": _slots(router.prefill_pool),
            "decode_slots": _slots(router.decode_pool),
            "slot_dir": str(router.shared_dir),
        }
        return LaunchCommand(argv=(sys.executable, "-m", "cluster.router", "--spec", json.dumps(spec)))

    def reset_calls(self, pool: Pool) -> tuple[HttpCall, ...]:
        """Every slot that the router uses forgets its last prompt; no others are kept (`cache_ram_mib` is 0)."""
        return tuple(HttpCall(path=f"/slots/{slot}?action=erase") for slot in range(_slots(pool)))

    def classify(self, exit_code: int | None, log_tail: str, *, ready: bool) -> FailureReason:
        """Class of a failure; SIGKILL stands for exhausted memory where the kernel does not tell (`memory_kills`)."""
        memory = FailureReason.OUT_OF_MEMORY_UNDER_LOAD if ready else FailureReason.OUT_OF_MEMORY_AT_BOOT
        if exit_code is None:
            return FailureReason.REQUESTS_FAILED if ready else FailureReason.STARTUP_TIMEOUT
        if exit_code in (Exit.OUT_OF_MEMORY, SIGKILL) or any(sign in log_tail for sign in _OUT_OF_MEMORY_SIGNS):
            return memory
        return {
            int(Exit.INVALID_OPTIONS): FailureReason.INVALID_FLAGS,
            int(Exit.MODEL_NOT_LOADED): FailureReason.INVALID_FLAGS,
            int(Exit.PORT_IN_USE): FailureReason.TRANSPORT,
        }.get(exit_code, FailureReason.ENGINE_CRASH)

    def version(self) -> str:
        """Version of xllamacpp, which holds llama.cpp."""
        return f"xllamacpp {version('xllamacpp')}"


def _option(pool: Pool, name: str) -> OptionValue:
    return pool.option(name, LLAMACPP.parameter(name).default)


def _check_peer(replica: ReplicaSpec) -> None:
    """A slot restores only into a KV cache of the same type and layout (flash attention turns the values round)."""
    pool, peer = replica.pool, replica.peer
    if pool.role is Role.MIXED:
        return
    if peer is None:
        raise InvalidValueError(f"a {pool.role} replica of llama.cpp needs its peer pool; set ReplicaSpec.peer")
    for name in LLAMACPP.shared_options:
        mine, theirs = _option(pool, name), _option(peer, name)
        require(
            mine == theirs,
            f"{name}={mine} of the {pool.role} pool differs from {theirs} of the {peer.role} pool, "
            "so that no KV cache could be handed over; give both pools the same",
        )


def _allocated_slots(replica: ReplicaSpec) -> int:
    """Slots of the replica: those of its pool, or of the peer pool where that has more.

    A saved slot can only be restored by a replica with as many slots ("n_stream mismatch" otherwise). The router uses
    no more than the pool's own; the others take KV memory, but no time.
    """
    return max(_slots(replica.pool), _slots(replica.peer))


def _slots(pool: Pool | None) -> int:
    return 0 if pool is None else int(_option(pool, "max_num_seqs"))
