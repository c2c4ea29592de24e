"""One replica of llama.cpp: its HTTP server inside this process, set up from a `ServerSpec`.

    python -m cluster.engines.llamacpp_server --spec JSON|FILE

SIGTERM ends it at once, and so does the end of the process that started it. When it cannot serve it exits with one of
the `Exit` codes and says why in its last line.

A context slot holds one request, and the contexts of slots are apart (`kv_unified` off). Sizes are never fitted to the
memory at hand (`fit_params` off): a configuration is measured as it stands, or fails. Idle prompts are not copied to
host memory (`cache_ram_mib` 0). Earlier prompts are reused only where the workload shares prefixes: otherwise a
deployment that is measured twice would answer from its cache.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil
from pydantic import BaseModel, Field, model_validator

from cluster.engines.child_process import (
    API_KEY_VARIABLE,
    Exit,
    bound_to_starting_thread,
    die_with_owner,
    fail,
    read_spec,
)

if TYPE_CHECKING:
    import xllamacpp

KvCacheType = Literal["f16", "q8_0", "f32"]
BYTES_PER_ELEMENT: dict[KvCacheType, float] = {"f16": 2.0, "q8_0": 34 / 32, "f32": 4.0}
"""q8_0 holds blocks of 32 one-byte elements with a two-byte scale."""
CONTEXT_STEP = 256
"""llama.cpp rounds the context of a slot up to a multiple of this many tokens."""


class ServerSpec(BaseModel, frozen=True, extra="forbid"):
    """Everything that decides how a replica runs.

    `context_per_slot` is tokens, `cores` the cores that the process keeps to (none: any core), `slot_dir` the folder
    through which slots are handed over, `kv_elements_per_token` elements of keys and values, all layers.
    """

    model_path: Path
    model_name: str
    host: str
    port: int = Field(ge=1, le=65535)
    slots: int = Field(ge=1, le=256)
    context_per_slot: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    ubatch_size: int = Field(ge=1)
    kv_cache_dtype: KvCacheType
    flash_attention: bool
    threads: int = Field(ge=1)
    cores: tuple[int, ...] = ()
    reuse_prompts: bool = False
    slot_dir: Path
    kv_elements_per_token: int = Field(ge=1)
    max_context: int = Field(ge=1)

    @model_validator(mode="after")
    def _check(self) -> ServerSpec:
        if self.ubatch_size > self.batch_size:
            raise ValueError(
                f"ubatch_size={self.ubatch_size} is above batch_size={self.batch_size}; lower it to at most that"
            )
        if self.kv_cache_dtype == "q8_0" and not self.flash_attention:
            raise ValueError("kv_cache_dtype=q8_0 needs flash_attention=True")
        if self.context_per_slot > self.max_context:
            raise ValueError(
                f"a request needs {self.context_per_slot} tokens of context, the model holds {self.max_context}; "
                "shorten the workload"
            )
        return self

    @property
    def context_tokens(self) -> int:
        """Tokens that the KV cache of all slots holds."""
        steps = -(-self.context_per_slot // CONTEXT_STEP)
        return steps * CONTEXT_STEP * self.slots

    @property
    def kv_cache_bytes(self) -> float:
        """Bytes of the KV cache."""
        return self.context_tokens * self.kv_elements_per_token * BYTES_PER_ELEMENT[self.kv_cache_dtype]


def main() -> None:
    """Serve until a signal ends the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the caller ends replicas
    with bound_to_starting_thread():
        spec = read_spec(ServerSpec, "Serves one replica of llama.cpp.")
        if spec.cores:
            _pin(spec.cores)  # before any thread is started: threads inherit it
        die_with_owner()
        _check_files_and_port(spec)
        _check_memory(spec)
        server = _start(spec)
    print(f"serving {spec.model_name} on http://{spec.host}:{spec.port}", flush=True)
    threading.Event().wait()
    del server


def _pin(cores: tuple[int, ...]) -> None:
    try:
        os.sched_setaffinity(0, cores)
    except OSError as error:
        usable = sorted(os.sched_getaffinity(0))
        fail(Exit.INVALID_OPTIONS, f"cores={list(cores)} cannot be used ({error}); choose from {usable}")


def _check_files_and_port(spec: ServerSpec) -> None:
    if not spec.model_path.is_file():
        fail(Exit.MODEL_NOT_LOADED, f"the model file {spec.model_path} does not exist")
    if not spec.slot_dir.is_dir():
        fail(Exit.INVALID_OPTIONS, f"slot_dir={spec.slot_dir} is not a folder; create it first")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((spec.host, spec.port))
        except OSError as error:
            fail(Exit.PORT_IN_USE, f"port {spec.port} of {spec.host} cannot be bound ({error}); choose another")


def available_memory_bytes() -> int:
    """Bytes that this process may still take: what the machine has free, and no more than its memory group allows."""
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):  # no memory group of version 2 is mounted here
        return free
    return free if limit == "max" else min(free, max(0, int(limit) - used))


def _check_memory(spec: ServerSpec) -> None:
    """Refuse what cannot fit: the kernel would grant the memory, then kill some process when it is touched."""
    weights = spec.model_path.stat().st_size
    needed, available = spec.kv_cache_bytes + weights, available_memory_bytes()
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        available = min(available, limit)
    if needed > available:
        fail(
            Exit.OUT_OF_MEMORY,
            f"out of memory: {spec.slots} slots of {spec.context_per_slot} tokens take {spec.kv_cache_bytes:.3g} bytes "
            f"of KV cache and the weights {weights:.3g}, but {available:.3g} are free; "
            "lower max_num_seqs or the lengths of the workload",
        )


def _start(spec: ServerSpec) -> object:
    """The running server; it serves as long as it is referenced."""
    import xllamacpp

    try:
        return xllamacpp.Server(_parameters(spec))
    except OverflowError:
        fail(Exit.OUT_OF_MEMORY, f"out of memory: a context of {spec.context_tokens} tokens is beyond llama.cpp")
    except RuntimeError as error:
        fail(Exit.MODEL_NOT_LOADED, f"llama.cpp did not load {spec.model_path} ({error}); its reasons stand above")


def _parameters(spec: ServerSpec) -> xllamacpp.CommonParams:
    import xllamacpp

    flash = xllamacpp.llama_flash_attn_type
    params = xllamacpp.CommonParams()
    params.model.path, params.model_alias = str(spec.model_path), {spec.model_name}
    params.hostnames, params.port = [spec.host], spec.port
    params.n_parallel, params.n_ctx = spec.slots, spec.context_tokens
    params.n_batch, params.n_ubatch = spec.batch_size, spec.ubatch_size
    params.cache_type_k = params.cache_type_v = _ggml_type(spec.kv_cache_dtype)
    params.flash_attn_type = (
        flash.LLAMA_FLASH_ATTN_TYPE_ENABLED if spec.flash_attention else flash.LLAMA_FLASH_ATTN_TYPE_DISABLED
    )
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = spec.threads
    params.cache_prompt, params.cache_ram_mib = spec.reuse_prompts, 0
    params.fit_params = params.kv_unified = False
    params.endpoint_slots = params.endpoint_metrics = True
    params.slot_save_path = f"{spec.slot_dir}/"
    params.ui, params.sse_ping_interval = False, -1
    if API_KEY_VARIABLE in os.environ:
        params.api_keys = [os.environ[API_KEY_VARIABLE]]
    return params


def _ggml_type(name: KvCacheType) -> xllamacpp.ggml_type:
    import xllamacpp

    types = xllamacpp.ggml_type
    return {"f16": types.GGML_TYPE_F16, "q8_0": types.GGML_TYPE_Q8_0, "f32": types.GGML_TYPE_F32}[name]


if __name__ == "__main__":
    main()
